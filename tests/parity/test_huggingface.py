"""Every architecture against transformers itself, live: their weights in ours, ours in theirs."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (make test-parity installs it)")
pytest.importorskip("transformers", reason="transformers is not installed (make test-parity installs it)")

import families
import torch
import transformers
from families import MODELS, Foreign, build, logits, opened, tokens
from make_references import REFERENCES, make
from safetensors.numpy import load_file
from zoo import lively, shrunk

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.interop import export_huggingface, open_huggingface
from polygpt.interop.huggingface.folder import ARCHITECTURES, find_architecture, read_fields
from polygpt.interop.same import computation
from polygpt.loading import adapted
from polygpt.model import Model, ModelConfig
from polygpt.presets import PRESETS, preset
from polygpt.settings import Settings

pytestmark = pytest.mark.parity
RELATIVE = 1e-4
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
families.quiet()


def error(got, expected) -> float:
    """The largest difference, relative to the largest logit."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def ours(config: ModelConfig, params) -> np.ndarray:
    compute = jax.jit(Model(config).logits)
    return np.asarray(compute(params, tokens()))


def read(folder: Path, dtype: str | None = None):
    found = open_huggingface(folder)
    config = adapted(found.config, dtype, {})
    return config, found.read(config, int)


def saved(foreign: Foreign, folder: Path, **settings):
    model = build(foreign)
    model.save_pretrained(folder, **settings)
    return model


