"""The C++ library is compiled once for all processes, kept whole, and can be done without."""

import os
import shutil
import subprocess
import sys
import time

import pytest
from compilers import needs_compiler

from polygpt.kernels import native


def reason(**environment) -> str:
    """Why another process cannot use it."""
    code = "from polygpt.kernels import native; print(native.available(), native.unavailable())"
    env = {**os.environ, "POLYGPT_CACHE": "off", **environment}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    return subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, check=True).stdout


def test_without_it(tmp_path):
    assert reason(POLYGPT_NATIVE="0") == "False POLYGPT_NATIVE=0\n"
    assert reason(CXX="no-such-compiler") == "False there is no C++ compiler: no-such-compiler\n"
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'it is broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    assert reason(CXX=str(compiler)) == f"False {compiler} failed: it is broken\n"


@needs_compiler
def test_it_is_compiled_once_for_all_processes(tmp_path):
    calls = tmp_path / "calls"
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\necho called >> {calls}\nexec {shutil.which(os.environ.get("CXX") or "c++")} "$@"\n'
    )
    compiler.chmod(0o755)
    for _ in range(2):
        assert reason(CXX=str(compiler), POLYGPT_CACHE=str(tmp_path / "cache")) == "True None\n"
    assert calls.read_text() == "called\n"
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]


def small_compiler(tmp_path, source="int polygpt_product, polygpt_product_int4, polygpt_attention;"):
    """A program that compiles something small in place of polygpt's source."""
    (tmp_path / "small.cc").write_text(f'extern "C" {{ {source} }}')
    compiler, real = tmp_path / "c++", shutil.which("c++")
    compiler.write_text(f'#!/bin/sh\nfor out; do :; done\nexec {real} -shared -fPIC {tmp_path}/small.cc -o "$out"\n')
    compiler.chmod(0o755)
    return compiler


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(native, "_folder", lambda: folder)
    return folder


@needs_compiler
def test_a_library_of_which_a_part_is_lost_is_compiled_again(tmp_path, cache):
    compiler = [str(small_compiler(tmp_path))]
    path = native._compile(compiler, cache / "native")
    whole = path.read_bytes()
    path.unlink()
    native._library(compiler)
    (file,) = cache.iterdir()
    file.unlink()  # not written over: this process has loaded it
    file.write_bytes(whole[: len(whole) // 2])
    native._library(compiler)
    assert [path.read_bytes() for path in cache.iterdir()] == [whole]


@needs_compiler
def test_what_a_killed_process_left_is_deleted(tmp_path, cache):
    old, new = cache / "native-0.so.1234", cache / "native-0.so.5678"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    native._compile([str(small_compiler(tmp_path))], cache / "native-1")
    assert not old.exists()
    assert new.exists()


def test_the_compiler_may_be_more_than_a_name(tmp_path, monkeypatch):
    folder = tmp_path / "a folder"
    folder.mkdir()
    compiler = folder / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    for name, command in (
        (f"'{compiler}' sh -O1", [str(compiler), "sh", "-O1"]),
        (str(compiler), [str(compiler)]),
    ):
        monkeypatch.setenv("CXX", name)
        assert native._compiler() == command
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(FileNotFoundError, match=r"there is no C\+\+ compiler: no-such-compiler$"):
        native._compiler()
    monkeypatch.setenv("CXX", "'c++")
    with pytest.raises(FileNotFoundError, match="quotation"):
        native._compiler()


def test_the_compilers_message_may_be_in_any_encoding_and_it_reads_no_input(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\ncat >&2\nprintf 'caf\\351\\n' >&2\nexit 1\n")
    compiler.chmod(0o755)
    assert reason(CXX=str(compiler), PYTHONUTF8="1").startswith(f"False {compiler} failed: caf")


@needs_compiler
def test_libraries_that_are_no_longer_used_are_deleted_when_another_is_compiled(tmp_path, cache):
    compiler = [str(small_compiler(tmp_path))]
    native._library(compiler)
    (used,) = cache.iterdir()
    now = time.time()
    for days in (59, 0.5):
        os.utime(used, (0, now - days * native.DAY))
        before = used.stat().st_mtime
        native._library(compiler)
        assert (used.stat().st_mtime > before) == (days > 1)
    unused, lately, other = cache / "native-0-0.so", cache / "native-1-1.so", cache / "other.so"
    for file, days in ((unused, 61), (lately, 59), (other, 61)):
        file.touch()
        os.utime(file, (0, now - days * native.DAY))
    native._library(compiler)
    assert unused.exists()
    new = native._compile(compiler, cache / "native-2")
    assert set(cache.iterdir()) == {used, lately, other, new}


def test_a_compiler_that_took_too_long_is_left_alone_for_a_day(tmp_path, cache, monkeypatch):
    calls, compiler = [], tmp_path / "c++"

    def too_slow(command, timeout, **options):
        calls.append(command)
        raise subprocess.TimeoutExpired(command, timeout)

    compiler.touch(0o755)
    monkeypatch.delenv(native.SETTING, raising=False)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(subprocess, "run", too_slow)
    prepare = native._prepare.__wrapped__  # as another process does
    assert prepare() == f"{compiler} took more than 120 s"
    (left,) = cache.iterdir()
    assert prepare().startswith(f"{compiler} took more than 120 s the last time; ")
    assert prepare().endswith(f" once {left} is deleted")
    assert len(calls) == 1
    os.utime(left, (0, time.time() - 2 * native.DAY))
    assert prepare() == f"{compiler} took more than 120 s"
    assert len(calls) == 2
