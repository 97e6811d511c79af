"""The intermediates that a call gives back on demand, against those of the specification."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from polygpt import spec
from polygpt.model import Model

NAMES = ("residual", "attention", "experts")
CASES = [
    *(f"attention-{kind}" for kind in zoo.ATTENTION),
    *(f"feedforward-{kind}" for kind in ("moe", "soft_moe", "causal_soft_moe")),
    "alibi-capped-in-a-window",
    "all-of-softmax",
    "linear-decay",
    "experts-balanced-evaluated",
    "pattern-with-a-rest",
    "documents-linear-decay",
    "documents-window",
]


def itself(value):
    return value


class Spied:
    """What the specification computes on its way: weights of attention, shares of experts."""

    def __init__(self, monkeypatch):
        self.attention, self.experts = [], []
        for kind, weights_of in list(spec.ATTENTION.items()):
            monkeypatch.setitem(spec.ATTENTION, kind, self.spy(weights_of))
        for name in ("moe", "soft_moe"):
            module = sys.modules[f"polygpt.spec.{name}"]
            monkeypatch.setattr(module, "contract", self.contract(module.contract))

    def spy(self, weights_of):
        def spied(*arguments):
            weights = weights_of(*arguments)
            self.attention.append(np.asarray(weights.unwrap("batch", "heads", "sequence", "key_sequence")))
            return weights

        return spied

    def contract(self, original):
        def spied(a, b, *names):
            if names in {("expert",), ("expert", "slot")}:  # the mixture: shares times what the experts give
                shares = np.asarray(a.unwrap("batch", "sequence", *names))
                self.experts.append(shares.reshape(*shares.shape[:3], -1).sum(-1))
            return original(a, b, *names)

        return spied


@pytest.mark.parametrize("name", CASES)
def test_attention_and_experts_are_those_of_the_specification(name, monkeypatch):
    case = zoo.CASES[name]
    model = Model(zoo.config_of(case))
    params = zoo.lively(model)
    tokens = jnp.asarray(np.random.default_rng(7).integers(0, zoo.VOCAB, (2, zoo.LENGTH), np.int32))
    segment_ids = None if case.packed is None else jnp.asarray(zoo.DOCUMENTS[case.packed])
    captured = jax.jit(
        lambda params: model.hidden(params, tokens, segment_ids=segment_ids, capture=dict.fromkeys(NAMES, itself))
    )(params).captured
    assert len(captured) == model.config.num_layers
    spied = Spied(monkeypatch)
    axes = jax.tree.map(lambda info: info.axes, model.parameters)
    spec.decoder(model.config, spec.name_parameters(params, axes), tokens, segment_ids=segment_ids)
    found = [layer["attention"] for layer in captured]
    for mine, expected in zip(found, spied.attention, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=2e-6 * max(np.abs(expected).max(), 1))
    kinds = [layer.attention for layer in model.config.layers]
    for weights, kind in zip(found, kinds, strict=True):
        if kind.kind != "linear" and not kind.sinks:
            np.testing.assert_allclose(np.asarray(weights).sum(-1), 1, atol=1e-5)
    shares = [layer["experts"] for layer in captured if "experts" in layer]
    for mine, expected in zip(shares, spied.experts, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_the_residual_of_a_layer_is_the_output_of_the_model_that_ends_there(scan):
    changes = {"num_layers": 3, "final_norm": False, "scan_layers": scan}
    model = Model(zoo.config_of(zoo.Case(changes)))
    params = zoo.lively(model)
    tokens = jnp.arange(2 * zoo.LENGTH, dtype=jnp.int32).reshape(2, -1) % zoo.VOCAB
    output = model.hidden(params, tokens, capture={"residual": itself})
    np.testing.assert_array_equal(output.captured[-1]["residual"], output.hidden)
    for layers in (1, 2):
        shorter = Model(zoo.config_of(zoo.Case(changes | {"num_layers": layers})))
        first = params | {"blocks": jax.tree.map(lambda leaf, n=layers: leaf[:n], params["blocks"])}
        found = output.captured[layers - 1]["residual"]
        np.testing.assert_allclose(found, shorter.hidden(first, tokens).hidden, rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for_is_captured_and_a_function_is_applied_to_it():
    model = Model(zoo.config_of(zoo.Case({"num_layers": 2})))
    params, tokens = zoo.lively(model), jnp.zeros((1, 4), jnp.int32)
    assert model.hidden(params, tokens).captured == ()
    captured = model.hidden(params, tokens, capture={"attention": lambda weights: weights[..., -1, :].sum(-1)}).captured
    assert [set(layer) for layer in captured] == [{"attention"}] * 2
    np.testing.assert_allclose(captured[1]["attention"], np.ones((1, 4)), rtol=1e-6)


def test_nothing_asked_for_costs_nothing():
    model = Model(zoo.config_of(zoo.Case({"num_layers": 2, "feedforward": zoo.MOE})))
    params, tokens = zoo.lively(model), jnp.zeros((1, 4), jnp.int32)
    plain = jax.make_jaxpr(lambda params: model.hidden(params, tokens).hidden)(params)
    empty = jax.make_jaxpr(lambda params: model.hidden(params, tokens, capture={}).hidden)(params)
    asked = jax.make_jaxpr(lambda params: model.hidden(params, tokens, capture={"attention": itself}).hidden)(params)
    assert str(plain) == str(empty) != str(asked)


def test_a_prompt_that_is_read_into_a_state_gives_the_same():
    model = Model(zoo.config_of(zoo.Case({"num_layers": 2})))
    params, tokens = zoo.lively(model), jnp.arange(8, dtype=jnp.int32)[None]
    capture = {"attention": itself}
    expected = model.hidden(params, tokens, capture=capture).captured
    found = model.hidden(params, tokens, state=model.init_state(1, 12), fresh=True, capture=capture).captured
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine["attention"], other["attention"], atol=1e-6)
