"""A run's folder: whole or not there, and what is read back from it."""

import json
import shutil
from pathlib import Path

import pytest

from polygpt.errors import PolygptError, RequestError
from polygpt.recipes import load_recipe
from polygpt.tokenizers import TokenizerConfig, train_tokenizer
from polygpt.training import open_run, read_config, train
from polygpt.training.run_folder import read_lines


def start(out, **changes):
    return train(load_recipe("tiny.yaml", changes), out, listeners=[])


def test_a_run_holds_what_its_description_says(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    described = {"config.yaml", "tokenizer.json", "data", "checkpoints", "metrics.jsonl", "result.json"}
    assert names == described | {"loss.png", "report.html"}
    assert [path.name for path in sorted((tiny_run / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]


def test_the_configuration_written_is_the_resolved_one(tiny_run):
    run = open_run(tiny_run)
    assert run.config.model.vocab_size == run.tokenizer.vocab_size == run.shards.manifest.vocab_size
    assert run.config == read_config(tiny_run)


@pytest.mark.parametrize(
    "changes",
    [
        {"data.path": "missing.txt"},
        {"model.vocab_size": 5},
        {"model.context_length": 10**6},
        {"tokenizer": {"kind": "file", "path": "text.txt"}},
        {"training.samples": {"every": 1, "prompts": ["the ", "\N{SNOWMAN}"]}},
        {"model.head": "none"},
    ],
)
@pytest.mark.parametrize("out", ["run", "new/folders/run"])
def test_a_refused_run_leaves_nothing(workdir, snapshot, changes, out):
    before = snapshot(workdir)
    with pytest.raises(RequestError):
        start(workdir / out, **changes)
    assert snapshot(workdir) == before


@pytest.mark.parametrize("out", ["text.txt/run", "/proc/polygpt/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_made_is_named(workdir, snapshot, out):
    before = snapshot(workdir)
    with pytest.raises(PolygptError, match="run: cannot be written") as error:
        start(out)
    assert error.value.exit_code == 1
    assert snapshot(workdir) == before


def numbers(run):
    lines = read_lines(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def test_data_that_was_removed_is_prepared_again(run, workdir, program, snapshot):
    start(workdir / "whole", **{"training.steps": 8})
    before = snapshot(run / "data")
    shutil.rmtree(run / "data")
    with pytest.raises(
        RequestError, match=r"run/data: the prepared data is missing; .* continue with: polygpt train --resume"
    ):
        open_run(run)
    done = program("train", "--resume", "training.steps=8", "--out", run)
    assert done.code == 0, done.err
    assert "run/data is missing; preparing it again from " in done.err
    assert snapshot(run / "data") == before
    assert numbers(run)[-1]["step"] == 8


def test_data_without_its_manifest_is_refused_with_what_resuming_can_do(run):
    (run / "data/manifest.json").unlink()
    with pytest.raises(RequestError, match=r"; or remove run/data, which resuming prepares again$"):
        open_run(run)


def test_any_number_of_workers_prepares_the_same_and_may_change_on_resuming(run, workdir, program, snapshot):
    start(workdir / "two", **{"data.workers": 2})
    two, one = snapshot(workdir / "two/data"), snapshot(run / "data")
    assert len(one) == 6
    assert {**two, "manifest.json": None} == {**one, "manifest.json": None}, "the source's path is in the manifest"
    assert not list(workdir.glob("*.work"))
    done = program("train", "--resume", "training.steps=8", "data.workers=3", "--out", workdir / "two")
    assert done.code == 0, done.err
    assert "data.workers 2 → 3" in done.err


def test_data_that_was_removed_and_whose_source_has_changed_is_refused(run, workdir, program, snapshot):
    source = Path(read_config(run).data.path)
    changed = workdir / "changed.txt"
    changed.write_text(source.read_text() + "the cat sat\n")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(source), str(changed)))
    shutil.rmtree(run / "data")
    before = snapshot(run)
    done = program("train", "--resume", "--out", run)
    assert (done.code, len(done.complaint)) == (2, 1)
    assert "run/data: is missing, and cannot be prepared again" in done.complaint[0]
    assert "now gives other tokens than those of step_00000006" in done.complaint[0]
    assert snapshot(run) == before


def test_data_that_was_removed_with_its_source_names_the_source(run, workdir, program, snapshot):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(read_config(run).data.path, "gone.txt"))
    shutil.rmtree(run / "data")
    before = snapshot(run)
    done = program("train", "--resume", "--out", run)
    assert done.code == 2
    assert "gone.txt: no such file" in done.complaint[0]
    assert snapshot(run) == before


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_text("x")], ids=["folder", "file"])
def test_an_out_that_exists_is_refused(workdir, snapshot, make):
    make(workdir / "run")
    before = snapshot(workdir)
    with pytest.raises(RequestError, match="run: exists and is no run; choose another --out"):
        start(workdir / "run")
    assert snapshot(workdir) == before


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "is empty, and the tokenizer has no end"), ("the cat " * 3, "24 tokens, model.context_length is 16")],
)
def test_a_prompt_that_samples_cannot_start_from_is_refused_before_training(workdir, prompt, message):
    with pytest.raises(RequestError, match=rf"training\.samples\.prompts\.0: .*{message}"):
        start(workdir / "run", **{"training.samples": {"every": 6, "prompts": [prompt]}})


