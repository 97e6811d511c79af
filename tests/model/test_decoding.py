"""Prefill and decoding equal the full pass, over all registries, with prompts of unequal length in one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from polygpt.model import Model

LENGTH = zoo.LENGTH
PROMPTS = np.array([3, 14, 9])
PADDED = 16
MODELS = zoo.evaluated()


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode_equal_the_full_pass(name):
    model = Model(MODELS[name])
    params = zoo.lively(model)
    tokens = jnp.asarray(np.random.default_rng(7).integers(0, zoo.VOCAB, (3, LENGTH)))
    full = np.asarray(jax.jit(model.logits)(params, tokens))
    tolerance = 1e-4 * np.abs(full).max()
    real = jnp.arange(PADDED) < PROMPTS[:, None]
    rows = np.arange(3)

    @jax.jit
    def prefill(params, tokens, state):
        out = model.hidden(params, tokens, state=state, valid=real, fresh=True)
        return model.module(params).logits(out.hidden), out.state

    @jax.jit
    def decode(params, tokens, positions, state):
        out = model.hidden(params, tokens, positions=positions, state=state)
        return model.module(params).logits(out.hidden), out.state

    # Padding holds tokens of its own: were it to enter a state, the rest would differ.
    logits, state = prefill(params, np.where(real, tokens[:, :PADDED], 5), model.init_state(3, LENGTH))
    np.testing.assert_allclose(logits[real], full[:, :PADDED][real], rtol=0, atol=tolerance)
    for step in range(LENGTH - PROMPTS.max()):
        at = PROMPTS + step
        logits, state = decode(params, tokens[rows, at][:, None], at[:, None], state)
        np.testing.assert_allclose(logits[:, 0], full[rows, at], rtol=0, atol=tolerance, err_msg=f"step {step}")

    # Several tokens at once go on as well, from an empty state and from one that is not.
    state, found = model.init_state(3, LENGTH), []
    for start in range(0, LENGTH, LENGTH // 3):
        span = np.arange(start, start + LENGTH // 3)
        logits, state = decode(params, tokens[:, span], np.tile(span, (3, 1)), state)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, 1), full, rtol=0, atol=tolerance)

    # And so do chunks with padding, in which rows come to an end at different places.
    @jax.jit
    def append(params, tokens, starts, counts, state):
        index = jnp.arange(PADDED)
        where = {"positions": starts[:, None] + index, "valid": index < counts[:, None]}
        out = model.hidden(params, tokens, state=state, **where)
        return model.module(params).logits(out.hidden), out.state

    state, starts = model.init_state(3, LENGTH), np.zeros(3, int)
    for counts in PROMPTS, np.array([5, 1, 7]), np.array([1, 4, 2]):
        chunk = np.full((3, PADDED), 5)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            chunk[row, :count] = tokens[row, start : start + count]
        logits, state = append(params, chunk, starts, counts, state)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            np.testing.assert_allclose(
                logits[row, :count], full[row, start : start + count], rtol=0, atol=tolerance, err_msg=f"{start=}"
            )
        starts += counts


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 3},
        {"num_layers": 6, "pattern": [{"attention": {"kind": "local", "num_heads": 2, "window": 4}}, {}]},
        {"num_layers": 5, "pattern": [{}, {"feedforward": {"kind": "mlp", "mlp_dim": 8}}]},
        {"num_layers": 2},
        {"num_layers": 1},
    ],
)
def test_a_pass_for_the_state_alone_gives_the_same_state(changes):
    model = Model(zoo.config_of(zoo.Case({"scan_layers": True, **changes})))
    params = zoo.lively(model)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, zoo.VOCAB, (2, 12)))

    def after(for_state):
        @jax.jit
        def run(params, tokens, state):
            return model.hidden(params, tokens, state=state, for_state=for_state).state

        return run(params, tokens, model.init_state(2, LENGTH))

    jax.tree.map(np.testing.assert_array_equal, after(False), after(True))


@pytest.mark.parametrize("for_state", [True, False])
@pytest.mark.parametrize("changes", [{"num_layers": 10}, {"num_layers": 11, "pattern": [{}, {"norm": "layernorm"}]}])
def test_a_pass_with_a_state_copies_no_stack_of_weights(changes, for_state):
    model = Model(zoo.config_of(zoo.Case({"scan_layers": True, "embed_dim": 64, **changes})))
    params = zoo.lively(model)

    @jax.jit
    def run(params, tokens, state):
        return model.hidden(params, tokens, state=state, for_state=for_state).state

    compiled = run.lower(params, jnp.zeros((1, 4), jnp.int32), model.init_state(1, LENGTH)).compile()
    stacked = sum(leaf.nbytes for leaf in jax.tree.leaves(params["blocks"]))
    assert compiled.memory_analysis().temp_size_in_bytes < stacked / 2


@pytest.mark.parametrize("name", ["attention-local", "attention-linear", "feedforward-causal_soft_moe"])
def test_a_state_of_fixed_size_does_not_grow(name):
    changes = {**zoo.CASES[name].changes, "attention": zoo.CASES["attention-local"].changes["attention"]}
    if name != "feedforward-causal_soft_moe":
        changes = zoo.CASES[name].changes
    model = Model(zoo.config_of(zoo.Case(changes)))
    assert model.state_bytes(LENGTH) == model.state_bytes(LENGTH - 1) > 0
    assert model.state_bytes_per_token == 0


def test_grouped_queries_keep_a_third_of_the_cache():
    bytes_of = {
        heads: Model(
            zoo.config_of(zoo.Case({"embed_dim": 24, "attention": {"num_heads": 12, "num_kv_heads": heads}}))
        ).state_bytes_per_token
        for heads in (12, 4)
    }
    assert bytes_of[4] * 3 == bytes_of[12]


@pytest.mark.parametrize("window", [None, 5])
def test_padding_past_the_end_of_a_cache_changes_nothing(window):
    model = Model(zoo.config_of(zoo.Case({"attention": {"window": window}})))
    params = zoo.lively(model)
    tokens = jnp.asarray(np.random.default_rng(7).integers(0, zoo.VOCAB, (2, 16)))
    state = model.init_state(2, 16)
    expected = jax.jit(model.hidden)(params, tokens).hidden

    @jax.jit
    def go_on(span, positions, stop, state):
        out = model.hidden(params, span, positions=positions, valid=positions < stop, state=state)
        return out.hidden, out.state

    for start, stop, padding in ((0, 12, 0), (12, 15, 4), (15, 16, 2)):
        span = np.pad(tokens[:, start:stop], ((0, 0), (0, padding)))
        positions = np.broadcast_to(np.arange(start, stop + padding), span.shape)
        hidden, state = go_on(span, positions, stop, state)
        found = hidden[:, : stop - start]
        np.testing.assert_allclose(found, expected[:, start:stop], rtol=1e-4, atol=1e-4, err_msg=f"from {start}")


def test_segments_and_a_decoding_state_are_refused_together():
    model = Model(zoo.config_of(zoo.Case({})))
    tokens, documents = jnp.zeros((2, LENGTH), jnp.int32), jnp.asarray(zoo.DOCUMENTS[zoo.DISTINCT])
    with pytest.raises(ValueError, match="segment_ids"):
        model.hidden(zoo.lively(model), tokens, segment_ids=documents, state=model.init_state(2, LENGTH))


@pytest.mark.parametrize("name", zoo.MIXING)
def test_every_form_is_traced_in_bfloat16_with_float32_logits(name):
    """Loops and conditions need the same dtypes in and out, which float32 alone does not show."""
    model = Model(zoo.config_of(zoo.Case({**zoo.CASES[name].changes, "compute_dtype": "bfloat16"})))
    shaped = jax.ShapeDtypeStruct
    params = jax.tree.map(lambda info: shaped(info.shape, info.dtype), model.parameters)
    tokens, weights = (shaped((2, LENGTH), dtype) for dtype in (jnp.int32, jnp.float32))
    gradient, _ = jax.eval_shape(jax.grad(model.loss, has_aux=True), params, tokens, tokens, weights)
    assert described(gradient) == described(params)
    empty = jax.eval_shape(lambda: model.init_state(2, LENGTH))
    for fresh in (True, False):

        def run(params, tokens, state, fresh=fresh):
            out = model.hidden(params, tokens, state=state, fresh=fresh)
            return out.hidden, model.module(params).logits(out.hidden), out.state

        hidden, logits, state = jax.eval_shape(run, params, tokens, empty)
        assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
        assert described(state) == described(empty)


def described(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_states_of_16_bits_decode_close_to_float32(dtype):
    low, full = (Model(zoo.config_of(zoo.Case({"compute_dtype": name}))) for name in (dtype, "float32"))
    params = full.init(0)
    tokens = jnp.asarray(np.random.default_rng(7).integers(0, zoo.VOCAB, (2, LENGTH)))

    @jax.jit
    def decode(params, tokens):
        before = low.hidden(params, tokens[:, :-1], state=low.init_state(2, LENGTH), fresh=True)
        after = low.hidden(params, tokens[:, -1:], positions=jnp.full((2, 1), LENGTH - 1), state=before.state)
        hidden = jnp.concatenate([before.hidden, after.hidden], axis=1)
        return low.module(params).logits(hidden), after.state

    logits, state = decode(params, tokens)
    assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(state)} == {2}
    np.testing.assert_allclose(logits, jax.jit(full.logits)(params, tokens), atol=0.02)
