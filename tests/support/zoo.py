"""Tiny models of every entry of every menu and of every option that changes what a model computes.

Shared by the tests of parity with the specification, of causality and of decoding, so that a new entry meets all three.
"""

import math
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.config import merge, validate
from polygpt.model import Model, ModelConfig
from polygpt.model.attention import MENU as ATTENTION
from polygpt.model.block import MENU as BLOCK
from polygpt.model.feedforward import ACTIVATIONS, MoEConfig
from polygpt.model.feedforward import MENU as FEEDFORWARD
from polygpt.model.norms import MENU as NORM
from polygpt.model.positions import MENU as POSITION
from polygpt.model.rope import SCALINGS
from polygpt.presets import preset_fields

LENGTH, VOCAB = 24, 37
CLAIM_ORDERS = get_args(MoEConfig.model_fields["claim_order"].annotation)
# Models this small take a hundred times longer to optimise than to run.
COMPILER = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}

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
DOCUMENTS = np.array([[0] * 5 + [4] * 9 + [2] * 10, [1] * 14 + [2] * 3 + [3] * 7], np.int32)

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
    documents: np.ndarray | None = None


def attending(part: dict[str, Any] = BASE["attention"], **changes: Any) -> Case:
    return Case({"attention": {**part, **changes}})


def feeding(part: dict[str, Any], training: bool = False, **changes: Any) -> Case:
    return Case({"feedforward": {**part, **changes}}, training)


def scaled(kind: str, **changes: Any) -> Case:
    scaling = {"kind": kind, **SCALED.get(kind, {}), **changes}
    return Case({"position": {"kind": "rope", "scaling": scaling}, "attention": {"head_dim": 16}})


