"""Peaks of devices, and the share of them that training uses."""

import jax
import pytest

from polygpt.model import model_of
from polygpt.recipes import load_recipe
from polygpt.training import devices


@pytest.mark.parametrize(
    ("kind", "dtype", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", None, 989),
        ("NVIDIA H100 80GB HBM3", "float32", None, 494.5),
        ("NVIDIA H100 80GB HBM3", "float32", "highest", 67),
        ("NVIDIA H100 PCIe", "float16", None, 756),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", None, 312),
        ("NVIDIA L4", "bfloat16", None, 121),
        ("Tesla T4", "bfloat16", None, 8.1),  # not native: computed in float32
        ("Tesla T4", "float16", None, 65),
        ("Tesla V100-SXM2-16GB", "float16", None, 125),
        ("TPU v4", "bfloat16", None, 275),
        ("TPU v5 lite", "float32", None, 197),
        ("TPU v6 lite", "float32", "highest", 153),
    ],
)
def test_listed_devices(kind, dtype, precision, tera):
    assert devices.listed_peak(kind, dtype, precision) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 D", "L4"])
def test_a_device_that_is_not_listed_has_no_peak_by_resemblance(kind):
    assert devices.listed_peak(kind, "float32") is None


@pytest.fixture
def utilization():
    return devices.Utilization(model_of(load_recipe("demo", {"model.vocab_size": 300}).model))


def test_utilization_is_the_models_flops_by_the_peak_and_never_more_than_all(utilization, monkeypatch):
    monkeypatch.setattr(devices, "listed_peak", lambda *_: utilization.flops_per_token * 1000.0)
    assert utilization(250.0) == pytest.approx(0.25)
    assert utilization(2000.0) == 1.0
    assert utilization(1000.0) == pytest.approx(0.5)  # the peak is at least what was seen


def test_an_unknown_peak_is_measured_once(utilization, monkeypatch):
    calls = []
    monkeypatch.setattr(devices, "_time_products", lambda *_: calls.append(1) or 1e12)
    devices.measured_peak.cache_clear()
    assert devices.measured_peak(jax.devices()[0], "float32") == 1e12
    assert 0 < utilization(1.0) <= 1
    assert len(calls) == 1
    devices.measured_peak.cache_clear()


def test_products_are_timed_within_the_budget():
    assert 1e8 < devices._time_products(jax.devices()[0], "float32") < 1e15


def test_memory_is_that_of_the_process_where_the_device_tells_none():
    held = devices.peak_memory()
    assert 50e6 < held < 1e12
