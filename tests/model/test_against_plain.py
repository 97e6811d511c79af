"""Every menu entry against the plain form: logits and every parameter's gradient."""

import jax
import numpy as np
import plain_decoder as plain
import pytest

from polygpt.model import Model
from polygpt.model.attention import MENU as ATTENTION
from polygpt.model.feedforward import ACTIVATIONS
from polygpt.model.feedforward import MENU as FEEDFORWARD
from polygpt.model.norms import MENU as NORMS
from polygpt.model.positions import MENU as POSITIONS

CASES = {
    **{f"position-{kind}": {"position": {"kind": kind}} for kind in POSITIONS},
    **{f"norm-{kind}": {"norm": {"kind": kind}} for kind in NORMS},
    **{f"feedforward-{kind}": {"feedforward": {"kind": kind, "mlp_dim": 24}} for kind in FEEDFORWARD},
    **{f"mlp-{name}": {"feedforward": {"kind": "mlp", "mlp_dim": 24, "activation": name}} for name in ACTIVATIONS},
    **{f"glu-{name}": {"feedforward": {"activation": name, "bias": True}} for name in ACTIVATIONS},
    "layernorm-without-bias": {"norm": {"kind": "layernorm", "bias": False}},
    "multi-head": {"attention": {"num_kv_heads": None}},
    "multi-query-with-bias": {"attention": {"num_kv_heads": 1, "bias": True}},
    "wide-heads": {"attention": {"head_dim": 6}},
    "untied": {"head": "untied"},
    "bigram": {"num_layers": 0, "embed_dim": 37, "head": "none", "norm": "none", "position": "none"},
    "pattern-with-a-rest": {"num_layers": 3, "pattern": [{"feedforward": {"kind": "mlp", "mlp_dim": 8}}, {}]},
    "pattern-scanned": {"num_layers": 5, "scan_layers": True, "pattern": [{"attention": {"num_heads": 2}}, {}]},
    "scanned": {"scan_layers": True},
}


def test_every_attention_kind_is_covered():
    assert {"softmax"} == set(ATTENTION)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_the_plain_form(name, tiny_config, lively, tokens):
    model = Model(tiny_config(**CASES[name]))
    params = lively(model)
    weights = np.random.default_rng(3).standard_normal((*tokens.shape, 37))

    def objective(params):
        logits = model.logits(params, tokens)
        return (logits * weights.astype(np.float32)).sum(), logits

    gradient, logits = jax.jit(jax.grad(objective, has_aux=True))(params)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = np.stack([plain.logits(model.config, exact, row) for row in np.asarray(tokens)])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    def along(path, direction, size):
        """The plain objective with one parameter moved by `size` along `direction`."""
        moved = jax.tree_util.tree_map_with_path(lambda p, leaf: leaf + size * direction if p == path else leaf, exact)
        rows = zip(np.asarray(tokens), weights, strict=True)
        return sum((plain.logits(model.config, moved, row) * weight).sum() for row, weight in rows)

    # Every parameter's gradient, by a central difference in float64 along a random direction.
    random = np.random.default_rng(0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        direction = random.standard_normal(leaf.shape)
        slope = (along(path, direction, 1e-7) - along(path, direction, -1e-7)) / 2e-7  # short: ReLU has kinks
        found = (np.asarray(leaf, np.float64) * direction).sum()
        scale = np.linalg.norm(leaf) * np.linalg.norm(direction) + 1e-6
        assert abs(found - slope) <= 3e-5 * scale, f"{jax.tree_util.keystr(path)}: {found} against {slope}"