CASES: dict[str, Case] = {
    # Every entry of every menu, as it comes.
    **{f"attention-{kind}": attending(ATTENTIONS[kind]) for kind in ATTENTION},
    **{f"position-{kind}": Case({"position": {"kind": kind}}) for kind in POSITION},
    **{f"scaling-{kind}": scaled(kind) for kind in SCALINGS},
    **{f"norm-{kind}": Case({"norm": {"kind": kind}}) for kind in NORM},
    **{f"block-{kind}": Case({"block": {"kind": kind}, "num_layers": 2}) for kind in BLOCK},
    **{f"feedforward-{kind}": feeding(FEEDFORWARDS[kind]) for kind in FEEDFORWARD},
    **{f"mlp-{name}": feeding({"activation": name}) for name in ACTIVATIONS},
    **{f"glu-{name}": feeding(GLU, activation=name, bias=True) for name in ACTIVATIONS},
    **{f"moe-claims-by-{order}": feeding(MOE, True, claim_order=order) for order in CLAIM_ORDERS},
    # Softmax attention.
    "multi-head": attending(num_kv_heads=None),
    "multi-query-with-biases": attending(num_kv_heads=1, bias=True),
    "wide-heads-scaled": attending(head_dim=6, scale=0.7),
    "window": attending(window=5),
    "window-of-one": attending(window=1),
    "window-beyond-the-context": attending(window=99),
    "qk-norm": attending(qk_norm=True, qk_norm_eps=1e-2),
    "softcap": attending(softcap=1.5),
    "sinks": attending(sinks=True),
    "sinks-in-a-window": attending(LOCAL, window=3, sinks=True),
    "alibi-capped-in-a-window": Case({"position": "alibi", "attention": {"softcap": 2.0, "window": 7}}),
    "alibi-with-six-heads": Case({"position": "alibi", "attention": {"num_heads": 6, "head_dim": 4}}),
    "all-of-softmax": attending(
        LOCAL, window=9, qk_norm=True, softcap=3.0, sinks=True, bias=True, scale=0.4, num_kv_heads=1
    ),
    # Linear attention.
    "linear-multi-query": attending(LINEAR, num_kv_heads=1, bias=True),
    "linear-decay": attending(LINEAR, decay=True, chunk=5),
    "linear-chunks-without-rope": Case({"position": "none", "attention": {**LINEAR, "chunk": 7}}),
    "linear-eps": attending(LINEAR, eps=0.1, num_kv_heads=None, chunk=LENGTH),
    # Rotary position.
    "rope-fraction": Case({"position": {"fraction": 0.5, "theta": 100.0}, "attention": {"head_dim": 12}}),
    "rope-fraction-rounded-down": Case({"position": {"fraction": 0.7}, "attention": {"head_dim": 6}}),
    "yarn-attention-factor": scaled("yarn", attention_factor=1.3),
    "yarn-linear-attention": Case({**scaled("yarn").changes, "attention": {**LINEAR, "head_dim": 16, "decay": True}}),
    "rope-fraction-scaled": Case(
        {"position": {"fraction": 0.5, "scaling": {"kind": "ntk", "factor": 2.0}}, "attention": {"head_dim": 12}}
    ),
    # Mixtures of experts.
    "moe-top-one": feeding(MOE, True, top_k=1, capacity_factor=0.7),
    "moe-plain-experts": feeding(MOE, True, gated=False, bias=True, activation="gelu"),
    "moe-normalized": feeding(MOE, True, normalize_weights=True, top_k=3, capacity_factor=0.7),
    "moe-normalized-by-weight": feeding(MOE, True, normalize_weights=True, claim_order="weight", capacity_factor=0.6),
    "moe-dropless": feeding(MOE, True, dispatch="dropless", bias=True),
    "moe-evaluated": feeding(MOE, top_k=3, normalize_weights=True, bias=True, capacity_factor=0.3),
    "moe-shared": feeding(MOE, True, shared_experts=2, bias=True, capacity_factor=0.8),
    "moe-shared-plain": feeding(MOE, shared_experts=1, gated=False),
    "moe-balance": feeding(MOE, True, balance_rate=0.1, capacity_factor=0.9),
    "moe-balance-by-weight": feeding(MOE, True, balance_rate=0.1, claim_order="weight", capacity_factor=0.6),
    "moe-balance-evaluated": feeding(MOE, balance_rate=0.1, normalize_weights=True),
    "moe-every-expert": feeding(MOE, True, top_k=4, claim_order="token", capacity_factor=0.5),
    "moe-with-documents": feeding(MOE, True, capacity_factor=0.7)._replace(documents=DOCUMENTS),
    "moe-losses-over-layers": Case(
        {"num_layers": 3, "pattern": [{"feedforward": {**MOE, "shared_experts": 1}}, {}]}, True
    ),
    "soft-moe-in-training": feeding(SOFT, True, bias=True),
    "soft-moe-plain": feeding(SOFT, gated=False, bias=True),
    "soft-moe-blockwise-in-training": feeding(BLOCKWISE, True, bias=True),
    "soft-moe-blocks-of-one": feeding(BLOCKWISE, block_size=1),
    "soft-moe-one-block": feeding(BLOCKWISE, block_size=LENGTH),
    # The whole.
    "layernorm-without-bias": Case({"norm": {"kind": "layernorm", "bias": False}}),
    "no-final-norm": Case({"final_norm": False, "head": "untied"}),
    "embedding-scaled-by-sqrt": Case({"embed_scale": "sqrt", "position": "learned"}),
    "embedding-scaled": Case({"embed_scale": 2.5, "position": "sinusoidal", "logit_softcap": 4.0}),
    "logits-capped-untied": Case({"logit_softcap": 2.0, "head": "untied"}),
    "pattern-with-a-rest": Case(
        {
            "num_layers": 5,
            "pattern": [
                {"attention": {"kind": "local", "num_heads": 2, "window": 4}, "norm": "layernorm"},
                {"attention": {"kind": "linear", "num_heads": 4, "decay": True}, "feedforward": {"mlp_dim": 8}},
                {"block": "parallel", "feedforward": SOFT},
            ],
        }
    ),
    "scanned": Case({"scan_layers": True, "num_layers": 5, "pattern": [{"feedforward": MOE}, {}]}, True),
    # Packed documents.
    "documents": Case({"position": "learned"}, documents=DOCUMENTS),
    "documents-training": Case({}, True, DOCUMENTS),
    "documents-window": Case({"attention": {"window": 6, "sinks": True}, "position": "alibi"}, documents=DOCUMENTS),
    "documents-linear": Case({"attention": {**LINEAR, "chunk": 4}}, documents=DOCUMENTS),
    "documents-linear-decay": Case({"attention": {**LINEAR, "decay": True}}, documents=DOCUMENTS),
    "documents-soft-moe": Case({"feedforward": SOFT}, documents=DOCUMENTS),
    "documents-blockwise": Case({"feedforward": BLOCKWISE}, documents=DOCUMENTS),
    "documents-blockwise-training": Case({"feedforward": BLOCKWISE}, True, DOCUMENTS),
}


def shrunk(name: str, **other_sizes: Any) -> dict[str, Any]:
    """A preset's fields with its sizes made tiny and everything in float32; `other_sizes` take the place of these."""
    sizes = {"vocab_size": VOCAB, "context_length": LENGTH, "mlp_dim": 12, "num_experts": 4, "slots_per_expert": 2}
    sizes |= {"compute_dtype": "float32", "param_dtype": "float32", "block_size": 5, "window": 5, "head_dim": 4}
    sizes |= other_sizes

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
    fields["num_layers"] = min(fields["num_layers"], len(fields.get("pattern", [{}])) + 1)
    return fields if fields["embed_dim"] is None else fields | {"embed_dim": 24}


def lively(model: Model) -> dict[str, Any]:
    """Parameters in which every gain, bias and table matters; drawn by NumPy, which has nothing to compile."""
    random = np.random.default_rng(0)

    def draw(info: Any) -> jax.Array:
        centre = 1.0 if info.inputs is None else 0.0  # gains, and with them biases
        return jnp.asarray(centre + 0.3 * random.standard_normal(info.shape), info.dtype)

    return jax.tree.map(draw, model.parameters)


def config_of(case: Case) -> ModelConfig:
    """The configuration of a case."""
    return validate(ModelConfig, merge(BASE, case.changes))
