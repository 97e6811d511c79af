"""Plans: bytes beside those of a real state on simulated devices, the roofline by hand, the search for a layout."""

import json
import os
import subprocess
import sys

import pytest

from polygpt.config import parse_overrides
from polygpt.errors import RequestError
from polygpt.planning import find_fitting, layout_settings, plan, planned_run
from polygpt.planning.program import Program
from polygpt.planning.roofline import axes_bandwidth, estimate
from polygpt.recipes import load_recipe
from polygpt.training import ACCELERATORS, listed

MODEL = """\
vocab_size: 64
context_length: 32
embed_dim: 16
num_layers: 2
scan_layers: true
position: {kind: rope}
norm: {kind: rmsnorm}
attention: {kind: softmax, num_heads: 4}
feedforward: {kind: mlp, mlp_dim: 32}
"""

# In a process with 4 devices: what a real state holds, what compiling it for real says, and the plan.
MEASURE = """\
import json, sys
import jax
from polygpt.config import parse_overrides
from polygpt.diagnosis import check_all_reduce
from polygpt.model import model_of
from polygpt.planning import planned_run
from polygpt.planning.program import abstract_arguments, compile_program
from polygpt.sharding import Scope
from polygpt.training import Trainer

config = planned_run(sys.argv[1], parse_overrides(sys.argv[2:]))
trainer = Trainer(model_of(config.model), config.training, Scope.of(config.mesh))
state = trainer.init()

def held(tree):
    device = jax.devices()[1]
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)

_, batch = abstract_arguments(trainer, jax.devices()[0])
compiled = trainer.lower_step(state, batch).compile()
print(json.dumps({
    "parameters": held(state.params),
    "state": held(state),
    "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    "program": compile_program(config)._asdict(),
    "all_reduce": check_all_reduce()._asdict(),
}))
"""

PROGRAM = Program(
    parameter_bytes=4 * 10**9,
    optimizer_bytes=8 * 10**9,
    batch_bytes=0,
    temporary_bytes=30 * 10**9,
    flops={"bfloat16": 989 * 10**12, "float32": 494_500_000_000},
    collective_bytes={},
    sent_bytes={"fsdp": 45e9, "tensor": 45e9},
    compile_seconds=1.0,
)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "model.yaml"
    path.write_text(MODEL)
    return str(path)


def run_of(*words):
    return planned_run("gpt2", parse_overrides(words))


@pytest.mark.parametrize("name", ["tiny_moe", "tiny_moe_2", "tiny_moe_3"])
def test_a_recipe_goes_before_a_preset_of_the_same_name(name):
    recipe = load_recipe(name)
    planned = planned_run(name, {})
    assert planned.training == recipe.training
    assert planned.model == recipe.model.with_vocab(planned.model.vocab_size)


def test_layers_are_unrolled_as_on_the_accelerator():
    def scans(accelerator, *words):
        return plan._unrolled_as_on(accelerator, run_of(*words)).model.scan_layers

    assert scans("h100") is scans("h200") is False  # 12 layers
    assert scans("h100", "model.num_layers=25") is True
    assert scans("h100", "model.scan_layers=true") is True
    # Decided there as everywhere:
    assert scans("v6e") is scans("h100", "mesh.fsdp=2") is scans("h100", "training.remat=block") is None


