"""Learning-rate schedules at exact points, against their formulas and optax's, and their shape in any run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.training.optimizers import (
    SCHEDULES,
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    TrapezoidConfig,
    WSDConfig,
)


def values(schedule, steps):
    # One shape for all, so that each operation is compiled once.
    return np.asarray(jax.vmap(schedule)(jnp.arange(64)), np.float64)[:steps]


def test_cosine_warms_up_and_ends_at_its_fraction():
    schedule = CosineConfig(warmup_steps=10, final_fraction=0.1).build(2.0, 110)
    assert float(schedule(0)) == pytest.approx(0.2)
    assert float(schedule(10)) == pytest.approx(2.0)
    assert float(schedule(60)) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5), rel=1e-5)
    assert float(schedule(110)) == pytest.approx(0.2)
    assert all(float(schedule(s)) > float(schedule(s + 1)) for s in range(10, 109))


def test_trapezoid_is_flat_then_falls_to_nothing():
    schedule = TrapezoidConfig(warmup_steps=10, decay_fraction=0.2).build(1.0, 100)
    assert [float(schedule(s)) for s in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert float(schedule(90)) == pytest.approx(0.5)
    assert float(schedule(100)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("warmup", "share"), [(10, 1.0), (30, 0.8), (50, 0.6), (80, 1.0)])
def test_a_trapezoid_whose_warm_up_and_decay_overlap_still_ends_at_nothing(warmup, share):
    schedule = TrapezoidConfig(warmup_steps=warmup, decay_fraction=share).build(1.0, 100)
    assert float(schedule(warmup)) == pytest.approx(1.0)
    assert float(schedule((warmup + 100) // 2)) == pytest.approx(0.5, abs=0.01)
    assert float(schedule(100)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("config", "points"),
    [
        (LinearConfig(warmup_steps=10), {0: 0.2, 5: 1.1, 10: 2.0, 60: 1.0, 85: 0.5, 110: 0.0}),
        (LinearConfig(warmup_steps=10, final_fraction=0.5), {10: 2.0, 60: 1.5, 110: 1.0}),
        (ConstantConfig(), {0: 2.0, 109: 2.0}),
        (ConstantConfig(warmup_steps=10), {0: 0.2, 5: 1.1, 10: 2.0, 109: 2.0}),
        (InverseSqrtConfig(warmup_steps=10), {0: 0.2, 5: 1.1, 10: 2.0, 40: 1.0, 90: 2 / 3}),
        (InverseSqrtConfig(warmup_steps=0), {0: 2.0, 1: 2.0, 4: 1.0, 100: 0.2}),
        (WSDConfig(warmup_steps=10, decay_fraction=0.4), {0: 0.2, 10: 2.0, 66: 2.0, 77: 1.0, 110: 0.0}),
        (WSDConfig(decay_fraction=0.4, decay_shape="cosine"), {66: 2.0, 77: 1 + math.sqrt(0.5), 88: 1.0, 110: 0.0}),
        (WSDConfig(decay_fraction=0.4, decay_shape="linear", final_fraction=0.5), {66: 2.0, 88: 1.5, 110: 1.0}),
        (WSDConfig(decay_fraction=0.4, final_fraction=0.5), {66: 2.0, 77: 1.5, 110: 1.0}),
    ],
)
def test_points_of_each_formula(config, points):
    schedule = config.build(2.0, 110)
    assert {step: float(schedule(step)) for step in points} == pytest.approx(points, rel=1e-5, abs=1e-6)


def test_schedules_are_optaxs_where_it_has_them():
    steps, start = 40, 0.25
    pairs = [
        (CosineConfig(warmup_steps=4), optax.warmup_cosine_decay_schedule(start, 1.0, 4, steps, 0.1)),
        (ConstantConfig(warmup_steps=4), optax.warmup_constant_schedule(start, 1.0, 4)),
        (
            LinearConfig(warmup_steps=4),
            optax.schedules.join_schedules(
                [optax.linear_schedule(start, 1.0, 4), optax.polynomial_schedule(1.0, 0.0, 1, steps - 4)], [4]
            ),
        ),
    ]
    for config, theirs in pairs:
        np.testing.assert_allclose(values(config.build(1.0, steps), steps), values(theirs, steps), rtol=1e-6)


@settings(max_examples=25)
@given(
    kind=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 60),
    warmup=st.one_of(st.integers(0, 80), st.floats(0.01, 0.99)),
    final=st.floats(0, 1),
    decay=st.floats(0.01, 1),
    shape=st.sampled_from(["linear", "cosine", "1-sqrt"]),
)
def test_a_schedule_is_positive_continuous_and_reaches_its_peak(kind, steps, warmup, final, decay, shape):
    fields = {"warmup_steps": warmup, "final_fraction": final, "decay_fraction": decay, "decay_shape": shape}
    cls = SCHEDULES[kind]
    config = cls(**{name: value for name, value in fields.items() if name in cls.model_fields})
    found = values(config.build(1.0, steps), steps)
    rise = min(warmup if isinstance(warmup, int) else max(round(warmup * steps), 1), steps)
    assert np.isfinite(found).all()
    assert (found > 0).all()
    assert (found <= 1 + 1e-6).all()
    if rise < steps:
        assert found[rise] == pytest.approx(1.0)
    assert found[:rise] == pytest.approx([(1 / rise) + (1 - 1 / rise) * s / rise for s in range(rise)], rel=1e-5)
    # What follows falls by no more in a step than the first step of the steepest shape, over the shortest decay.
    after = found[rise:]
    assert (np.diff(after) <= 1e-6).all()
    length = {"trapezoid": decay, "wsd": decay}.get(kind, 1.0) * steps
    length = max(min(int(length), steps - rise), 1)
    largest = {"wsd": 1 / math.sqrt(length), "inverse_sqrt": 1 - math.sqrt(0.5)}.get(kind, math.pi / 2 / length)
    assert (-np.diff(after) <= max(largest, math.pi / 2 / length) + 1e-6).all()


def test_the_end_of_a_decay_is_its_final_fraction():
    for kind, cls in SCHEDULES.items():
        if "final_fraction" in cls.model_fields:
            schedule = cls(warmup_steps=3, final_fraction=0.25).build(2.0, 20)
            assert float(schedule(20)) == pytest.approx(0.5), kind
            assert float(schedule(30)) == pytest.approx(0.5), kind


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("wsd", {"decay_shape": "square"}, "decay_shape"),
        ("wsd", {"decay_fraction": 0.0}, "decay_fraction"),
        ("linear", {"final_fraction": 1.5}, "final_fraction"),
        ("constant", {"final_fraction": 0.5}, "final_fraction"),
        ("inverse_sqrt", {"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_impossible_schedules_are_refused(kind, fields, said):
    with pytest.raises(RequestError, match=said):
        validate(SCHEDULES[kind], fields)
