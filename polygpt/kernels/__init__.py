"""How products, attention, experts and the loss are computed on this or that device, and the forms weights are kept in.

Arrays in, arrays out: nothing here knows a model's configuration, and nothing outside asks which device it runs on.
"""

from polygpt.kernels.cache import KVCache
from polygpt.kernels.cache_blocks import cached_attention, prefers_cache
from polygpt.kernels.experts import (
    expert_matmul,
    first_own_expert,
    from_peers,
    mean_over_devices,
    send_back,
    send_to_experts,
    take_rows,
    to_peers,
)
from polygpt.kernels.head_shards import sharded_over_heads
from polygpt.kernels.loss import LogitRule, nll_of_logits, token_nll, weighted_nll
from polygpt.kernels.native import unavailable as native_unavailable
from polygpt.kernels.packing import (
    ALIGNMENT,
    QUANTIZED,
    WEIGHT_TYPES,
    WeightType,
    check_weight_type,
    pack,
    pack_rows,
)
from polygpt.kernels.regularization import dropout
from polygpt.kernels.rounding import in_float32
from polygpt.kernels.scores import ScoreInputs, ScoreRule
from polygpt.kernels.softmax_attention import (
    AttentionSpec,
    Implementation,
    attention,
    attention_weights,
    choose_attention,
    reference_attention,
)
from polygpt.kernels.stacks import in_stack, layer_view, max_unrolled_layers, write_back
from polygpt.kernels.weights import Weight, matmuls, project_to_vocabulary

__all__ = [
    "ALIGNMENT",
    "QUANTIZED",
    "WEIGHT_TYPES",
    "AttentionSpec",
    "Implementation",
    "KVCache",
    "LogitRule",
    "ScoreInputs",
    "ScoreRule",
    "Weight",
    "WeightType",
    "attention",
    "attention_weights",
    "cached_attention",
    "check_weight_type",
    "choose_attention",
    "dropout",
    "expert_matmul",
    "first_own_expert",
    "from_peers",
    "in_float32",
    "in_stack",
    "layer_view",
    "matmuls",
    "max_unrolled_layers",
    "mean_over_devices",
    "native_unavailable",
    "nll_of_logits",
    "pack",
    "pack_rows",
    "prefers_cache",
    "project_to_vocabulary",
    "reference_attention",
    "send_back",
    "send_to_experts",
    "sharded_over_heads",
    "take_rows",
    "to_peers",
    "token_nll",
    "weighted_nll",
    "write_back",
]
