"""Tiny models of every entry of every registry and of every option that changes what a model computes.

Shared by the tests of parity with the specification, of causality and of decoding, so that a new entry meets all three.
"""

import math
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.config import merge, validate
from polygpt.model import Model, ModelConfig
from polygpt.model.attention import REGISTRY as ATTENTION
from polygpt.model.block import REGISTRY as BLOCK
from polygpt.model.feedforward import ACTIVATIONS, MoEConfig
from polygpt.model.feedforward import REGISTRY as FEEDFORWARD
from polygpt.model.norms import REGISTRY as NORM
from polygpt.model.positions import REGISTRY as POSITION
from polygpt.model.rope import SCALINGS
from polygpt.presets import PRESETS, preset_fields

LENGTH, VOCAB = 24, 37
CLAIM_ORDERS = get_args(MoEConfig.model_fields["claim_order"].annotation)

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "context_length": LENGTH,
    "embed_dim": 16,
    "num_layers": 1,
    "position": {"kind": "rope"},
    "norm": {"kind": "rmsnorm"},
    "attention": {"kind": "softmax", "num_heads": 4, "num_kv_heads": 2},
    "feedforward": {"kind": "mlp", "mlp_dim": 12},
}
# Documents packed into rows. A document is a run of equal ids; another may have the same.
DISTINCT, REPEATED = "distinct", "repeated"
DOCUMENTS = {
    DISTINCT: np.array([[0] * 5 + [4] * 9 + [2] * 10, [1] * 14 + [2] * 3 + [3] * 7], np.int32),
    REPEATED: np.array([[4] * 5 + [0] * 9 + [4] * 10, [1] * 14 + [2] * 3 + [1] * 7], np.int32),
}

HEADS = {"num_heads": 4, "num_kv_heads": 2}
LOCAL = {"kind": "local", **HEADS, "window": 5}
LINEAR = {"kind": "linear", **HEADS}
ATTENTIONS = {"softmax": {"kind": "softmax", **HEADS}, "local": LOCAL, "linear": LINEAR}
GLU = {"kind": "glu", "mlp_dim": 12}
# 24 tokens with two choices each among four experts claim 12 slots an expert on average, and find 7.
MOE = {"kind": "moe", "mlp_dim": 8, "num_experts": 4, "capacity_factor": 0.6, "load_balance_loss": 0.3, "z_loss": 0.2}
SOFT = {"kind": "soft_moe", "mlp_dim": 8, "num_experts": 3, "slots_per_expert": 2}
BLOCKWISE = {**SOFT, "kind": "causal_soft_moe", "block_size": 5}
FEEDFORWARDS = {"mlp": BASE["feedforward"], "glu": GLU, "moe": MOE, "soft_moe": SOFT, "causal_soft_moe": BLOCKWISE}
SCALED = {
    "linear": {"factor": 3.0},
    "ntk": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_context_length": 256, "beta_fast": 8.0},
    "llama3": {"factor": 8.0, "original_context_length": 64},
}


class Case(NamedTuple):
    """A tiny model, as its difference from `BASE`, and the form in which it is compared."""

    changes: dict[str, Any]
    training: bool = False
    packed: str | None = None


def attending(part: dict[str, Any] = BASE["attention"], position: str = "none", **changes: Any) -> Case:
    return Case({"attention": {**part, **changes}, "position": position})


def feeding(part: dict[str, Any], training: bool = False, **changes: Any) -> Case:
    return Case({"feedforward": {**part, **changes}, "position": "none"}, training)


def scaled(kind: str, **changes: Any) -> Case:
    scaling = {"kind": kind, **SCALED.get(kind, {}), **changes}
    return Case({"position": {"kind": "rope", "scaling": scaling}, "attention": {"head_dim": 16}})