def test_bytes_are_those_of_a_real_state_and_its_compiled_step(model_file):
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    words = [sys.executable, "-c", MEASURE, model_file, "mesh.fsdp=2", "mesh.tensor=2"]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    found = Program(**measured["program"])
    assert found.parameter_bytes == measured["parameters"]
    assert found.parameter_bytes + found.optimizer_bytes == measured["state"]
    assert 0.8 <= found.temporary_bytes / measured["temporaries"] <= 1.25
    # 2 rows on the 2 devices of fsdp: forward and backward products of a row, split over the 2 of tensor.
    weights = 2 * (4 * 16 * 16 + 2 * 16 * 32) + 64 * 16
    attention = 2 * 2 * 2 * 32 * 16
    assert sum(found.flops.values()) == pytest.approx(3 * 32 * (2 * weights + attention) / 2, rel=0.2)
    assert {"fsdp", "tensor"} == set(found.collective_bytes)
    # Weights are gathered for the forward and the backward pass, and gradients scattered, over fsdp alone.
    assert found.collective_bytes["fsdp"]["all-gather"] >= 2 * 2 * (4 * 16 * 16 + 2 * 16 * 32) * 2 / 2
    assert "all-gather" not in found.collective_bytes["tensor"]
    reduced = measured["all_reduce"]
    assert (reduced["devices"], reduced["processes"], reduced["correct"]) == (4, 1, True)


def test_the_command_answers_with_json_per_device(model_file, program):
    done = program(
        "plan", model_file, "mesh.data=2", "training.batch_size=4", "--accelerator", "v6e", "--fit", "--json"
    )
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    keys = "devices mesh parameter_bytes optimizer_bytes activation_bytes peak_bytes flops_per_step collective_bytes"
    assert set(f"{keys} step_seconds utilization fits proposal".split()) <= facts.keys()
    assert (facts["devices"], facts["mesh"]) == (2, {"data": 2, "fsdp": 1, "tensor": 1, "expert": 1})
    assert (facts["fits"], facts["proposal"], facts["batch_size"]) == (True, None, 4)
    assert 0 < facts["utilization"] <= 1
    assert set(facts["collective_bytes"]) == {"data"}
    assert facts["collective_bytes"]["data"]["all-reduce"] >= facts["parameter_bytes"]


def test_the_roofline_is_the_slowest_resource_and_what_waits():
    # H100: a second of bfloat16 and a millisecond of TF32; 84 GB at 3.35 TB/s; 45 GB at 450 GB/s along each axis.
    found = estimate(PROGRAM, {"fsdp": 2, "tensor": 4}, "h100")
    assert found.product_seconds == pytest.approx(1.001)
    assert found.memory_seconds == pytest.approx(84 / 3350)
    assert found.collective_seconds == pytest.approx({"fsdp": 0.1, "tensor": 0.1})
    assert found.step_seconds == pytest.approx(1.101)
    slow = estimate(PROGRAM._replace(sent_bytes={"fsdp": 900e9}), {"fsdp": 8}, "h100")
    assert slow.step_seconds == pytest.approx(2)


@pytest.mark.parametrize(
    ("axes", "mesh", "gigabytes"),
    [
        (["fsdp"], {"fsdp": 8}, 450),
        (["fsdp"], {"fsdp": 16}, 400),  # eight adapters of a machine together
        (["fsdp"], {"fsdp": 2, "tensor": 8}, 50),  # one member a machine
        (["tensor"], {"fsdp": 2, "tensor": 8}, 450),
        (["fsdp"], {"fsdp": 4, "tensor": 4}, 100),
        (["data", "fsdp"], {"data": 2, "fsdp": 4}, 450),
        (["data"], {"data": 2, "fsdp": 4}, 450),
    ],
)
def test_collectives_go_through_links_within_a_machine_and_the_network_beyond(axes, mesh, gigabytes):
    assert axes_bandwidth(axes, mesh, listed(ACCELERATORS["h100"])) == gigabytes * 1e9