@EVERY_MODEL
def test_logits_are_theirs_and_a_round_trip_changes_none(name, tmp_path):
    model = saved(MODELS[name], tmp_path / "theirs")
    expected = logits(model)
    config, params = read(tmp_path / "theirs")
    assert error(ours(config, params), expected) < RELATIVE
    architecture = export_huggingface(tmp_path / "ours", config, params)
    assert architecture == type(model).__name__
    assert np.array_equal(logits(opened(tmp_path / "ours")), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral", "gemma2", "phi3"])
def test_a_head_tied_or_not_is_read_as_it_is(name, tmp_path):
    foreign = MODELS[name]
    tied = not build(foreign).config.tie_word_embeddings
    model = saved(Foreign(foreign.family, {**foreign.settings, "tie_word_embeddings": tied}), tmp_path / "theirs")
    config, params = read(tmp_path / "theirs")
    assert config.head == ("tied" if tied else "untied")
    assert error(ours(config, params), logits(model)) < RELATIVE
    export_huggingface(tmp_path / "ours", config, params)
    assert np.array_equal(logits(opened(tmp_path / "ours")), logits(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gpt2", "llama-biases-tied", "mixtral", "gemma2", "phi3"])
def test_files_of_16_bits_are_read_exactly_and_written_back(name, dtype, tmp_path):
    build(MODELS[name]).to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
    expected = logits(opened(tmp_path / "theirs"))
    config, params = read(tmp_path / "theirs", "float32")
    assert error(ours(config, params), expected) < RELATIVE
    config, params = read(tmp_path / "theirs")
    assert config.param_dtype == config.compute_dtype == dtype
    # In 16 bits the two round in different places.
    assert error(ours(config, params), expected) < (0.1 if dtype == "bfloat16" else 0.02)
    export_huggingface(tmp_path / "ours", config, params)
    assert np.array_equal(logits(opened(tmp_path / "ours")), expected)
    back = opened(tmp_path / "ours", dtype)
    assert np.array_equal(logits(back), logits(opened(tmp_path / "theirs", dtype)))


def test_files_in_pieces_are_read_and_written(tmp_path):
    model = saved(MODELS["llama"], tmp_path / "theirs", max_shard_size="8KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    config, params = read(tmp_path / "theirs")
    assert error(ours(config, params), logits(model)) < RELATIVE
    export_huggingface(tmp_path / "ours", config, params, shard_bytes=6000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert np.array_equal(logits(opened(tmp_path / "ours")), logits(model))


def test_a_padded_vocabulary_gives_the_same_logits(tmp_path):
    model = saved(MODELS["llama"], tmp_path / "theirs")
    found = open_huggingface(tmp_path / "theirs")
    config = adapted(found.config, None, {"vocab_size": 64})
    params = found.read(config, int)
    got = ours(config, params)
    assert error(got[..., : families.VOCAB], logits(model)) < RELATIVE
    assert (jax.nn.softmax(got)[..., families.VOCAB :] == 0).all()
    export_huggingface(tmp_path / "ours", config, params)
    assert np.array_equal(logits(opened(tmp_path / "ours")), logits(model))


def test_the_stored_references_are_what_the_script_makes(tmp_path):
    make(tmp_path)
    assert {path.name for path in REFERENCES.iterdir()} == MODELS.keys()
    for name in MODELS:
        stored, made = (load_file(folder / name / "model.safetensors") for folder in (REFERENCES, tmp_path))
        assert stored.keys() == made.keys()
        assert all(np.array_equal(stored[key], made[key]) for key in stored)
        stored, made = (np.load(folder / name / "expected.npz") for folder in (REFERENCES, tmp_path))
        assert np.array_equal(stored["tokens"], made["tokens"])
        assert error(made["logits"], stored["logits"]) < 1e-5


# --- Settings: none is passed over that changes logits, and what is left out means what it means there ----------


def computed(values: dict) -> dict | None:
    """What our reading of a config.json computes; None where it is refused."""
    settings = Settings(values, "config.json")
    try:
        return computation(validate(ModelConfig, read_fields(find_architecture(settings), settings)))
    except RequestError:
        return None


def theirs(values: dict, folder: Path):
    """transformers' reading of a config.json; None where it is refused."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except Exception:  # whatever its validation raises
        return None


def written(config, folder: Path) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def changed(value):
    """Other values of the same type."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value]
    if isinstance(value, float):
        return [value + 0.5, 2 * value]
    if value is None:
        return [True, 2, 0.5]
    return [value[::-1]] if isinstance(value, list) else []


def variants(values: dict, without: set[str]):
    """`values` with one setting left out, one null, or one changed; those of `rope_parameters` as well."""
    inner = values.get("rope_parameters") or {}
    for key, value in values.items():
        if key in without or key.endswith("token_id"):
            continue
        yield f"{key} left out", {k: v for k, v in values.items() if k != key}
        for other in [None, *changed(value)]:
            yield f"{key}={other}", values | {key: other}
    for key, value in inner.items():
        yield f"rope {key} left out", values | {"rope_parameters": {k: v for k, v in inner.items() if k != key}}
        for other in changed(value):
            yield f"rope {key}={other}", values | {"rope_parameters": inner | {key: other}}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("llama-biases-tied", "qwen2")])
def test_a_setting_means_what_it_means_there(name, tmp_path):
    """Whatever is left out or changed: we refuse it, or we compute what transformers says in full that it is."""
    base = build(MODELS[name])
    expected = logits(base)
    values = written(base.config, tmp_path / "base")
    # What every configuration has is tried with one of them.
    without = {"model_type", "architectures", "transformers_version"}
    without |= set() if name == "llama" else set(transformers.PretrainedConfig().to_dict())
    without -= {"tie_word_embeddings"}
    own, seen = computed(values), 0
    for what, variant in variants(values, without):
        found, config = computed(variant), theirs(variant, tmp_path / "variant")
        if found is None or config is None:
            continue
        in_full = computed(written(config, tmp_path / "full"))
        assert found == in_full, what
        if found == own:
            try:
                model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            except Exception:  # it is refused there after all
                continue
            model.load_state_dict(base.state_dict())
            assert np.array_equal(logits(model), expected), what
            seen += 1
    assert seen


# --- Export -----------------------------------------------------------------------------------------------------

# What is said to have no counterpart, of presets that cannot be exported.
WITHOUT = {
    "nope_gpt": r"position\.kind=none .*GPT2LMHeadModel",
    "glu_gpt": r"feedforward\.kind=glu .*GPT2LMHeadModel",
    "glu_rope_gpt": r"attention\.bias=True .*StableLmForCausalLM",
    "gqa_gpt": r"attention\.num_kv_heads=1 .*GPT2LMHeadModel",
    "tiny_moe": r"feedforward\.",
    "tiny_moe_2": r"feedforward\.normalize_weights=False .*MixtralForCausalLM",
    "tiny_moe_3": r"feedforward\.kind=soft_moe",
    "modular": r"position\.kind=sinusoidal",
    "bigram": r"num_layers=0",
}


def exported_as_theirs(config: ModelConfig, folder: Path) -> str:
    params = lively(Model(config))
    architecture = export_huggingface(folder, config, params)
    ids = tokens()[:, : config.context_length] % config.vocab_size
    compute = jax.jit(Model(config).logits)
    assert error(np.asarray(compute(params, ids)), logits(opened(folder), ids)) < 1e-5
    return architecture


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_opened_by_transformers_or_its_part_is_named(name, tmp_path):
    config = validate(ModelConfig, shrunk(name))
    if name not in WITHOUT:
        assert exported_as_theirs(config, tmp_path / "ours") in ARCHITECTURES
        return
    with pytest.raises(RequestError, match=f"no Hugging Face architecture computes this model: {WITHOUT[name]}"):
        export_huggingface(tmp_path / "ours", config, {})
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["gpt2", "smollm"])
def test_a_preset_of_real_names_and_one_layer_is_opened(name, tmp_path):
    config = preset(name, num_layers=1, vocab_size=96, context_length=32, embed_dim=144, compute_dtype="float32")
    exported_as_theirs(config, tmp_path / "ours")


def test_a_mixture_by_the_rules_of_mixtral_is_opened(tmp_path):
    experts = {"kind": "moe", "mlp_dim": 12, "num_experts": 4, "top_k": 2, "normalize_weights": True}
    config = validate(ModelConfig, shrunk("tiny_moe_2") | {"feedforward": experts | {"activation": "silu"}})
    assert exported_as_theirs(config, tmp_path / "ours") == "MixtralForCausalLM"