CASES: dict[str, Case] = {
    # Every entry of every registry, as it comes.
    **{f"attention-{kind}": attending(ATTENTIONS[kind], "rope") for kind in ATTENTION},
    **{f"position-{kind}": Case({"position": {"kind": kind}}) for kind in POSITION},
    **{f"scaling-{kind}": scaled(kind) for kind in SCALINGS},
    **{f"norm-{kind}": Case({"norm": {"kind": kind}}) for kind in NORM},
    **{f"block-{kind}": Case({"block": {"kind": kind}}) for kind in BLOCK},
    **{f"feedforward-{kind}": feeding(FEEDFORWARDS[kind]) for kind in FEEDFORWARD},
    **{f"mlp-{name}": feeding({"activation": name}) for name in ACTIVATIONS},
    **{f"glu-{name}": feeding(GLU, activation=name, bias=True) for name in ("relu2", "sigmoid")},
    **{f"moe-claims-by-{order}": feeding(MOE, True, claim_order=order) for order in CLAIM_ORDERS},
    # Softmax attention.
    "multi-head": attending(num_kv_heads=None),
    "multi-query-with-biases": attending(num_kv_heads=1, bias=True),
    "biases-of-qkv": attending(bias="qkv"),
    "wide-heads-scaled": attending(head_dim=6, scale=0.7),
    "window": attending(window=5),
    "window-of-one": attending(window=1),
    "window-beyond-the-context": attending(window=99),
    "qk-norm": attending(position="rope", qk_norm=True, qk_norm_eps=1e-2),
    "softcap": attending(softcap=1.5),
    "sinks": attending(sinks=True),
    "sinks-in-a-window": attending(LOCAL, window=3, sinks=True),
    "alibi-capped-in-a-window": Case({"position": "alibi", "attention": {"softcap": 2.0, "window": 7}}),
    "alibi-with-six-heads": Case({"position": "alibi", "attention": {"num_heads": 6, "head_dim": 4}}),
    "all-of-softmax": attending(
        LOCAL, "rope", window=9, qk_norm=True, softcap=3.0, sinks=True, bias=True, scale=0.4, num_kv_heads=1
    ),
    # Linear attention.
    "linear-multi-query": attending(LINEAR, "rope", num_kv_heads=1, bias=True),
    "linear-decay": attending(LINEAR, "rope", decay=True, chunk=5),
    "linear-chunks-without-rope": attending(LINEAR, chunk=7),
    "linear-eps": attending(LINEAR, eps=0.1, num_kv_heads=None, chunk=LENGTH),
    # Rotary position.
    "rope-fraction": Case({"position": {"fraction": 0.5, "theta": 100.0}, "attention": {"head_dim": 12}}),
    "rope-fraction-rounded-down": Case({"position": {"fraction": 0.7}, "attention": {"head_dim": 6}}),
    "yarn-attention-factor": scaled("yarn", attention_factor=1.3),
    "yarn-linear-attention": Case({**scaled("yarn").changes, "attention": {**LINEAR, "head_dim": 16, "decay": True}}),
    "rope-fraction-scaled": Case(
        {"position": {"fraction": 0.5, "scaling": {"kind": "ntk", "factor": 2.0}}, "attention": {"head_dim": 12}}
    ),
    # Mixtures of experts: who is served, which mixes tokens.
    "moe-top-one": feeding(MOE, True, top_k=1, capacity_factor=0.7),
    "moe-every-expert": feeding(MOE, True, top_k=4, claim_order="token", capacity_factor=0.5),
    "moe-dropless": feeding(MOE, True, dispatch="dropless", bias=True),
    "moe-with-documents": feeding(MOE, True, capacity_factor=0.7)._replace(packed=DISTINCT),
    "soft-moe-in-training": feeding(SOFT, True),
    "soft-moe-blockwise-in-training": feeding(BLOCKWISE, True),
    "soft-moe-blocks-of-one": feeding(BLOCKWISE, block_size=1),
    "soft-moe-two-blocks": feeding(BLOCKWISE, block_size=LENGTH - 4),
    # What the experts do for a token.
    "experts-plain": feeding(MOE, True, gated=False, bias=True, activation="gelu"),
    "experts-normalized": feeding(MOE, True, normalize_weights=True, top_k=3, capacity_factor=0.7),
    "experts-normalized-by-weight": feeding(
        MOE, True, normalize_weights=True, claim_order="weight", capacity_factor=0.6
    ),
    "experts-evaluated": feeding(MOE, top_k=3, normalize_weights=True, bias=True, capacity_factor=0.3),
    "experts-shared": feeding(MOE, True, shared_experts=2, bias=True, capacity_factor=0.8),
    "experts-shared-plain": feeding(MOE, shared_experts=1, gated=False),
    "experts-balanced-by-weight": feeding(MOE, True, balance_rate=0.1, claim_order="weight", capacity_factor=0.3),
    "experts-balanced-evaluated": feeding(MOE, balance_rate=0.1, normalize_weights=True),
    "experts-soft": feeding(SOFT, True, bias=True),
    "experts-soft-plain": feeding(SOFT, gated=False, bias=True),
    "experts-soft-blockwise": feeding(BLOCKWISE, True, bias=True),
    # The whole.
    "layernorm-without-bias": Case({"norm": {"kind": "layernorm", "bias": False}}),
    "no-final-norm": Case({"final_norm": False, "head": "untied"}),
    "embedding-scaled-by-sqrt": Case({"embed_scale": "sqrt", "position": "learned"}),
    "embedding-scaled": Case({"embed_scale": 2.5, "position": "sinusoidal", "logit_softcap": 4.0}),
    "rmsnorm-unit-offset": Case({"norm": {"kind": "rmsnorm", "unit_offset": True}}),
    "logits-capped-untied": Case({"logit_softcap": 2.0, "head": "untied"}),
    "pattern-with-a-rest": Case(
        {
            "num_layers": 4,
            "pattern": [
                {"attention": LOCAL, "norm": "layernorm", "feedforward": MOE},
                {"attention": {**LINEAR, "num_heads": 2}, "feedforward": {"mlp_dim": 8}},
                {"block": "parallel", "feedforward": SOFT},
            ],
        },
        training=True,
    ),
    "scanned": Case({"scan_layers": True, "num_layers": 3, "feedforward": MOE}, training=True),
    # Packed documents.
    "documents": Case({"position": "learned"}, packed=DISTINCT),
    "documents-training": Case({}, True, DISTINCT),
    "documents-window": Case({"attention": {"window": 6, "sinks": True}, "position": "alibi"}, packed=DISTINCT),
    "documents-linear": Case({"attention": {**LINEAR, "chunk": 4}}, packed=DISTINCT),
    "documents-linear-decay": Case({"attention": {**LINEAR, "decay": True}}, packed=DISTINCT),
    "documents-soft-moe": Case({"feedforward": SOFT}, packed=DISTINCT),
    "documents-blockwise": Case({"feedforward": BLOCKWISE}, packed=DISTINCT),
    "documents-repeated": Case({}, packed=REPEATED),
    "documents-repeated-linear": Case({"attention": {**LINEAR, "decay": True}}, packed=REPEATED),
    "documents-repeated-blockwise": Case({"feedforward": BLOCKWISE}, packed=REPEATED),
    "documents-blockwise-training": Case({"feedforward": BLOCKWISE}, True, DISTINCT),
}


