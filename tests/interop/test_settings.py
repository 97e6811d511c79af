"""config.json, key by key: what is unknown, of another type, or asks for what there is not here is named."""

import json
import math
import shutil

import pytest
from make_references import REFERENCES

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.interop import open_huggingface
from polygpt.interop.huggingface.folder import find_architecture, read_fields
from polygpt.model import ModelConfig
from polygpt.settings import LIMIT, Settings, read_json

# reference, changes of its config.json -> what the complaint must say
REFUSED = {
    "an architecture": ("llama", {"architectures": ["FalconForCausalLM"]}, "the architecture FalconForCausalLM is not"),
    "a near architecture": ("llama", {"architectures": ["LLamaForCausalLM"]}, "did you mean 'LlamaForCausalLM'?"),
    "a model type": ("llama", {"architectures": None, "model_type": "rwkv"}, "the model type 'rwkv' is not known"),
    "a model type beside another's architecture": (
        "llama",
        {"model_type": "gpt_neox"},
        "the model type 'gpt_neox' is not known and contradicts the architecture LlamaForCausalLM",
    ),
    "no model type": ("llama", {"architectures": None, "model_type": None}, "the model type None is not known"),
    "architectures of numbers": ("llama", {"architectures": [3], "model_type": 4}, "the model type 4 is not known"),
    "a setting": ("llama", {"use_magic": 2}, "the setting 'use_magic' (2) is not known for this architecture"),
    "another's setting": ("llama", {"sliding_window": 4}, "the setting 'sliding_window' (4) is not known"),
    "a missing setting": ("llama", {"hidden_size": None}, "the setting 'hidden_size' is missing"),
    "a text for a number": ("llama", {"hidden_size": "16"}, "'hidden_size' is '16', where an integer is needed"),
    "a fraction": ("llama", {"num_hidden_layers": 2.0}, "'num_hidden_layers' is 2.0, where an integer is needed"),
    "true for a number": (
        "llama",
        {"num_attention_heads": True},
        "'num_attention_heads' is True, where an integer",
    ),
    "a number for true": ("llama", {"attention_bias": 1}, "'attention_bias' is 1, where true or false is needed"),
    "a list": ("llama", {"vocab_size": [50]}, "'vocab_size' is [50], where an integer is needed"),
    "heads that do not divide": ("llama", {"num_key_value_heads": 3}, "num_kv_heads must be 1, 2 or 4, not 3"),
    "no heads": ("llama", {"num_attention_heads": 0}, "greater than 0"),
    "negative layers": ("llama", {"num_hidden_layers": -2}, "greater than or equal to 0"),
    "an epsilon": ("llama", {"rms_norm_eps": -1.0}, "norm.eps"),
    "an activation": (
        "llama",
        {"hidden_act": "mish"},
        "'hidden_act' is 'mish', an unknown activation; known: ",
    ),
    "an activation that is none": (
        "llama",
        {"hidden_act": ["silu"]},
        "'hidden_act' is ['silu'], an unknown activation",
    ),
    "a scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "longrope"}},
        "'rope_parameters.rope_type' is 'longrope', a",
    ),
    "a dynamic scaling": ("llama", {"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, "is 'dynamic'"),
    "a scaling's setting": (
        "llama-linear",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}},
        "the setting 'rope_parameters.low_freq_factor' (1.0) is not known",
    ),
    "a scaling without factor": (
        "llama-linear",
        {"rope_parameters": {"rope_type": "linear"}},
        "the setting 'rope_parameters.factor' is missing",
    ),
    "rope that is a number": ("llama", {"rope_parameters": 3}, "'rope_parameters' is 3, where an object is needed"),
    "a share of a head": ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' has no effect"),
    "gpt2's scale": (
        "gpt2",
        {"scale_attn_weights": False},
        "'scale_attn_weights' is False; attention without its scale",
    ),
    "gpt2's scale by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "a scale that differs by layer"),
    "gpt2's cross attention": ("gpt2", {"add_cross_attention": True}, "cross attention is not supported"),
    "layer types": ("gemma2", {"layer_types": ["full_attention"]}, "'layer_types' must name full_attention or sliding"),
    "a layer type": ("gemma2", {"layer_types": ["full_attention", "chunked", "x"]}, "'layer_types' must name"),
    "layer types of lists": ("gemma2", {"layer_types": [["full_attention"]] * 3}, "'layer_types' must name"),
    "attention both ways": ("gemma2", {"use_bidirectional_attention": True}, "only causal attention is supported"),
    "a scalar of nothing": ("gemma2", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar'"),
    "phi3's scaling": (
        "phi3",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "only unscaled angles are known for this architecture",
    ),
    "stablelm's norms of heads": ("stablelm", {"qk_layernorm": True}, "only RMS norms of queries and keys"),
    "stablelm's residual": ("stablelm", {"use_parallel_residual": True}, "its one norm has no counterpart here"),
    "too many experts a token": ("mixtral", {"num_experts_per_tok": 9}, "top_k"),
    "layers without end": ("qwen2", {"num_hidden_layers": 1 << 30}, "but there are only 26 tensors"),
    "experts without end": ("mixtral", {"num_local_experts": 1 << 30}, "'num_local_experts' is 1,073,741,824, but"),
    "a number without end": ("llama", {"rms_norm_eps": 10**400}, "'rms_norm_eps' is larger than"),
    "a width without end": ("llama", {"hidden_size": 1 << 62}, "'hidden_size' is larger than 2,147,483,647"),
    "pruned heads": ("gpt2", {"pruned_heads": {"0": [1]}}, "'pruned_heads' is {'0': [1]}; models with pruned heads"),
    "cross attention": ("llama", {"add_cross_attention": True}, "cross attention is not supported"),
    "rope of several dimensions": ("qwen2", {"use_mrope": True}, "'use_mrope' is True; rotary positions of several"),
    "gpt2's heads by another name": ("gpt2", {"num_attention_heads": 3}, "'num_attention_heads' is 3; it contradicts"),
    "another's ignored setting": ("llama", {"cache_implementation": "hybrid"}, "the setting 'cache_implementation'"),
    "two rope scalings of which one is unknown": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "'rope_scaling.rope_type' is 'dynamic'",
    ),
    "a window of nothing": ("mistral", {"sliding_window": 0}, "window"),
}


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_setting_is_refused_by_name(name, changes, message, tmp_path):
    shutil.copytree(REFERENCES / name, tmp_path / "m")
    path = tmp_path / "m/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RequestError) as caught:
        open_huggingface(tmp_path / "m")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


