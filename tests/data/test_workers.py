"""Preparation by several processes: the same shards, whatever dies on the way."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from polygpt.data import DataConfig, formats, open_source, prepare, prepare_in_parallel, tasks, workers
from polygpt.errors import PolygptError, RequestError
from polygpt.tokenizers import TokenizerConfig, load_tokenizer, train_tokenizer


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "tokenizer.json"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with about 60 documents in two files."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    documents = ["".join(draw.choices("abc é\n", k=draw.randrange(1, 200))) for _ in range(60)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in ["", *documents[:40]]))
    (folder / "b.txt").write_text("<|endoftext|>".join(documents[40:]))
    return folder


@pytest.fixture
def small(monkeypatch):
    """Parts of 700 bytes."""
    monkeypatch.setattr(formats, "PART_BYTES", 700)


def prepared(text, out, tokenizer, workers=1, **options):
    split = options.pop("split", "document")
    config = DataConfig(path=str(text), split=split, validation_fraction=0.3, workers=workers)
    return prepare_in_parallel(open_source(config), tokenizer, out, config, shard_tokens=1000, **options)


@pytest.mark.parametrize("split", ["document", "fraction"])
def test_any_number_of_workers_prepares_the_same(text, tmp_path, byte_tokenizer, small, split):
    config = DataConfig(path=str(text), split=split, validation_fraction=0.3)
    prepare(open_source(config), byte_tokenizer, tmp_path / "plain", config, shard_tokens=1000)
    plain = files_of(tmp_path / "plain")
    assert len(plain) > 7, "several shards"
    for count in (1, 2, 7) if split == "document" else (1, 2):
        seen = []
        shards = prepared(text, tmp_path / str(count), byte_tokenizer, count, split=split, progress=seen.append)
        assert files_of(tmp_path / str(count)) == plain
        assert len(seen) == seen[-1].parts == seen[-1].of_parts > 10
        assert seen[-1].tokens == shards.train.tokens + shards.validation.tokens
        assert shards.manifest.dropped.empty == 1
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "1", "2", *(["7"] if split == "document" else [])}


def test_a_worker_that_is_killed_is_replaced(text, tmp_path, byte_tokenizer, small, monkeypatch):
    killed = []

    class Killed(workers._Worker):
        def ask(self, task):
            if task in (1, 4) and killed.count(task) < 2:
                killed.append(task)
                self.process.kill()
                self.process.wait()
            super().ask(task)

    monkeypatch.setattr(workers, "_Worker", Killed)
    prepared(text, tmp_path / "killed", byte_tokenizer, 2)
    assert sorted(killed) == [1, 1, 4, 4]
    prepared(text, tmp_path / "one", byte_tokenizer)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "one")


def test_a_part_that_kills_every_worker_ends_the_preparation_and_is_named(
    text, tmp_path, byte_tokenizer, small, monkeypatch
):
    class Killed(workers._Worker):
        def ask(self, task):
            if task == 3:
                self.process.kill()
                self.process.wait()
            super().ask(task)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "_Worker", Killed)
        notes = []
        with pytest.raises(PolygptError, match=r"a\.jsonl from byte 2,100: the process .* died 3 times \(signal 9\)"):
            prepared(text, tmp_path / "out", byte_tokenizer, 2, note=notes.append)
    assert not (tmp_path / "out").exists()
    assert "parts are kept" in notes[-1]
    prepared(text, tmp_path / "out", byte_tokenizer, note=notes.append)
    assert "parts kept from" in notes[-1]
    prepared(text, tmp_path / "one", byte_tokenizer)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


def test_a_preparation_that_is_killed_goes_on_where_it_was(text, tmp_path, byte_tokenizer, small):
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    script = (
        "import sys, time\n"
        "from polygpt.data import DataConfig, formats, open_source, prepare_in_parallel, tasks\n"
        "from polygpt.tokenizers import load_tokenizer\n"
        "formats.PART_BYTES = 700\n"
        "config = DataConfig(path=sys.argv[1], validation_fraction=0.3, workers=2)\n"
        "def progress(now):\n"
        "    print(now.parts, flush=True)\n"
        "    time.sleep(60 if now.parts == 5 else 0)\n"
        "prepare_in_parallel(open_source(config), load_tokenizer(sys.argv[2]), sys.argv[3], config,\n"
        "                    shard_tokens=1000, progress=progress)\n"
    )
    command = [sys.executable, "-c", script, str(text), str(tmp_path / "tokenizer.json"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 5:
                break
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    notes, seen = [], []
    prepared(text, tmp_path / "out", byte_tokenizer, note=notes.append, progress=seen.append)
    kept = int(notes[0].split()[1])
    assert kept >= 5
    assert len(seen) == seen[-1].of_parts - kept
    prepared(text, tmp_path / "one", byte_tokenizer)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")
    assert not (tmp_path / "out.work").exists()


def test_work_of_other_text_or_another_tokenizer_is_not_kept(text, tmp_path, byte_tokenizer, small):
    def stop(progress):
        raise KeyboardInterrupt

    copy = tmp_path / "a.jsonl"
    copy.write_bytes((text / "a.jsonl").read_bytes())
    for change in (lambda: None, lambda: copy.write_bytes((text / "a.jsonl").read_bytes() + b'{"text": "more"}\n')):
        with pytest.raises(KeyboardInterrupt):
            prepared(copy, tmp_path / "out", byte_tokenizer, progress=stop)
        change()
    notes = []
    prepared(copy, tmp_path / "out", byte_tokenizer, note=notes.append)
    assert notes == []
    prepared(copy, tmp_path / "one", byte_tokenizer)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "one")


def test_a_part_of_which_a_byte_is_missing_is_done_again(text, tmp_path, byte_tokenizer, small):
    seen = []

    def stop(progress):
        seen.append(progress)
        if progress.parts == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(text, tmp_path / "out", byte_tokenizer, progress=stop)
    path = tasks.task_folder(tmp_path / "out.work", 1) / "train.tokens"
    path.write_bytes(path.read_bytes()[:-1])
    notes = []
    prepared(text, tmp_path / "out", byte_tokenizer, note=notes.append)
    assert notes[0].startswith("data: 2 of ")


def test_the_first_bad_part_is_named_whatever_the_order(tmp_path, byte_tokenizer, small):
    lines = [json.dumps({"text": "x" * 100})] * 60
    lines[17] = lines[52] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for count in (1, 3):
        with pytest.raises(RequestError, match=r"a\.jsonl from byte 1,400 line 5: not JSON"):
            prepared(tmp_path / "a.jsonl", tmp_path / "out", byte_tokenizer, count)


def test_text_that_is_not_utf_8_is_counted_over_the_file(tmp_path, byte_tokenizer, small):
    line = b'{"text": "' + b"x" * 100 + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes((line * 9 + b'{"text": "\xff"}\n') * 2 + line)
    with pytest.raises(RequestError, match=r"a\.jsonl: 2 of 21 documents are not UTF-8"):
        prepared(tmp_path / "a.jsonl", tmp_path / "out", byte_tokenizer, 2)


def test_workers_do_not_import_jax_and_end_with_their_parent(tmp_path, text, byte_tokenizer, small):
    code = "import sys, polygpt.data.worker; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    config = DataConfig(path=str(text))
    made = tasks.plan(open_source(config), config, "uint16")
    tasks.write_plan(tmp_path, made, byte_tokenizer)
    worker = workers._Worker(tmp_path, 1 << 20, alone=True)
    try:
        worker.ask(0)
        assert "counts" in worker.answer()
        worker.process.stdin.close()
        started = time.monotonic()
        assert worker.process.wait(10) == 0
        assert time.monotonic() - started < 10
    finally:
        worker.process.kill()


@pytest.mark.parametrize("count", [1, 2])
def test_a_disk_that_fills_up_ends_the_preparation_in_a_line_and_what_is_done_is_kept(
    tmp_path, small_disk, byte_tokenizer, monkeypatch, program, count
):
    monkeypatch.setattr(formats, "PART_BYTES", 1 << 20)
    path, out = tmp_path / "a.jsonl", small_disk / "out"
    path.write_text("".join(json.dumps({"text": f"{number} " * 4000}) + "\n" for number in range(200)))
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    words = ["data", "prepare", path, "--tokenizer", tmp_path / "tokenizer.json", "--workers", count, "--out"]
    done = program(*words, out)
    assert (done.code, len(done.complaint)) == (1, 1), done.err
    assert re.search(rf"{small_disk}/\S*: cannot be written \(No space left on device\)$", done.complaint[0])
    assert sorted(found.name for found in small_disk.iterdir()) == ["out.work"]
    kept = sorted(found.name for found in (small_disk / "out.work").iterdir() if found.is_dir())
    assert kept[0] == "000000", "whole parts alone, none half-written"
    assert all(name.isdecimal() for name in kept)
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    done = program(*words, out)
    assert done.code == 0, done.err
    assert f"{len(kept)} of " in done.err
    assert sorted(found.name for found in small_disk.iterdir()) == ["out"]
    assert program(*words, tmp_path / "large").code == 0
    assert files_of(out) == files_of(tmp_path / "large")


@pytest.mark.parametrize("free", [0, 1 << 16])
@pytest.mark.parametrize("count", [1, 2])
def test_a_disk_that_is_full_before_a_part_is_done_is_left_as_it_was(
    tmp_path, small_disk, byte_tokenizer, program, count, free
):
    """With no space at all, and with enough for the plan alone."""
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text("the cat " * 20_000)
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    disk = os.statvfs(small_disk)
    (small_disk / "full").write_bytes(bytes(disk.f_bavail * disk.f_frsize - free))
    words = ["data", "prepare", *paths, "--tokenizer", tmp_path / "tokenizer.json", "--workers", count]
    words += ["--split", "fraction", "--out", small_disk / "new" / "out"]
    done = program(*words)
    assert (done.code, len(done.complaint)) == (1, 1), done.err
    assert re.search(rf"{small_disk}/\S*: cannot be written \(No space left on device\)$", done.complaint[0])
    assert [found.name for found in small_disk.iterdir()] == ["full"]
    (small_disk / "full").unlink()
    assert program(*words).code == 0


def test_a_disk_that_fills_up_before_the_tokenizer_is_saved_leaves_no_shards_without_it(tmp_path, small_disk, program):
    letters = "".join(chr(0x4E00 + number) for number in range(20_000))
    (tmp_path / "a.txt").write_text(letters)
    path, out = tmp_path / "tokenizer.json", small_disk / "out"
    train_tokenizer(TokenizerConfig(kind="char"), [letters]).save(path)
    disk, size = os.statvfs(small_disk), path.stat().st_size
    # Room for the tokenizer beside the plan and for the shards, but not for the tokenizer beside these.
    (small_disk / "full").write_bytes(bytes(disk.f_bavail * disk.f_frsize - size * 7 // 4))
    words = ["data", "prepare", tmp_path / "a.txt", "--tokenizer", path, "--split", "fraction", "--out", out]
    done = program(*words)
    assert (done.code, done.complaint) == (1, [f"{out}/tokenizer.json: cannot be written (No space left on device)"])
    assert sorted(found.name for found in small_disk.iterdir()) == ["full", "out.work"]
    (small_disk / "full").unlink()
    done = program(*words)
    assert done.code == 0, done.err
    assert "1 of 1 parts kept" in done.err
    assert [found.name for found in small_disk.iterdir()] == ["out"]
    assert load_tokenizer(out).fingerprint == load_tokenizer(path).fingerprint


MEMORY = """
import re, sys
from pathlib import Path
from polygpt.data import DataConfig, open_source, tasks
from polygpt.files import remove_folder
from polygpt.tokenizers import load_tokenizer