def test_a_preset_has_a_row_for_each_device_of_the_batch():
    assert run_of("mesh.fsdp=4", "mesh.tensor=2").training.batch_size == 4
    assert run_of("mesh.data=2", "mesh.fsdp=2", "training.accumulation_steps=4").training.batch_size == 16
    assert run_of("training.batch_size=3").mesh is None


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["mesh.fsdp=1024"], "mesh: fsdp 1024 has 1,024 devices; at most 512 are planned for"),
        (["mesh=auto"], "mesh=auto is for the devices of this machine; name those to plan for, as in mesh.fsdp=8"),
        (
            ["mesh.fsdp=4", "mesh.data=2", "training.batch_size=12"],
            "training.batch_size=12: 12 rows cannot be split evenly over 8 devices (mesh: data 2 × fsdp 4); "
            "8 or 16 can",
        ),
        (
            ["mesh.fsdp=4", "training.batch_size=12", "training.accumulation_steps=2"],
            "training.batch_size=12 in 2 parts (training.accumulation_steps): 6 rows cannot be split evenly over 4 "
            "devices (mesh: fsdp 4); 4 or 8 can",
        ),
        (["data.path=x.txt"], "data.path: gpt2 is a model without a run; write model., training. or mesh. settings"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_compiling(words, complaint):
    with pytest.raises(RequestError) as refused:
        run_of(*words)
    assert str(refused.value) == complaint


def test_heads_that_the_mesh_does_not_divide_are_refused():
    with pytest.raises(RequestError, match=r"mesh\.tensor=5 does not divide the 12 heads"):
        run_of("mesh.tensor=5")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["gpt2", "--accelerator", "h10"], "no accelerator 'h10' is known; did you mean 'h100'?"),
        (["gpt2", "mesh.fdsp=8"], "mesh.fdsp: no such key; did you mean 'fsdp'?"),
        (["gpt2_xxl"], "gpt2_xl"),
    ],
)
def test_misspelled_words_are_answered_with_the_nearest(words, complaint, program):
    done = program("plan", *words)
    assert done.code == 2
    assert complaint in done.err
    assert len(done.err.splitlines()) == 1


@pytest.fixture
def compiled(monkeypatch):
    """Replaces compiling by a count: 100 GB of state, split over fsdp and tensor, and 60 GB of activations a row."""
    tried = []

    def fake(config, accelerator):
        axes = config.mesh
        rows = config.training.batch_size / (axes.data * axes.fsdp * config.training.accumulation_steps * axes.tensor)
        state, kept = 100e9 / (axes.fsdp * axes.tensor), {"none": 1, "block": 0.35}.get(config.training.remat, 0.2)
        tried.append(layout_settings(config, config))
        counted = PROGRAM._replace(
            parameter_bytes=state / 3, optimizer_bytes=state * 2 / 3, temporary_bytes=60e9 * rows * kept
        )
        return plan.Plan(config, accelerator, counted, estimate(counted, {}, accelerator))

    monkeypatch.setattr(plan, "make_plan", fake)
    monkeypatch.setattr("polygpt.planning.fit.make_plan", fake)
    return fake, tried


@pytest.mark.parametrize(
    ("words", "proposed"),
    [
        # The state is split over more devices, no more than needed.
        (["mesh.data=16"], "mesh.data=2 mesh.fsdp=8"),
        (["mesh.data=16", "training.batch_size=32"], "mesh.data=2 mesh.fsdp=8 training.accumulation_steps=2"),
        (["mesh.fsdp=16", "training.batch_size=32"], "mesh.fsdp=16 training.accumulation_steps=2"),
        # A single row is too much: it is computed again.
        (["mesh.fsdp=4"], "mesh.fsdp=4 training.remat=block"),
    ],
)
def test_the_mildest_layout_that_fits_is_proposed(words, proposed, compiled):
    fake, _ = compiled
    config = run_of(*words)
    asked = fake(config, "h100")
    assert not asked.fits
    found = find_fitting(asked)
    assert found is not None
    assert found.fits
    assert layout_settings(found.config, config) == proposed


def test_more_devices_are_proposed_where_nothing_else_helps(compiled):
    fake, tried = compiled
    config = run_of("mesh.data=1", "training.batch_size=1")
    found = find_fitting(fake(config, "v6e"))
    assert found.devices > 1
    assert found.fits
    assert len(tried) <= 5