def shrunk(name: str, **others: Any) -> dict[str, Any]:
    """A preset's fields with sizes made tiny and nothing random; some are then the same. `others` take their place."""
    sizes = {"vocab_size": VOCAB, "context_length": LENGTH, "mlp_dim": 12, "num_experts": 4, "slots_per_expert": 2}
    sizes |= {"compute_dtype": "float32", "param_dtype": "float32", "block_size": 5, "window": 5, "head_dim": 4}
    sizes |= {"dropout": 0.0, "embed_dropout": 0.0, "init": "normal"} | others

    def small(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [small(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        fields = {key: sizes[key] if key in sizes and field else small(field) for key, field in value.items()}
        if fields.get("num_heads") and fields.get("num_kv_heads"):
            shared = math.gcd(fields["num_heads"], fields["num_kv_heads"])
            fields |= {key: fields[key] // shared for key in ("num_heads", "num_kv_heads")}
        elif fields.get("num_heads"):
            fields["num_heads"] = 3
        return fields

    fields = {"vocab_size": sizes["vocab_size"]} | small(preset_fields(name))
    fields["num_layers"] = min(fields["num_layers"], len(fields.get("pattern", [{}])))
    return fields if fields["embed_dim"] is None else fields | {"embed_dim": 24}


def lively(model: Model, seed: int = 0) -> dict[str, Any]:
    """Parameters in which every gain, bias and table matters; drawn by NumPy, which has nothing to compile."""
    random = np.random.default_rng(seed)

    def draw(info: Any) -> jax.Array:
        centre = 1.0 if info.inputs is None else 0.0  # gains, and with them biases
        return jnp.asarray(centre + 0.3 * random.standard_normal(info.shape), info.dtype)

    return jax.tree.map(draw, model.parameters)


def config_of(case: Case) -> ModelConfig:
    """The configuration of a case."""
    return validate(ModelConfig, merge(BASE, case.changes))


# Left out of what is asked of models in which tokens meet: what is done to a token alone (activations, norms, what an
# expert does), angles, and documents.
ALONE = ("mlp-", "glu-", "experts-", "norm-", "layernorm-", "rmsnorm-", "embedding-", "scaling-", "documents")
MIXING = [name for name in CASES if not name.startswith(ALONE)]
# What evaluation and generation do not look at, in a mixture of experts.
OF_TRAINING = {"dispatch", "capacity_factor", "claim_order", "load_balance_loss", "z_loss", "router_noise"}


def each_once(models: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
    """Each of `models` under the first of its names."""
    names: dict[ModelConfig, str] = {}
    for name, config in models.items():
        names.setdefault(config, name)
    return {name: config for config, name in names.items()}


def evaluated() -> dict[str, ModelConfig]:
    """The models of `MIXING` and the presets made small, as they are in evaluation, each once."""
    found = {}
    for name in MIXING:
        changes = CASES[name].changes
        part = changes.get("feedforward", {})
        feedforward = {key: part[key] for key in part if key not in OF_TRAINING}
        found[name] = config_of(Case(changes | {"feedforward": feedforward}))
    return each_once(found | {f"preset-{name}": validate(ModelConfig, shrunk(name)) for name in PRESETS})