def test_prompts_that_are_never_sampled_are_not_looked_at(workdir):
    start(workdir / "run", **{"training.samples.prompts": ["\N{SNOWMAN}"], "training.steps": 1})


def test_prepared_shards_are_used_where_they_are(workdir, program):
    train_tokenizer(TokenizerConfig(kind="byte"), []).save(workdir / "tokenizer.json")
    words = ["data", "prepare", "text.txt", "--tokenizer", "tokenizer.json", "--out", "shards", "--split", "fraction"]
    assert program(*words).code == 0
    result = start(workdir / "run", **{"data.path": "shards", "training.steps": 2})
    assert result.steps == 2
    assert not (workdir / "run/data").exists()
    assert open_run(workdir / "run").tokenizer.kind == "byte"
    with pytest.raises(RequestError, match="shards: prepared with another tokenizer"):
        start(workdir / "other", **{"data.path": "shards", "tokenizer": {"kind": "file", "path": "other.json"}})


@pytest.fixture(autouse=True)
def other_tokenizer(workdir):
    train_tokenizer(TokenizerConfig(kind="char"), ["abc"]).save(workdir / "other.json")


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "data/manifest.json", "data/train-00000.tokens"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_run_whose_files_are_damaged_is_refused_by_name(run, name, damage):
    path = run / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: -path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(RequestError, match=r"^run\S*( line \d+)?: "):
        open_run(run)


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(run, workdir):
    (workdir / "other.json").replace(run / "tokenizer.json")
    with pytest.raises(RequestError, match="prepared with another tokenizer"):
        open_run(run)


def test_lines_come_back_whatever_they_hold_and_a_cut_one_is_left_out(tmp_path):
    lines = [{"step": 1, "text": "a\u2028b\x85c\x0b"}, {"step": 2, "text": "é"}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path = tmp_path / "samples.jsonl"
    path.write_bytes(text.encode())
    assert read_lines(path) == lines
    path.write_bytes(text.encode()[:-4])  # within the é
    assert read_lines(path) == lines[:1]
    assert read_lines(tmp_path / "missing.jsonl") == []


def test_a_run_on_packed_documents_says_how_much_is_padding_and_goes_on_as_it_began(workdir):
    from polygpt.training import Started

    documents = "".join(json.dumps({"text": line}) + "\n" for line in Path("text.txt").read_text().splitlines())
    Path("text.jsonl").write_text(documents)
    config = load_recipe(
        "tiny.yaml", {"data.path": "text.jsonl", "data.packing": "documents", "model.context_length": 80}
    )
    seen = []
    whole = train(config, workdir / "whole", listeners=[seen.append])
    facts = next(event.facts for event in seen if isinstance(event, Started))
    assert facts["packing"].startswith("documents, ")
    assert whole.val_bits_per_byte > 0
