"""Fixtures that every test may use."""

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import xla
from hypothesis import settings
from jaxtyping import install_import_hook
from tiny_recipe import tiny_recipe

# What XLA compiled once is read from here, by this process and by those it starts: set before JAX is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Commands keep nothing in the user's cache folder; tests of that name a folder of their own.
os.environ["POLYGPT_CACHE"] = "off"

if shutil.which("nvidia-smi") is None:  # a GPU is left its own settings
    os.environ.setdefault("XLA_FLAGS", xla.FLAGS)

# Tracing makes objects by the hundred thousand and hardly any garbage: looking for it took a tenth of the time.
gc.set_threshold(20_000)

# Whoever started the tests may ignore interruptions (a shell does in the background), and so would what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Shapes and dtypes that the model's room declares are checked at every call; must be set before it is imported.
install_import_hook(["polygpt.kernels", "polygpt.model"], "beartype.beartype")

# The same examples every time, and no deadline: the first call of a compiled function takes what it takes.
settings.register_profile("polygpt", derandomize=True, deadline=None)
settings.load_profile("polygpt")

TRAINING = """\
steps: 6
batch_size: 4
schedule: {kind: cosine, warmup_steps: 2}
eval_every: 3
eval_batches: 2
save_every: 2
log_every: 2
"""

# `polygpt` in a process whose files can only grow so far. (Not by `preexec_fn`: JAX's threads do not survive a fork.)
LIMITED = [
    sys.executable,
    "-c",
    "import resource, sys; size = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (size, size));"
    "from polygpt.cli import main; main(sys.argv[2:])",
]


class Ran(NamedTuple):
    """What a program left behind."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> list[str]:
        """The lines of the error, without the notes before it."""
        _, found, told = self.err.partition("polygpt: ")
        return told.splitlines() if found else []


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("POLYGPT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder} (set POLYGPT_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory) -> Path:
    """A folder with `text.txt` and `tiny.yaml`, a run of seconds on it; not to be written to."""
    folder = tmp_path_factory.mktemp("tiny")
    draw = random.Random(0)
    phrases = ["the cat sat on a mat", "and then it ran", "to see what was there", "o yes!", "ROMEO: speak again"]
    lines = (", ".join(draw.choices(phrases, k=3)) for _ in range(300))
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    (folder / "tiny.yaml").write_text(tiny_recipe(TRAINING, dropout=0.1))
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_files) -> Path:
    """The finished run of `tiny.yaml`, with checkpoints at steps 4 and 6; not to be written to."""
    from polygpt.recipes import load_recipe
    from polygpt.training import train
    from polygpt.training.listeners import standard_listeners

    config = load_recipe(str(tiny_files / "tiny.yaml"), {"data.path": str(tiny_files / "text.txt")})
    train(config, tiny_files / "run", listeners=standard_listeners(quiet=True))
    return tiny_files / "run"


@pytest.fixture
def workdir(tiny_files, tmp_path, monkeypatch) -> Path:
    """A folder of the test's own, the current one, with `text.txt` and `tiny.yaml`."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("text.txt", "tiny.yaml"):
        shutil.copy(tiny_files / name, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(workdir, tiny_run) -> Path:
    """A copy of `tiny_run` to be changed at will: `run` in the current folder."""
    shutil.copytree(tiny_run, workdir / "run")
    return Path("run")


@pytest.fixture
def program(capsys) -> Callable[..., Ran]:
    """`program(*words)` runs `polygpt` with them in this process."""
    from polygpt import cli

    def call(*words: object) -> Ran:
        capsys.readouterr()
        code = cli._run([str(word) for word in words], debug=False)
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def process() -> Callable[..., Ran]:
    """`process(*words)` runs `polygpt` with them in a process of its own.

    With `largest_file`, a file that grows past as many bytes meets a full disk. Other keywords are those of
    `subprocess.run`.
    """

    def call(*words: object, largest_file: int | None = None, **settings) -> Ran:
        command = [sys.executable, "-m", "polygpt"] if largest_file is None else [*LIMITED, str(largest_file)]
        if largest_file is not None:  # XLA's cache cannot be written either, which it would tell of
            settings["env"] = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        settings = {"capture_output": True, "encoding": "utf-8", "timeout": 120} | settings
        done = subprocess.run([*command, *map(str, words)], **settings)
        return Ran(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes | None]]:
    """`snapshot(folder)`: all that is below it, hidden or not: paths and the bytes of files."""

    def take(folder: Path) -> dict[str, bytes | None]:
        paths = sorted(folder.rglob("*"))
        return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}

    return take


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
