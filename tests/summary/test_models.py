"""Which model a name stands for, and what it costs, without allocating it."""

import json

import pytest

import polygpt
from polygpt.errors import RequestError
from polygpt.interop import export_huggingface
from polygpt.loading import save
from polygpt.presets import PRESET_VOCAB, PRESETS, preset
from polygpt.summary import Resolved, resolve_model, shown, summary

# Presets of which, in training, a token's output depends on later tokens.
LATE = {"tiny_moe", "tiny_moe_2", "tiny_moe_3"}


def test_presets_recipes_files_and_runs_are_found(tiny_run, tiny_files):
    assert resolve_model("gpt2") == Resolved(preset("gpt2"))
    open_one = resolve_model("tiny_large")
    assert open_one.model == preset("tiny_large", vocab_size=PRESET_VOCAB)
    assert open_one.vocabulary == "counted with GPT-2's 50,257 ids"
    run = resolve_model(str(tiny_run))
    file = resolve_model(str(tiny_files / "tiny.yaml"), {"data.path": str(tiny_files / "text.txt")})
    assert (run.vocabulary, file.vocabulary) == (None, "the characters of the text")
    assert run.model == file.model
    assert run.run.training == file.run.training


@pytest.mark.parametrize(
    ("changes", "size", "repeatable"),
    [
        ({}, 4096, True),
        ({"tokenizer": {"kind": "byte"}}, 257, True),
        ({"tokenizer": {"kind": "byte", "special_tokens": []}}, 256, True),
        ({"tokenizer": {"kind": "char"}, "data.path": "absent.txt"}, 100, False),
        ({"model.vocab_size": 5000}, 5000, True),
    ],
)
def test_a_recipes_vocabulary_is_what_its_tokenizer_will_have(changes, size, repeatable):
    resolved = resolve_model("demo", changes)
    assert (resolved.model.vocab_size, resolved.repeatable) == (size, repeatable)


def test_a_recipes_vocabulary_is_read_from_a_tokenizer_or_shards(tiny_run):
    known = resolve_model(str(tiny_run)).model.vocab_size
    for changes in (
        {"tokenizer": {"kind": "file", "path": str(tiny_run)}},
        {"data.path": str(tiny_run / "data")},
    ):
        resolved = resolve_model("demo", changes)
        assert (resolved.model.vocab_size, resolved.repeatable) == (known, False)


def test_what_depends_on_a_users_own_part_is_not_repeatable(tmp_path, monkeypatch):
    (tmp_path / "own_norm_of_summary.py").write_text(
        "from polygpt.model.norms import RMSNormConfig\nclass Own(RMSNormConfig):\n    kind: str\n"
    )
    monkeypatch.chdir(tmp_path)
    assert shown("giant")["repeatable"]
    assert not shown("giant", {"model.norm": "own_norm_of_summary:Own"})["repeatable"]


@pytest.mark.parametrize("text", ["model: {preset: gpt, num_layers: 2}", "{preset: gpt, num_layers: 2}"])
def test_a_file_is_of_a_run_or_of_a_model_alone(tmp_path, text):
    path = tmp_path / "file.yml"
    path.write_text(text)
    assert resolve_model(str(path)).model == preset("gpt", num_layers=2)


def test_overrides_are_written_as_in_a_run():
    assert resolve_model("gpt2", {"model.attention.num_heads": 6}).model == preset("gpt2", attention={"num_heads": 6})
    with pytest.raises(RequestError, match=r"training\.steps: this is a model without a run; write model\.KEY=VALUE"):
        resolve_model("gpt2", {"training.steps": 3})
    with pytest.raises(RequestError, match=r"gpt2: num_layer: no such key"):
        resolve_model("gpt2", {"model.num_layer": 3})


