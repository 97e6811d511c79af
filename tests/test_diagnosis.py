"""`polygpt doctor`: a kernel or a sum that is wrong is found, and what is right passes."""

import json
import socket
import subprocess
import sys

import pytest

from polygpt import diagnosis
from polygpt.diagnosis import AllReduceCheck, check_all_reduce, check_attention, parse_links

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tNV18\tSYS\tPXB\t0-47\t0
GPU1\tNV18\t X \tNV18\tSYS\tSYS\t0-47\t0
GPU2\tNV18\tNV18\t X \tSYS\tSYS\t48-95\t1
GPU3\tSYS\tSYS\tSYS\t X \tSYS\t48-95\t1
NIC0\tPXB\tSYS\tSYS\tSYS\t X

Legend:
  NV#  = Connection traversing a bonded set of # NVLinks
"""


@pytest.fixture
def one_case(monkeypatch):
    """The checks of float32 alone, of 128 tokens: the others differ in their settings."""
    monkeypatch.setattr(diagnosis, "LENGTH", 128)
    monkeypatch.setattr(diagnosis, "_CASES", {"float32": ("float32", {"window": 32})})


def test_the_kernel_of_this_machine_agrees_with_the_reference(one_case):
    check = check_attention("float32")
    assert check.agrees
    assert check.kernel == "xla in blocks"
    assert check.error < 1e-5


def test_the_command_prints_json_and_ends_with_0(one_case, program):
    done = program("doctor", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert (facts["backend"], facts["processes"], facts["problems"]) == ("cpu", 1, [])
    assert {"jax", "jaxlib", "flax"} <= facts["libraries"].keys()
    assert sum(device["count"] for device in facts["devices"]) == facts["all_reduce"]["devices"]
    assert facts["memory"]["machine_bytes"] > 0
    assert "agrees with the reference" in program("doctor").out


def test_a_kernel_that_computes_something_else_is_found_and_ends_with_1(one_case, program, monkeypatch):
    right = diagnosis.attention
    monkeypatch.setattr(diagnosis, "attention", lambda q, k, v, rule, inputs: right(q, k, 1.001 * v, rule, inputs))
    done = program("doctor")
    assert done.code == 1
    assert "DIFFERS FROM the reference" in done.out
    assert "problem: attention (float32): the kernel 'xla in blocks' is off by 0.001 " in done.out


def test_a_wrong_gradient_is_found(one_case, monkeypatch):
    from jax import lax

    right = diagnosis.attention
    monkeypatch.setattr(
        diagnosis, "attention", lambda q, k, v, rule, inputs: right(q, lax.stop_gradient(k), v, rule, inputs)
    )
    check = check_attention("float32")
    assert (check.agrees, check.error < 1e-5, check.gradient_error > 0.5) == (False, True, True)


def test_a_wrong_sum_is_a_problem(monkeypatch):
    assert check_all_reduce().correct
    broken = AllReduceCheck(8, 1, 4, 1.0, correct=False)
    assert diagnosis._problems("tpu", [], broken) == [
        "all-reduce: the sum over 8 devices is wrong; the interconnect is at fault"
    ]


def test_links_are_read_from_nvidias_table():
    assert parse_links(TOPOLOGY) == "NVLink (18 links) and PCIe (SYS)"
    assert parse_links("") is None


@pytest.mark.slow
def test_two_processes_sum_over_the_devices_of_both_and_the_first_one_answers():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = "127.0.0.1:" + str(found.getsockname()[1])
    words = [sys.executable, "-m", "polygpt", "doctor", "--json", "--coordinator", address, "--num-processes", "2"]
    both = [
        subprocess.Popen([*words, "--process-id", index], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for index in "01"
    ]
    (first, _), (second, _) = (each.communicate(timeout=300) for each in both)
    assert [each.returncode for each in both] == [0, 0]
    facts = json.loads(first)
    assert (facts["processes"], facts["all_reduce"]["devices"], facts["all_reduce"]["correct"]) == (2, 2, True)
    assert second == ""
