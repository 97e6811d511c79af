"""Learning rates and weight decay by name pattern, for every kind of optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.model import Model, ModelConfig
from polygpt.training import TrainingConfig
from polygpt.training.optimizers import OPTIMIZERS, GroupConfig, ParameterGroups, build_optimizer

FIELDS = {
    "vocab_size": 11,
    "context_length": 8,
    "embed_dim": 8,
    "num_layers": 2,
    "position": "learned",
    "norm": "layernorm",
    "attention": {"kind": "softmax", "num_heads": 2, "bias": True},
    "feedforward": {"kind": "moe", "mlp_dim": 12, "num_experts": 3, "top_k": 1, "balance_rate": 0.1},
}
# Enough of Adafactor's to factor these small matrices.
KINDS = {kind: {"min_dim_to_factor": 4} if kind == "adafactor" else {} for kind in OPTIMIZERS}


@pytest.fixture(scope="module")
def model():
    return Model(validate(ModelConfig, FIELDS))


def draw(model, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda info: jnp.asarray(random.standard_normal(info.shape), jnp.float32), model.parameters)


def named(tree):
    return {".".join(map(str, path)): np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}


def stepped(model, kind, groups=(), steps=3, **fields):
    """What `steps` updates change, by name, and the state after them."""
    config = OPTIMIZERS[kind](**KINDS[kind], **fields)
    optimizer = build_optimizer(config, model, lambda step: 0.01, [GroupConfig(**group) for group in groups])
    params = start = draw(model, 0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for seed in range(steps):
        change, state = update(draw(model, seed + 1), state, params)
        params = jax.tree.map(jnp.add, params, change)
    return {name: leaf - named(start)[name] for name, leaf in named(params).items()}, state


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_groups_learning_rate_multiplies_the_first_update(model, kind):
    plain, _ = stepped(model, kind, steps=1)
    halved, _ = stepped(model, kind, [{"match": "blocks.*.attention.*", "learning_rate": 0.5}], steps=1)
    for name, change in plain.items():
        factor = 0.5 if ".attention." in name else 1.0
        np.testing.assert_allclose(halved[name], factor * change, rtol=2e-4, atol=3e-7, err_msg=name)
    assert np.abs(plain["blocks.0.attention.query"]).max() > 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_frozen_parameter_stays_as_it_is_and_has_no_state(model, kind):
    groups = [{"match": "embedding", "learning_rate": 0.0}, {"match": "blocks.*.feedforward.*", "learning_rate": 0.0}]
    change, state = stepped(model, kind, groups)
    whole, state_of_all = stepped(model, kind)
    for name, values in change.items():
        if name == "embedding" or ".feedforward." in name:
            np.testing.assert_array_equal(values, 0, err_msg=name)
        else:
            np.testing.assert_allclose(values, whole[name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert len(jax.tree.leaves(state)) < len(jax.tree.leaves(state_of_all)) or kind == "sgd"
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not any("['embedding']" in name or "['feedforward']" in name for name in names)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_groups_weight_decay_takes_the_place_of_the_optimizers_on_vectors_too(model, kind):
    without, _ = stepped(model, kind, steps=1, weight_decay=0.0)
    groups = [{"match": "*.gain", "weight_decay": 3.0}, {"match": "*.attention.out", "weight_decay": 0.0}]
    changed, _ = stepped(model, kind, groups, steps=1, weight_decay=0.5)
    start, infos = named(draw(model, 0)), {".".join(map(str, p)): i for p, i in flatten_dict(model.parameters).items()}
    for name, change in without.items():
        info, rate = infos[name], 0.01
        decayed = info.inputs is not None
        if kind == "muon":
            decayed = bool(info.inputs) and info.axes[0] == "layers"
            rate *= 1.0 if decayed else 3e-3 / 0.02  # of its Adam
        decay = 3.0 if name.endswith("gain") else 0.0 if name.endswith("attention.out") else 0.5 * decayed
        np.testing.assert_allclose(
            changed[name], change - rate * decay * start[name], rtol=1e-3, atol=2e-6, err_msg=name
        )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_balance_bias_is_left_to_the_loads_of_experts(model, kind):
    changes, state = stepped(model, kind)
    np.testing.assert_array_equal(changes["blocks.0.feedforward.balance"], 0)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not any("['balance']" in path for path in paths)


def test_a_parameter_is_in_the_first_group_that_it_matches(model):
    groups = [{"match": "*.attention.out", "learning_rate": 0.25}, {"match": "blocks.*", "learning_rate": 0.5}]
    change, _ = stepped(model, "sgd", groups, steps=1)
    plain, _ = stepped(model, "sgd", steps=1)
    for name, factor in {"attention.out": 0.25, "attention.query": 0.5}.items():
        name = f"blocks.0.{name}"
        np.testing.assert_allclose(change[name], factor * plain[name], rtol=1e-4, atol=3e-7)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([{"match": "blocks.0.atention.query"}], r"groups\.0\.match: .*no parameter; .*blocks\.0\.attention\.query"),
        ([{"match": "embedding"}, {"match": "embed"}], r"groups\.1\.match: .*nearest are embedding"),
        ([{"match": "blocks.*"}, {"match": "*.gain"}, {"match": "*.query"}], r"groups\.2\.match: .*earlier group"),
        ([{"match": "*", "learning_rate": 0.0}], "every parameter is frozen"),
    ],
)
def test_a_group_without_parameters_is_refused_with_the_nearest_names(model, groups, said):
    with pytest.raises(RequestError, match=said):
        ParameterGroups(model.parameters, [GroupConfig(**group) for group in groups])


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({}, r"training\.groups\.0\.match|groups\.0\.match"),
        ({"match": ""}, "match"),
        ({"match": "*", "learning_rate": -1.0}, "learning_rate"),
        ({"match": "*", "rate": 1.0}, "rate: no such key"),
    ],
)
def test_impossible_groups_are_refused(group, said):
    with pytest.raises(RequestError, match=said):
        validate(TrainingConfig, {"steps": 1, "batch_size": 1, "groups": [group]})
