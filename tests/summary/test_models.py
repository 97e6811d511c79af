"""Which model a name stands for, and what it costs, without allocating it."""

import pytest

import polygpt
from polygpt.errors import RequestError
from polygpt.interop import export_huggingface
from polygpt.loading import save
from polygpt.presets import PRESET_VOCAB, PRESETS, preset
from polygpt.summary import preset_summaries, resolve_model, summary

# Presets of which, in training, a token's output depends on later tokens.
LATE = {"tiny_moe", "tiny_moe_2", "tiny_moe_3"}


def test_presets_recipes_files_and_runs_are_found(tiny_run, tiny_files):
    assert resolve_model("gpt2") == (preset("gpt2"), False)
    assert resolve_model("tiny_large") == (preset("tiny_large", vocab_size=PRESET_VOCAB), True)
    assert resolve_model("demo")[1]
    run, file = resolve_model(str(tiny_run)), resolve_model(str(tiny_files / "tiny.yaml"))
    assert (run[1], file[1]) == (False, True)
    assert run[0] == file[0].replace(vocab_size=run[0].vocab_size)


@pytest.mark.parametrize("text", ["model: {preset: gpt, num_layers: 2}", "{preset: gpt, num_layers: 2}"])
def test_a_file_is_of_a_run_or_of_a_model_alone(tmp_path, text):
    path = tmp_path / "file.yml"
    path.write_text(text)
    assert resolve_model(str(path))[0] == preset("gpt", num_layers=2)


def test_overrides_are_written_as_in_a_run():
    assert resolve_model("gpt2", {"model.attention.num_heads": 6})[0] == preset("gpt2", attention={"num_heads": 6})
    with pytest.raises(RequestError, match=r"training: only the model is shown; write model\.KEY=VALUE"):
        resolve_model("gpt2", {"training.steps": 3})
    with pytest.raises(RequestError, match=r"gpt2: num_layer: no such key"):
        resolve_model("gpt2", {"model.num_layer": 3})


def test_every_preset_is_summed_up_without_allocating_it():
    rows = preset_summaries()
    assert [row["preset"] for row in rows] == list(PRESETS)
    for row in rows:
        assert row["open_vocabulary"] == (PRESETS[row["preset"]]().get("vocab_size") is None)
        assert row["config"]["vocab_size"] == preset(row["preset"]).with_vocab(PRESET_VOCAB).vocab_size
        assert row["active_parameters"] <= row["parameters"]
        assert row["causal_in_training"] == (row["preset"] not in LATE)
        assert bool(row["notes"]) == (row["preset"] in LATE)


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
    assert resolve_model(str(tmp_path / "own")) == (lm.config, False)
    shown, _ = resolve_model(str(tmp_path / "theirs"), {"model.num_layers": 1})
    assert (shown.num_layers, shown.attention.kv_heads) == (1, 1)
    with pytest.raises(RequestError, match="no model 'MODEL'; name a run's folder"):
        resolve_model("finetune")