def test_every_preset_is_summed_up_without_allocating_it():
    for name in PRESETS:
        answer = shown(name)
        facts = answer["facts"]
        assert (answer["vocabulary"] is not None) == (PRESETS[name]().get("vocab_size") is None)
        assert facts["config"]["vocab_size"] == preset(name).with_vocab(PRESET_VOCAB).vocab_size
        assert facts["non_embedding_parameters"] < facts["parameters"] >= facts["active_parameters"]
        assert facts["causal_in_training"] == (name not in LATE)
        assert bool(facts["notes"]) == (name in LATE)
        assert answer["tree"]["size"] == facts["parameters"]
        assert json.loads(json.dumps(answer)) == answer


def test_bytes_of_training_are_those_of_parameters_gradients_and_optimizer():
    config = preset("giant", vocab_size=64)
    facts = summary(config)
    size = 4 * facts["parameters"]
    assert facts["training_bytes"] == {"parameters": size, "gradients": size, "optimizer_state": 2 * size}
    half = summary(preset("giant", vocab_size=64, param_dtype="bfloat16"))["training_bytes"]
    assert half["parameters"] == half["gradients"] == size // 2
    muon = shown("demo")["facts"]
    matrices = muon["non_embedding_parameters"] - 128 * 5  # of blocks; the rest has Adam's two moments
    assert abs(muon["training_bytes"]["optimizer_state"] - 4 * (2 * muon["parameters"] - matrices)) < 100
    lm = polygpt.build(config)
    assert lm.training_bytes == {"parameters": size, "gradients": size, "optimizer_state": 2 * size}
    assert lm.non_embedding_parameters == facts["non_embedding_parameters"]


def test_embeddings_are_the_tables_of_tokens_and_positions():
    facts = summary(preset("gpt2"))
    assert facts["parameters"] - facts["non_embedding_parameters"] == (50257 + 1024) * 768
    untied = summary(preset("small", vocab_size=100))
    assert untied["parameters"] - untied["non_embedding_parameters"] == (100 + 512) * 512


def test_costs_are_those_of_arithmetic():
    facts = summary(preset("gpt2"))
    assert facts["kv_cache_bytes_per_token"] == 12 * 2 * 768 * 2  # layers, keys and values, width, bytes of bfloat16
    vectors = 1024 * 768 + 12 * (4 * 768 + 3 * 768 + 768 + 3072 + 768) + 2 * 768
    matrices = facts["parameters"] - vectors
    assert facts["flops_per_token"] == 3 * (2 * matrices + 12 * 4 * 768 * 1024)
    assert facts["state_bytes_at_full_context"] == 1024 * facts["kv_cache_bytes_per_token"]


def test_what_is_to_be_known_before_training_is_noted():
    assert summary(preset("gpt2"))["notes"] == []
    late = summary(preset("tiny_moe", num_layers=2))
    assert not late["causal_in_training"]
    assert "feedforward moe lets a token's output depend on later tokens" in late["notes"][0]
    assert summary(preset("tiny_moe_2", num_layers=2, **{"feedforward.claim_order": "token"}))["causal_in_training"]


@pytest.mark.parametrize(("name", "machine"), [("cudnn", "an NVIDIA GPU"), ("pallas", "a TPU")])
def test_attention_that_another_machine_computes_is_a_note(name, machine):
    facts = summary(preset("gpt2", **{"attention.implementation": name}))
    if facts["attention_implementation"] is None:
        assert f"cannot run on this machine: attention.implementation={name} needs {machine}" in facts["notes"][0]
    else:
        assert facts["attention_implementation"] == name


def test_a_model_brought_in_or_elsewhere_can_be_shown(tmp_path):
    lm = polygpt.build(preset("giant", vocab_size=64))
    save(lm, tmp_path / "own")
    export_huggingface(tmp_path / "theirs", lm.config, lm.params)
    assert resolve_model(str(tmp_path / "own")).model == lm.config
    model = resolve_model(str(tmp_path / "theirs"), {"model.num_layers": 1}).model
    assert (model.num_layers, model.attention.kv_heads) == (1, 1)
    with pytest.raises(RequestError, match=r"training\.initial is required"):
        resolve_model("finetune")
