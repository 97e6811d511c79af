"""How a process learns whether it is alone: from its options, or from what its launcher has set."""

import socket

import pytest

from polygpt.distributed import (
    Launch,
    agree,
    agreement,
    exchange,
    find_launch,
    main_decides,
    process_count,
    shared_folder,
    start,
)
from polygpt.errors import PolygptError, RequestError

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
STEP = {**SLURM, "SLURM_STEP_NODELIST": "node[1-4]"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
HERE = "10.0.0.1:1234"


@pytest.mark.parametrize(
    ("options", "env", "expected"),
    [
        ((None, None, None), {}, None),
        ((HERE, 2, 1), {}, Launch(HERE, 2, 1)),
        ((HERE, 1, 0), {}, None),
        ((None, 2, 1), {"JAX_COORDINATOR_ADDRESS": HERE}, Launch(HERE, 2, 1)),
        ((None, None, None), STEP, Launch()),
        ((HERE, None, None), STEP, Launch(HERE, 4, 3)),
        ((None, None, None), SLURM, None),  # the script of a job, outside srun
        ((None, None, None), {**STEP, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ((None, None, None), {**OMPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, Launch()),
        ((HERE, None, None), OMPI, Launch(HERE, 2, 1)),
        ((HERE, None, None), {"PMI_SIZE": "3", "PMI_RANK": "2"}, Launch(HERE, 3, 2)),
        ((None, None, None), POD, Launch()),
        (("[::1]:1234", 2, 0), {}, Launch("[::1]:1234", 2, 0)),
    ],
)
def test_processes_are_found_by_options_or_by_the_launcher(options, env, expected):
    assert find_launch(*options, env) == expected


@pytest.mark.parametrize(
    ("options", "env", "said"),
    [
        (("10.0.0.1", 2, 0), {}, "--coordinator 10.0.0.1: HOST:PORT is needed"),
        ((":1234", 2, 0), {}, "HOST:PORT is needed"),
        (("host:99999", 2, 0), {}, "HOST:PORT is needed"),
        ((HERE, 2, None), {}, "--process-id is missing"),
        ((HERE, None, 0), {}, "--num-processes is missing"),
        ((HERE, 0, 0), {}, "--num-processes 0: at least 1 is needed"),
        ((HERE, 2, 2), {}, "--process-id 2: with --num-processes 2 it is one of 0 to 1"),
        ((HERE, 2, -1), {}, "--process-id -1: with"),
        ((None, 2, 0), {}, "add --coordinator HOST:PORT"),
        ((None, None, None), OMPI, "Open MPI started this as process 1 of 2, but gives no address"),
    ],
)
def test_what_does_not_fit_is_refused(options, env, said):
    with pytest.raises(RequestError) as error:
        find_launch(*options, env)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_a_coordinator_that_does_not_answer_is_named_within_the_limit(monkeypatch):
    monkeypatch.setenv("POLYGPT_START_SECONDS", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(PolygptError, match=rf"the coordinator 127.0.0.1:{port} does not answer .*1 s, POLYGPT_START"):
        start(Launch(f"127.0.0.1:{port}", 2, 1))
    with pytest.raises(RequestError, match=r"there is no host 'nowhere\.invalid'"):
        start(Launch("nowhere.invalid:1", 2, 1))
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(RequestError, match=f"process 0 cannot listen on port {port}"):
            start(Launch(f"127.0.0.1:{port}", 2, 0))
    monkeypatch.setenv("POLYGPT_START_SECONDS", "soon")
    with pytest.raises(RequestError, match="POLYGPT_START_SECONDS=soon: a whole number of seconds is needed"):
        start(Launch(f"127.0.0.1:{port}", 2, 1))


def test_alone_everything_agrees_and_nothing_is_written(tmp_path):
    assert process_count() == 1
    assert exchange("x", {"a": 1}) == [{"a": 1}]
    assert main_decides("x", lambda: 5) == 5
    agree("configuration", {"a": 1})
    with shared_folder(tmp_path / "new", "--out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_one_process_cannot_write_is_refused_and_names_it(tmp_path, monkeypatch):
    """Process 0's view, where process 1 (of another machine) reports what its disk says."""
    monkeypatch.setattr(agreement, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "main_decides", lambda _, decide: decide())
    others = {"written": None, "sees": ["far", True, "Read-only file system"]}
    monkeypatch.setattr(agreement, "exchange", lambda name, value: [value, others[name]])
    said = r"new: process 1 \(far: Read-only file system\) cannot write there"
    with pytest.raises(PolygptError, match=said), shared_folder(tmp_path / "new", "--out"):
        pass
    others["sees"] = ["far", True, None]
    with shared_folder(tmp_path / "new", "--out"):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert agreement._write_error(tmp_path / "file" / "inner") == "Not a directory"
