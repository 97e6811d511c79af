"""Several processes that train one run, on this machine: the same run as one process makes, whatever happens to one."""

import random
import signal

import numpy as np
import pytest
from several import Processes, arrays, losses
from tiny_recipe import tiny_recipe

from polygpt import checkpoint
from polygpt.recipes import load_recipe
from polygpt.training import train

TRAINING = """\
steps: 60
batch_size: 8
accumulation_steps: 2
schedule: {kind: cosine, warmup_steps: 5}
eval_every: 30
eval_batches: 2
save_every: 10
keep: 100
log_every: 5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "home", "again"]
    (folder / "text.txt").write_text("\n".join(" ".join(draw.choices(words, k=9)) for _ in range(400)))
    (folder / "run.yaml").write_text(tiny_recipe(TRAINING, heads=4))
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The run by one process on one device."""
    config = load_recipe(str(folder / "run.yaml"), {"data.path": str(folder / "text.txt")})
    train(config, folder / "alone", listeners=None)
    return folder / "alone"


def test_two_then_four_processes_then_one_make_one_run(folder, alone):
    """Two are interrupted by SIGTERM to one of them; one of the four that go on is killed; one process finishes."""
    expected, text = losses(alone), folder / "text.txt"
    slow = {"slow": 0.05}
    two = Processes(
        folder,
        2,
        "train",
        "run.yaml",
        f"data.path={text}",
        "--out",
        "run",
        "--json",
        settings={"all": slow, 1: {"signal": signal.SIGTERM, "at": 12}},
    ).wait()
    assert two.codes == [143, 143], two.err
    run = folder / "run"
    stopped = checkpoint.newest(run / "checkpoints").step
    assert 12 < stopped < 60
    assert all(f"interrupted after step {stopped}, which is saved" in err for err in two.err)
    # Each has read its half of every batch; batches do not depend on how many processes there are.
    assert all(rows == [0, 1, 2, 3] for rows in two.read(0).values())
    assert all(rows == [4, 5, 6, 7] for rows in two.read(1).values())
    assert two.read(0).keys() == two.read(1).keys() == set(range(stopped))
    assert two.out == ("", "")
    assert ["tokens/s" in err for err in two.err] == [True, False]
    before = arrays(run, 10)
    np.testing.assert_allclose(before["params.embedding"], arrays(alone, 10)["params.embedding"], rtol=1e-4, atol=1e-6)

    four = Processes(
        folder,
        4,
        "train",
        "--resume",
        "--out",
        "run",
        settings={"all": slow, 2: {"signal": signal.SIGKILL, "at": stopped + 12}},
    )
    four.wait()
    assert four.codes[2] == -signal.SIGKILL, four.err
    assert all(four.codes[index] not in (0, -signal.SIGKILL) for index in (0, 1, 3)), (four.codes, four.err)
    assert "of 4 " in four.err[0].splitlines()[-1], four.err[0]
    assert four.read(3) == {i: [6, 7] for i in {0, *range(stopped, max(four.read(3)) + 1)}}
    newest = checkpoint.newest(run / "checkpoints").step
    assert newest >= stopped

    done = train(None, run, resume=True)
    assert done.steps == 60
    found = losses(run)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[s] for s in expected], [expected[s] for s in expected], rtol=1e-4)
