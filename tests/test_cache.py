"""The cache of the command line: an answer is kept as long as it holds, and the cache is never in the way."""

import os
import subprocess
import sys

import pytest

from polygpt import cache

QUESTION = ["what", "is"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.SETTING, str(tmp_path / "cache"))
    return tmp_path / "cache"


def asked(question=QUESTION, answer=None, keep=bool):
    """The answer, and whether it had to be computed."""
    computed = []
    found = cache.kept(question, lambda: computed.append(1) or answer or {"a": [1, None, "é"]}, keep)
    return found, bool(computed)


def test_an_answer_is_computed_once(folder):
    assert asked() == ({"a": [1, None, "é"]}, True)
    assert asked() == ({"a": [1, None, "é"]}, False)
    assert asked(["what", "else"])[1]


def test_an_answer_that_may_change_is_not_kept(folder):
    assert asked(keep=lambda answer: False)[1]
    assert asked()[1]


@pytest.mark.parametrize("change", ["a file of polygpt", "a version", "a variable of JAX", "the processor"])
def test_an_answer_goes_with_what_it_depends_on(folder, monkeypatch, change, tmp_path):
    asked()
    match change:
        case "a file of polygpt":
            (tmp_path / "own.py").write_text("1")
            monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
        case "a version":
            monkeypatch.setattr(cache, "_version", lambda name: "0.0")
        case "a variable of JAX":
            monkeypatch.setenv("JAX_OF_NO_USE", "1")
        case "the processor":
            monkeypatch.setattr(cache, "processor", lambda: "other")
    cache._installation.cache_clear()
    try:
        assert asked()[1]
    finally:
        cache._installation.cache_clear()


def test_damage_is_computed_anew(folder):
    asked()
    (path,) = (folder / "answers").iterdir()
    path.write_text('{"a": [1')
    assert asked()[1]
    assert not asked()[1]


def test_answers_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(cache, "ANSWERS", 3)
    for number in range(5):
        asked([number])
        path = max((folder / "answers").iterdir(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(path, (number, number))
    assert len(list((folder / "answers").iterdir())) == 3
    assert [asked([number])[1] for number in (4, 0)] == [False, True]


@pytest.mark.parametrize("where", ["off", "", "/proc/no/cache", "/dev/null/cache"])
def test_without_a_folder_nothing_is_kept_and_nothing_said(monkeypatch, where, capfd):
    monkeypatch.setenv(cache.SETTING, where)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert asked()[1]
    assert asked()[1]
    cache.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert capfd.readouterr() == ("", "")


def test_the_folder_is_where_the_desktop_says(monkeypatch, tmp_path):
    monkeypatch.delenv(cache.SETTING)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "polygpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "home/.cache/polygpt"


def test_what_the_user_has_set_for_jax_stays(folder, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    cache.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


def environment(**changes):
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_C", "JAX_P"))}
    return own | changes


def test_a_command_keeps_its_programs_and_importing_polygpt_does_not(run, process, tmp_path):
    words = ["generate", "run", "--prompt", "the ", "--max-new-tokens", "4"]
    folder = tmp_path / "cache"
    first = process(*words, env=environment(POLYGPT_CACHE=str(folder), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"))
    kept = list(folder.glob("programs-*/*"))
    assert kept
    again = process(*words, env=environment(POLYGPT_CACHE=str(folder), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"))
    assert (first.code, again.code, again.out) == (0, 0, first.out)
    assert again.err.count("\n") == first.err.count("\n") == 1  # tokens/s: JAX says nothing of the cache
    assert {path.name for path in folder.glob("programs-*/*")} == {path.name for path in kept}


def test_a_cache_that_fills_up_or_cannot_be_written_is_silent(run, process, tmp_path):
    folder = tmp_path / "cache"
    words = ["generate", "run", "--prompt", "the ", "--max-new-tokens", "4"]
    settings = environment(POLYGPT_CACHE=str(folder), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    done = process(*words, env=settings, largest_file=100)
    assert (done.code, done.err.count("\n")) == (0, 1), done.err


LOADED = "import sys; from polygpt import cli; code = cli._run(sys.argv[1:], False); print('jax' in sys.modules, code)"


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "gtp2", "--prompt", "a"],
        ["show", "gtp2"],
        ["train", "dmeo", "--out", "x"],
        ["import", "y", "--out", "x"],
        ["export", "y", "--format", "hf", "--out", "x"],
        ["eval", "y", "--task", "perplexity", "--data", "z"],
    ],
    ids=" ".join,
)
def test_a_misspelled_name_is_refused_without_jax_at_the_first_time(words, tmp_path):
    command = [sys.executable, "-c", LOADED, *words]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "False 2\n"
    assert done.stderr.startswith("polygpt: no ")


@pytest.mark.parametrize("words", [["presets"], ["show", "gpt2"], ["show", "demo"]])
def test_the_second_time_jax_is_not_imported(words, tmp_path):
    settings = environment(POLYGPT_CACHE=str(tmp_path / "cache"))
    command = [sys.executable, "-c", LOADED, *words]
    first, second = (
        subprocess.run(command, env=settings, cwd=tmp_path, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert first.stdout.endswith("True 0\n")
    assert second.stdout == first.stdout.removesuffix("True 0\n") + "False 0\n"
    assert first.stderr == second.stderr