# reference, settings that real files have and that transformers does not use
WITHOUT_EFFECT = {
    "a cut length": ("llama", {"max_sequence_length": 2048, "tokenizer_model_max_length": 4096}),
    "a tool's notes": ("llama", {"unsloth_version": "2024.11.10", "unsloth_fixed": True, "_commit": "x"}),
    "other tasks": ("llama", {"num_labels": 1, "id2label": {"0": "a"}, "pruned_heads": {}, "output_past": True}),
    "encoders and decoders": ("llama", {"tie_encoder_decoder": False, "add_cross_attention": False}),
    "how it is computed": ("llama", {"attn_implementation": "sdpa", "use_flash_attention_2": True}),
    "gpt's first version": ("gpt2", {"n_special": 0, "predict_special_tokens": True}),
    "gpt2's other names": ("gpt2", {"num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 32}),
    "gemma2's window again": ("gemma2", {"sliding_window_size": 3}),
    "phi3's biases": ("phi3", {"attention_bias": False, "mlp_bias": False, "lm_head_bias": False}),
    "mistral's biases": ("mistral", {"attention_bias": False}),
    "qwen2's dimensions": ("qwen2", {"use_mrope": False}),
    "starcoder2's other epsilon": ("starcoder2", {"rms_norm_eps": 0.5}),
}


@pytest.fixture
def changed(tmp_path):
    """Copies a reference, changes its config.json, and opens it."""

    def make(name, changes):
        shutil.copytree(REFERENCES / name, tmp_path / "m", dirs_exist_ok=True)
        path = tmp_path / "m/config.json"
        path.write_text(json.dumps(json.loads((REFERENCES / name / "config.json").read_text()) | changes))
        return open_huggingface(tmp_path / "m")

    return make


@pytest.mark.parametrize(("name", "changes"), WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_a_setting_without_effect_changes_nothing(name, changes, changed):
    assert changed(name, changes).config == open_huggingface(REFERENCES / name).config


def test_of_two_rope_scalings_the_older_is_read_alone(changed):
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
    position = changed("llama", newer | {"rope_scaling": linear}).config.position
    assert (position.scaling.kind, position.scaling.factor, position.theta) == ("linear", 4.0, 500.0)
    assert changed("llama", newer | {"rope_scaling": {}}).config.position.theta == 300.0
    assert changed("llama", newer | {"rope_scaling": {"type": "default"}}).config.position.theta == 10000.0


def test_yarns_settings_for_other_programs_are_ignored(changed):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    plain = changed("llama", {"rope_parameters": None, "rope_scaling": scaling})
    assert changed("llama", {"rope_scaling": scaling | {"attn_factor": 0.9, "finetuned": True}}).config == plain.config


@pytest.mark.parametrize(("name", "decoder"), [("gpt2", "GPT2Model"), ("llama", "LlamaModel"), ("phi3", "Phi3Model")])
def test_a_bare_decoders_class_names_its_architecture(name, decoder, changed):
    found = changed(name, {"architectures": [decoder]})
    assert found.config == open_huggingface(REFERENCES / name).config
    assert found.facts["architecture"] == open_huggingface(REFERENCES / name).facts["architecture"]


def test_of_a_class_and_a_type_the_type_is_followed(changed):
    assert changed("llama", {"architectures": ["Qwen2ForCausalLM"]}).facts["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "a JSON object is needed, not list"),
        ('{"a": 1, "a": 1}', "duplicate key 'a'"),
        ('{"a": {"b": 1, "b": 2}}', "duplicate key 'b'"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "1e999 is not finite"),
        ('{"a": [1e999]}', "not finite"),
        ("[" * 100_000, "not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ("\udcff", "not JSON"),
    ],
)
def test_json_is_read_strictly(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RequestError) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_json_of_a_size_that_no_configuration_has_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(LIMIT + 1)
    with pytest.raises(RequestError, match="exceed the limit of"):
        read_json(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_json(tmp_path)


def test_settings_that_nobody_took_are_named_and_null_counts_as_absent():
    settings = Settings({"a": 1, "b": None, "c": 2.5, "d": None}, "file")
    settings.set_defaults({"d": 4, "e": 5})
    assert (settings.take("a", float), settings.take("b", int, 7), settings.take("d", int, None)) == (1.0, 7, None)
    assert settings.take("e", int) == 5
    with pytest.raises(RequestError, match=r"^file: the setting 'c' \(2\.5\) is not known"):
        settings.finish()
    settings.require("c", 2.5, "why")
    settings.finish()
    with pytest.raises(RequestError, match=r"'c' is 2\.5; why"):
        settings.require("c", 3, "why")


def test_old_spellings_mean_the_same(tmp_path):
    new = open_huggingface(REFERENCES / "llama-llama3").config
    shutil.copytree(REFERENCES / "llama-llama3", tmp_path / "m")
    path = tmp_path / "m/config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": values.pop("dtype")}
    path.write_text(json.dumps(values))
    assert open_huggingface(tmp_path / "m").config == new
    rope["type"] = rope.pop("rope_type")
    path.write_text(json.dumps(values))
    assert open_huggingface(tmp_path / "m").config == new


def test_yarns_two_scales_decide_its_magnitude(changed):
    rope = json.loads((REFERENCES / "llama-yarn/config.json").read_text())["rope_parameters"] | {"factor": 4.0}
    for scale, expected in ((1.0, 1.0), (2.0, (1 + 0.2 * math.log(4)) / (1 + 0.1 * math.log(4)))):
        scales = {"mscale": scale, "mscale_all_dim": 1.0}
        scaling = changed("llama-yarn", {"rope_parameters": rope | scales}).config.position.scaling
        assert scaling.attention_factor == pytest.approx(expected)


def fields_of(name, without=(), **changes):
    """The configuration of a reference's settings, some of them left out or changed."""
    values = json.loads((REFERENCES / name / "config.json").read_text()) | changes
    settings = Settings({key: value for key, value in values.items() if key not in without}, name)
    return validate(ModelConfig, read_fields(find_architecture(settings), settings))


def test_settings_that_are_left_out_have_their_class_defaults():
    assert fields_of("mixtral", ["rope_theta", "rope_parameters"]).position.theta == 1e6
    assert fields_of("mixtral", ["rms_norm_eps"]).norm.eps == 1e-5
    assert fields_of("llama", ["rope_theta", "rope_parameters"]).position.theta == 1e4
    assert fields_of("llama", ["rms_norm_eps"]).norm.eps == 1e-6
    assert fields_of("llama", ["max_position_embeddings"]).context_length == 2048
    assert fields_of("mistral", ["sliding_window"]).attention.window == 4096
    assert (
        fields_of(
            "stablelm", ["partial_rotary_factor", "rope_parameters"], num_attention_heads=2, num_key_value_heads=2
        ).position.fraction
        == 0.25
    )
    assert fields_of("starcoder2", ["tie_word_embeddings"]).head == "tied"
    assert fields_of("gpt2", ["n_inner"]).feedforward.mlp_dim == 4 * fields_of("gpt2").embed_dim


def test_which_layers_have_a_window_by_default():
    windows = [layer.attention.window for layer in fields_of("gemma2", ["layer_types"], sliding_window=5).layers]
    assert windows == [5, None, 5, None][: len(windows)]
    changes = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5, "num_hidden_layers": 3}
    windows = [layer.attention.window for layer in fields_of("qwen2", ["layer_types"], **changes).layers]
    assert windows == [None, 5, 5]
    assert fields_of("qwen2", ["layer_types"], **changes | {"use_sliding_window": False}).attention.window is None
