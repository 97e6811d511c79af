"""`polygpt import` and `polygpt export`: what they tell; every mistake in one to three lines, nothing written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from foreign import with_tokenizer
from make_references import REFERENCES

import polygpt


@pytest.fixture
def theirs(workdir):
    """`theirs` with a tokenizer, `bare` without one, in the current folder."""
    shutil.copytree(REFERENCES / "gpt2", workdir / "bare")
    return with_tokenizer(workdir / "theirs")


def test_a_folder_is_imported_generated_with_and_exported(theirs, program):
    done = program("import", "theirs", "--out", "m", "--json")
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
    facts = json.loads(done.out)
    assert (facts["format"], facts["architecture"], facts["dtype"]) == ("huggingface", "LlamaForCausalLM", "float32")
    assert (facts["tokenizer"], facts["source"]) == ("char", "theirs")
    words = ["--prompt", "ab", "--temperature", "0", "--max-new-tokens", "4", "--json"]
    texts = [json.loads(program("generate", name, *words).out)["tokens"] for name in ("theirs", "m")]
    assert texts[0] == texts[1]
    done = program("export", "m", "--format", "hf", "--out", "x", "--json")
    assert json.loads(done.out)["architecture"] == "LlamaForCausalLM"
    assert (theirs / "model.safetensors").read_bytes()[-2000:] == Path("x/model.safetensors").read_bytes()[-2000:]
    assert json.loads(program("generate", "x", *words).out)["tokens"] == texts[0]


def test_what_is_told_to_a_person(theirs, program):
    done = program("import", "theirs", "--out", "m")
    assert "architecture  LlamaForCausalLM" in done.out
    assert done.out.splitlines()[-1].startswith("next")
    done = program("export", "m", "--format", "hf", "--out", "x")
    assert "architecture  LlamaForCausalLM" in done.out


def test_a_gguf_file_is_written_in_its_own_default_type_and_read(theirs, program):
    (theirs / "tokenizer.json").unlink()
    done = program("export", "theirs", "--format", "gguf", "--out", "m.gguf", "--json")
    assert (json.loads(done.out)["architecture"], done.code) == ("llama", 0)
    back, first = polygpt.load("m.gguf"), polygpt.load("theirs")
    assert np.array_equal(np.asarray(back.params["embedding"]), np.asarray(first.params["embedding"]))


def test_settings_that_keep_shapes_can_be_changed(theirs, program):
    words = ["model.vocab_size=64", "model.context_length=20", "--dtype", "bfloat16"]
    assert program("import", "theirs", *words, "--out", "m", "--json").code == 0
    lm = polygpt.load("m")
    assert (lm.config.vocab_size, lm.config.vocab_padding, lm.config.context_length) == (64, 14, 20)
    assert lm.config.param_dtype == lm.config.compute_dtype == "bfloat16"
    assert program("export", "m", "--format", "hf", "--dtype", "float32", "--out", "x").code == 0
    assert len({path.stat().st_mode for path in Path("x").iterdir()}) == 1  # nothing is its owner's alone
    back, first = polygpt.load("x"), polygpt.load("theirs", dtype="bfloat16")
    assert (back.config.vocab_size, back.config.param_dtype) == (50, "float32")
    assert np.array_equal(np.asarray(back.params["embedding"]), np.asarray(first.params["embedding"], np.float32))


IMPORT, EXPORT = ["import", "theirs", "--out", "new"], ["export", "theirs", "--format", "hf", "--out", "new"]
# What is asked -> exit code, what the complaint must say.
REQUESTS = {
    "out exists": (["import", "theirs", "--out", "bare"], 2, "bare: exists already; choose another --out"),
    "out of export exists": ([*EXPORT[:-1], "bare"], 2, "bare: exists already; choose another --out"),
    "no source": (["import", "nothing", "--out", "new"], 2, "no model 'nothing'"),
    "a source that is text": (["import", "text.txt", "--out", "new"], 2, "text.txt: not a model; name a .gguf file"),
    "a folder of nothing": (["import", ".", "--out", "new"], 2, "no model here (neither config.yaml nor config.json)"),
    "a type": ([*IMPORT, "--dtype", "float64"], 2, "'float64' is not one of 'float32', 'bfloat16', 'float16'"),
    "a type of export": ([*EXPORT, "--dtype", "q8_0"], 2, "--dtype q8_0: not a type of --format hf"),
    "a format": (["export", "theirs", "--format", "onnx", "--out", "new"], 2, "'onnx' is not one of 'hf', 'gguf'"),
    "no format": (["export", "theirs", "--out", "new"], 2, "Missing option '--format'"),
    "another width": ([*IMPORT, "model.embed_dim=32"], 2, "in the model asked for; remove the override"),
    "fewer ids": ([*IMPORT, "model.vocab_size=49"], 2, "model.vocab_size=49: this model has 50 ids, and none can be"),
    "ids that are none": ([*IMPORT, "model.vocab_size=x"], 2, "model.vocab_size: must be a valid integer, not 'x'"),
    "a key": ([*IMPORT, "model.num_layer=1"], 2, "did you mean 'num_layers'?"),
    "a key of a run": ([*IMPORT, "training.steps=1"], 2, "this is a model without a run; write model.KEY=VALUE"),
    "no tokenizer": (["generate", "bare", "--prompt", "a"], 2, "this model has no tokenizer"),
    "no template": (["generate", "theirs", "--prompt", "a", "--chat"], 2, "this model came without a chat template"),
    "a preset without counterpart": (
        ["export", "modular", "--format", "hf", "--out", "new"],
        2,
        "has no counterpart",
    ),
}


@pytest.mark.parametrize(("words", "code", "message"), REQUESTS.values(), ids=REQUESTS)
def test_a_mistake_is_told_and_nothing_is_written(theirs, workdir, program, snapshot, words, code, message):
    before = snapshot(workdir)
    done = program(*words)
    assert message in done.err
    assert (done.code, done.out) == (code, "")
    assert 1 <= len(done.complaint) <= 3
    assert snapshot(workdir) == before


def test_a_full_disk_leaves_nothing_half_written(theirs, workdir, process, snapshot):
    before = snapshot(workdir)
    for words in (IMPORT, EXPORT):
        done = process(*words, largest_file=9000, cwd=workdir)
        assert done.code == 1
        assert 1 <= len(done.complaint) <= 3
        assert snapshot(workdir) == before
