"""The decoder as a whole: compilation forms, precision, initialisation, counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt.errors import RequestError
from polygpt.model import Model, model_of


def test_scanned_and_unrolled_layers_agree_to_the_gradient(tiny_config, lively, tokens):
    changes = {"num_layers": 5, "pattern": [{"attention": {"num_heads": 2}}, {"feedforward": {"mlp_dim": 8}}]}
    unrolled, scanned = (Model(tiny_config(scan_layers=scan, **changes)) for scan in (False, True))
    params = lively(unrolled)
    grads = [jax.jit(jax.grad(lambda p, m=m: m.nll(p, tokens, tokens).mean()))(params) for m in (unrolled, scanned)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *grads)


def test_bfloat16_computes_close_to_float32_and_scores_in_float32(tiny_config, tokens):
    low, full = (Model(tiny_config(compute_dtype=dtype)) for dtype in ("bfloat16", "float32"))
    params = full.init(0)
    assert jax.eval_shape(low.hidden, params, tokens).hidden.dtype == jnp.bfloat16
    logits = jax.jit(low.logits)(params, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, jax.jit(full.logits)(params, tokens), atol=0.02)


def test_rope_angles_stay_exact_far_out(tiny_config, tokens):
    """In bfloat16 positions past 256 would collapse: neighbouring far positions must still differ."""
    model = Model(tiny_config(compute_dtype="bfloat16", context_length=4096))
    module = model.module(model.init(0))
    rotation = module.position.rotations(jnp.asarray([[4000, 4001]]), [8])[8]
    assert rotation.cos.dtype == jnp.float32
    np.testing.assert_allclose(rotation.cos[0, :, 0], np.cos([4000.0, 4001.0]), atol=1e-3)


def test_parameters_are_stored_in_their_own_dtype(tiny_config):
    model = Model(tiny_config(param_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(model.init(0))} == {jnp.dtype(jnp.bfloat16)}


def test_gpt2_initialisation_has_its_deviations(tiny_config):
    config = tiny_config(embed_dim=128, vocab_size=512, num_layers=8, feedforward={"mlp_dim": 256}, norm="layernorm")
    params = Model(config).init(0)
    block = params["blocks"][0]
    assert np.std(params["embedding"]) == pytest.approx(0.02, rel=0.02)
    assert np.std(block["attention"]["query"]) == pytest.approx(0.02, rel=0.02)
    residual = 0.02 / math.sqrt(2 * 8)
    assert np.std(block["attention"]["out"]) == pytest.approx(residual, rel=0.02)
    assert np.std(block["feedforward"]["down"]) == pytest.approx(residual, rel=0.02)
    assert (np.asarray(block["attention_norm"]["gain"]) == 1).all()
    assert (np.asarray(block["attention_norm"]["bias"]) == 0).all()
    layers = np.asarray(block["attention"]["query"])
    assert np.abs(np.corrcoef(layers[0].ravel(), layers[1].ravel())[0, 1]) < 0.05, "layers drawn alike"


def test_fan_in_initialisation_is_truncated_and_scaled(tiny_config):
    config = tiny_config(embed_dim=64, num_layers=8, init="fan_in", feedforward={"mlp_dim": 256})
    down = np.asarray(Model(config).init(0)["blocks"][0]["feedforward"]["down"])
    assert np.std(down) == pytest.approx(1 / 16, rel=0.02)  # 1/sqrt(256)
    assert np.abs(down).max() <= 2 / 0.87962566 / 16 + 1e-6


def test_dropout_drops_in_training_only_and_by_key(tiny_config, tokens):
    model = Model(tiny_config(dropout=0.2, embed_dropout=0.1, attention={"dropout": 0.3}))
    params = model.init(0)
    loss = jax.jit(lambda key: model.loss(params, tokens, tokens, jnp.ones((2, 24)), key)[0])
    plain, without = (jax.jit(m.nll)(params, tokens, tokens).sum() for m in (model, Model(tiny_config())))
    first, again, other = (float(loss(jax.random.key(seed))) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert abs(first - plain) > 1e-3
    assert float(plain) == pytest.approx(float(without), rel=1e-6)


def test_dropout_keeps_the_mean():
    from polygpt.model import dropout

    dropped = dropout(jnp.ones((200, 200)), 0.25, jax.random.key(0))
    assert float((dropped == 0).mean()) == pytest.approx(0.25, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)


def test_parameter_facts_are_those_of_the_parameters(tiny_config):
    model = Model(tiny_config(head="untied", attention={"bias": True}))
    params, facts = model.init(0), model.parameters
    described = jax.tree.map(lambda info: (info.shape, info.dtype), facts)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == described
    assert model.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert all(len(info.axes) == len(info.shape) for info in jax.tree.leaves(facts))
    assert facts["blocks"][0]["attention"]["query"].axes == ("layers", "embed", "heads", "head_dim")
    assert facts["blocks"][0]["attention"]["query_bias"].inputs is None  # not a matrix, though it has two axes


def test_costs_of_a_model_counted_by_hand(tiny_config):
    # D 16, N 4, K 2, H 4, F 24, V 37, T 24, L 2
    model = Model(tiny_config())
    weights = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24) + 16 * 37
    mixing = 2 * 2 * 2 * 4 * 4 * 24  # layers x (scores, values) x 2 x N x H x T
    assert model.flops_per_token == 3 * (2 * weights + mixing)
    assert model.state_bytes_per_token == 2 * 2 * 2 * 4 * 4  # layers x (k, v) x K x H x float32


def test_an_open_vocabulary_is_refused_by_name(tiny_config):
    with pytest.raises(RequestError, match="vocab_size"):
        Model(tiny_config(vocab_size=None))


def test_compile_text_of_a_scanned_model_does_not_grow_with_depth(tiny_config, tokens):
    def length(layers):
        model = Model(tiny_config(num_layers=layers, scan_layers=True))
        return len(jax.jit(model.logits).lower(model.init(0), tokens).as_text())

    assert length(12) < 1.05 * length(3)


def test_initial_values_depend_on_seed_path_and_shape_alone(tiny_config):
    plain = Model(tiny_config(num_layers=2)).init(0)
    changed = Model(
        tiny_config(num_layers=2, position="learned", head="untied", feedforward={"kind": "glu", "mlp_dim": 20})
    ).init(0)
    attention, other = plain["blocks"][0]["attention"], changed["blocks"][0]["attention"]
    jax.tree.map(np.testing.assert_array_equal, attention, other)
    np.testing.assert_array_equal(plain["embedding"], changed["embedding"])
    assert not np.array_equal(
        attention["query"], Model(tiny_config(num_layers=2)).init(1)["blocks"][0]["attention"]["query"]
    )
    # A table that grows keeps the rows it had, and no two parameters are drawn alike.
    grown = Model(tiny_config(vocab_size=60)).init(0)["embedding"]
    np.testing.assert_array_equal(grown[:37], plain["embedding"])
    assert np.abs(np.corrcoef(attention["key"].ravel(), attention["value"].ravel())[0, 1]) < 0.2


def test_a_model_is_made_once_for_equal_configurations(tiny_config):
    assert model_of(tiny_config()) is model_of(tiny_config())
    assert model_of(tiny_config()) is not model_of(tiny_config(num_layers=3))


def test_the_architecture_leaves_out_how_a_model_is_run_and_trained(tiny_config):
    moe = {"kind": "moe", "mlp_dim": 8, "num_experts": 4}
    plain = tiny_config(feedforward=moe)
    run_otherwise = tiny_config(
        scan_layers=True,
        dropout=0.5,
        attention={"implementation": "xla", "dropout": 0.1},
        feedforward={**moe, "z_loss": 0.5, "router_noise": 0.1, "dispatch": "dropless"},
    )
    assert run_otherwise != plain
    assert run_otherwise.architecture() == plain.architecture()
    for change in ({"attention": {"window": 5}}, {"feedforward": {**moe, "top_k": 1}}, {"norm": {"eps": 1e-3}}):
        assert tiny_config(**{"feedforward": moe, **change}).architecture() != plain.architecture()
