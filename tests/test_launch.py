"""The launch scripts, run with simulated launchers: which processes they start, with which words and variables."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from polygpt.distributed import Launch, find_launch

LAUNCH = Path(__file__).parents[1] / "launch"

# Each prints what it was called with. `srun` and `mpirun` start two processes with the variables that they set.
PROGRAMS = {
    "polygpt": """\
        printf 'polygpt'; printf ' <%s>' "$@"
        echo " rank=${SLURM_PROCID:-}${OMPI_COMM_WORLD_RANK:-} of=${SLURM_NTASKS:-}${OMPI_COMM_WORLD_SIZE:-}"
    """,
    "srun": """\
        while [[ "$1" == --* ]]; do shift; done
        for i in 0 1; do
            SLURM_NTASKS=2 SLURM_PROCID=$i SLURM_LOCALID=0 SLURM_STEP_NODELIST='node[1-2]' SLURM_JOB_ID=7 "$@"
        done
    """,
    "mpirun": """\
        if [[ "$1" == --version ]]; then echo "mpirun (Open MPI) 5.0.3"; exit; fi
        echo "mpirun $*" | head -1 | sed 's/ bash -c.*//'
        while [[ "$1" != bash ]]; do shift; done
        for i in 0 1; do OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=$i "$@"; done
    """,
    "gcloud": """\
        echo "gcloud ${*:1:$#-1}"
        bash -c "${!#}"
    """,
}


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """`launch(script, *words, **variables)` runs a script where the launchers are simulated; returns its lines."""
    for name, body in PROGRAMS.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/bash\n{body}")
        program.chmod(0o755)
    monkeypatch.chdir(tmp_path)

    def call(script, *words, code=0, **variables):
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
        done = subprocess.run([LAUNCH / script, *words], capture_output=True, text=True, env=env, timeout=30)
        assert done.returncode == code, done.stderr
        return (done.stdout or done.stderr).splitlines()

    return call


def test_slurm_starts_the_same_command_on_every_node(launch):
    words = ["demo", "--out", "run", "data.path=my text.txt"]
    expected = "polygpt <train> <demo> <--out> <run> <data.path=my text.txt>"
    assert launch("slurm.sh", *words) == [f"{expected} rank={i} of=2" for i in (0, 1)]


def test_jax_finds_the_cluster_in_the_variables_that_srun_sets(monkeypatch):
    from jax._src.clusters import SlurmCluster

    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "0"}
    job["SLURM_STEP_NODELIST"] = "node[11-14]"
    assert find_launch(None, None, None, job) == Launch()  # JAX is asked
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert SlurmCluster.is_env_present()
    assert SlurmCluster.get_coordinator_address(None, None).startswith("node11:")
    assert (SlurmCluster.get_process_count(), SlurmCluster.get_process_id()) == (4, 3)


def test_slurm_resumes_a_run_that_exists(launch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    assert all("<run> <--resume>" in line for line in launch("slurm.sh", "demo", "--out", "run"))


def test_mpi_turns_ranks_into_options(launch, tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    started, *lines = launch("mpi.sh", "2", "demo", "--out", "my run", HOSTFILE="hosts", PORT="1234")
    assert started == "mpirun -np 2 --hostfile hosts --map-by ppr:1:node -x POLYGPT_COORDINATOR -x PATH"
    for i, line in enumerate(lines):
        options = f"<--coordinator> <node1:1234> <--num-processes> <2> <--process-id> <{i}>"
        assert line.startswith(f"polygpt <train> <demo> <--out> <my run> {options}")
        assert find_launch("node1:1234", 2, i, {"OMPI_COMM_WORLD_SIZE": "2"}) == Launch("node1:1234", 2, i)
    assert len(lines) == 2


def test_mpi_without_a_hostfile_stays_on_this_machine(launch):
    started, first, _ = launch("mpi.sh", "2", "demo", "--out", "run", HOSTFILE="", PBS_NODEFILE="")
    assert "--hostfile" not in started
    assert "<--coordinator> <127.0.0.1:29500>" in first


def test_a_tpu_slice_runs_the_command_on_every_host_as_it_was_quoted(launch):
    lines = launch(
        "tpu_pod.sh", "slice", "us-east5-a", "demo", "--out", "my run", "data.path=a b", SETUP="echo installed"
    )
    assert lines[0] == "gcloud compute tpus tpu-vm ssh slice --zone us-east5-a --worker=all --command"
    assert lines[1] == "installed"
    assert lines[3].startswith("polygpt <train> <demo> <--out> <my run> <data.path=a b>")


@pytest.mark.parametrize("script", ["slurm.sh", "mpi.sh", "tpu_pod.sh"])
def test_scripts_without_words_say_how_they_are_used(script, launch):
    (line,) = launch(script, code=2)
    assert line.startswith("usage: ")


def test_the_job_set_is_one_process_a_pod(launch, tmp_path):
    job = YAML(typ="safe").load(LAUNCH / "jobset.yaml")
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = job["spec"]["replicatedJobs"]
    spec = workers["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    env = {each["name"]: each["value"] for each in container["env"]}
    assert spec["parallelism"] == spec["completions"] == int(env["NUM_PROCESSES"])
    assert spec["completionMode"] == "Indexed"  # sets JOB_COMPLETION_INDEX
    env |= {"JOB_COMPLETION_INDEX": "1", "RUN": "run", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([*container["command"], *container["args"]], capture_output=True, text=True, env=env)
    host = f"{job['metadata']['name']}-{workers['name']}-0-0.{job['metadata']['name']}"
    options = f"<--coordinator> <{host}:29500> <--num-processes> <2> <--process-id> <1>"
    assert re.fullmatch(rf"polygpt <train> <RECIPE> <mesh.fsdp=16> <--out> <run> {options} rank= of=\n", done.stdout)