def memory(name):
    return int(re.search(rf"{name}:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

work, tokenizer = Path(sys.argv[3]), load_tokenizer(sys.argv[2])
config = DataConfig(path=[f"{sys.argv[1]}/short.jsonl", f"{sys.argv[1]}/long.jsonl"], batch_chars=1 << 16)
made = tasks.plan(open_source(config), config, "uint16")
for index in (0, 0, 1, 0, 0):
    remove_folder(work / f"{index:06d}")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    tasks.run_task(work, index, made, tokenizer)
    print(memory("VmRSS"), memory("VmHWM"))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_the_memory_of_a_process_is_bounded_and_flat_after_a_document_of_10_mb(tmp_path):
    words = [f"{number * 7919 % 10007:05d}" for number in range(1000)]
    texts = {"short": [" ".join(words)] * 50, "long": [" ".join(words * 1700)]}
    for name, documents in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    train_tokenizer(TokenizerConfig(vocab_size=300), [" ".join(words)]).save(tmp_path / "tokenizer.json")
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", MEMORY, *map(str, (tmp_path, tmp_path / "tokenizer.json", tmp_path / "work"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    (before, _), (_, peak), (after, _) = rows[1], rows[2], rows[-1]
    assert peak < before + 150, "MB: about ten times the document; 100 bytes a token would be 400 more"
    assert after < before + 25
