"""Every wrong request: its exit code, one to three lines that name the thing and the mend, and nothing written."""

import gzip
import json
import resource
import shutil

import pytest

LIMITABLE = pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="files cannot be limited here")
TRAIN = ["train", "tiny.yaml", "--out", "new/out"]
GENERATE = ["generate", "run", "--prompt", "the "]

# What is asked -> what the complaint must say.
REQUESTS = {
    # A misspelled key, command, option, recipe or preset.
    "a key of the model": ([*TRAIN, "model.num_layer=2"], "model.num_layer: no such key; did you mean 'num_layers'?"),
    "a key of a part": ([*TRAIN, "model.attention.num_hedas=2"], "did you mean 'num_heads'?"),
    "a key of the optimizer": ([*TRAIN, "training.optimizer.learning_rte=1"], "did you mean 'learning_rate'?"),
    "a key without its room": ([*TRAIN, "steps=2"], "did you mean 'training.steps'?"),
    "a kind": ([*TRAIN, "model.norm=rmsnrm"], "no kind 'rmsnrm'; did you mean 'rmsnorm'?"),
    "a choice": ([*TRAIN, "tokenizer.kind=chra"], "'char', 'byte', 'bpe', 'file', 'hf' or 'initial', not 'chra'"),
    "a preset within a recipe": ([*TRAIN, "model.preset=gtp2"], "no preset 'gtp2'; did you mean 'gpt2'?"),
    "a command": (["trian"], "no command 'trian'; did you mean 'train'?"),
    "a command's command": (["tokenizer", "trian"], "No such command 'trian'. Did you mean 'train'?"),
    "an option": (
        ["generate", "run", "--promt", "a"],
        "No such option '--promt'. (Did you mean",
    ),
    "a recipe": (["train", "dmeo", "--out", "new"], "no recipe 'dmeo'; did you mean 'demo'?"),
    "a preset to show": (["show", "gtp2"], "no preset, recipe, model or .yaml file 'gtp2'; did you mean 'gpt2'?"),
    "a preset to generate with": (["generate", "gtp2", "--prompt", "a"], "did you mean 'gpt2'?"),
    "a setting by its short name": (
        [*TRAIN, "training.lr=1"],
        "training.lr: no such key; did you mean 'optimizer.learning_rate'?",
    ),
    "a key without model": (["show", "gpt2", "num_layers=4"], "a model without a run; write model.num_layers=4"),
    "no --out": (["train", "tiny.yaml"], "Missing option '--out'.\nfor example: polygpt train own_text data.path="),
    "no --out and a key": (
        ["train", "demo", "trainig.steps=5"],
        "trainig: no such key; did you mean 'training'?",
    ),
    "no --prompt": (["generate", "run"], "Missing option '--prompt'.\nfor example: polygpt generate runs/notes"),
    "a type by its short name": ([*GENERATE, "--dtype", "bf16"], "did you mean 'bfloat16'?"),
    "a task by a near name": (
        ["eval", "run", "--task", "perplexty", "--data", "tiny.yaml"],
        "--data does not go with --task perplexty; did you mean 'perplexity'?",
    ),
    # Shapes and numbers.
    "heads that do not divide": (
        [*TRAIN, "model.embed_dim=65", "model.attention.num_heads=4"],
        "embed_dim=65 is not divisible by num_heads=4; change one of them or set attention.head_dim",
    ),
    "kv heads that do not divide": (
        [*TRAIN, "model.attention={num_heads: 4, num_kv_heads: 3}"],
        "num_kv_heads must be 1, 2 or 4, not 3",
    ),
    "an odd head under rope": ([*TRAIN, "model.attention.head_dim=5"], "head_dim=5 is not even"),
    "a pattern longer than the model": ([*TRAIN, "model.pattern=[{}, {}]"], "pattern has 2 entries but num_layers=1"),
    "an empty pattern": ([*TRAIN, "model.pattern=[]"], "pattern is empty"),
    "no attention": ([*TRAIN, "model.attention="], "attention is required: layer 0 has none"),
    "not a number": ([*TRAIN, "training.optimizer.learning_rate=.nan"], "a finite number is needed, not .nan"),
    "infinity": ([*TRAIN, "training.clip_norm=.inf"], "training.clip_norm: a finite number is needed, not .inf"),
    "infinity within": (
        [*TRAIN, "model.norm={kind: rmsnorm, eps: .inf}"],
        "model.norm.eps: a finite number is needed, not .inf",
    ),
    "a negative rate": ([*TRAIN, "training.optimizer.learning_rate=-1"], "greater than 0, not -1"),
    "negative steps": ([*TRAIN, "training.steps=-5"], "training.steps: must be greater than 0, not -5"),
    "no steps": ([*TRAIN, "training.steps=0"], "training.steps: must be greater than 0, not 0"),
    "half a step": ([*TRAIN, "training.steps=1.5"], "training.steps: must be a valid integer, not 1.5"),
    "too large a seed": ([*TRAIN, "training.seed=4294967296"], "training.seed: must be less than 4294967296"),
    "a stride of nothing": ([*TRAIN, "data.stride=0"], "data.stride: must be greater than or equal to 1"),
    "dropout of all": ([*TRAIN, "model.dropout=1"], "model.dropout: must be less than 1, not 1"),
    "no value": ([*TRAIN, "training.steps="], "training.steps: must be a valid integer, not None"),
    # Words that are no settings.
    "a stray word": ([*TRAIN, "foo"], "'foo': settings are written key=value"),
    "a setting as an option": (
        [*TRAIN, "--steps", "300"],
        "no option --steps: settings are written training.steps=300",
    ),
    "a setting as an option with =": (["show", "gpt2", "--num-layers=3"], "settings are written model.num_layers=3"),
    "a kind beside a field of it": (
        [*TRAIN, "model.norm=rmsnorm", "model.norm.eps=1e-6"],
        "write model.norm={kind: rmsnorm, eps: 1e-6}",
    ),
    "a setting twice": ([*TRAIN, "training.steps=1", "training.steps=2"], "training.steps: given twice"),
    "a setting cut short": ([*TRAIN, "training.steps=["], "training.steps line 1: "),
    "no out": (["train", "tiny.yaml"], "Missing option '--out'"),
    "no recipe": (["train", "--out", "new"], "name a recipe or a .yaml file, or continue a run with --resume"),
    "an extra word": ([*GENERATE, "more"], "'more': settings are written key=value"),
    "no model": (["generate", "--prompt", "a"], "Missing argument 'MODEL'"),
    "no prompt": (["generate", "run"], "Missing option '--prompt'"),
    "a vocabulary that is no number": (["tokenizer", "train", "text.txt", "--vocab-size", "x", "--out", "t"], "'x'"),
    # Configuration files.
    "a file that is missing": (["train", "missing.yaml", "--out", "new"], "missing.yaml: cannot be read"),
    "a file that is a list": (["train", "list.yaml", "--out", "new"], "list.yaml: a mapping is needed, not list"),
    "a file that is empty": (["train", "empty.yaml", "--out", "new"], "empty.yaml: a mapping is needed"),
    "a file with a key twice": (["train", "twice.yaml", "--out", "new"], "twice.yaml line 2: found duplicate key"),
    "a file that is no YAML": (["train", "broken.yaml", "--out", "new"], "broken.yaml line "),
    "a file that is no text": (["train", "latin.yaml", "--out", "new"], "latin.yaml: not UTF-8"),
    "a file without a model": (["train", "halved.yaml", "--out", "new"], "model: this key is required"),
    "a file whose model is a list": (["show", "models.yaml"], "models.yaml: model: a mapping is needed"),
    "a setting that is not shown": (["show", "gpt2", "training.steps=4"], "write model.KEY=VALUE"),
    # Data.
    "data that is missing": ([*TRAIN, "data.path=missing.txt"], "missing.txt: no such file"),
    "a glob of nothing": ([*TRAIN, "data.path=*.zst"], "*.zst: no file matches"),
    "a folder of nothing": ([*TRAIN, "data.path=nothing"], "nothing: no file in it ends in"),
    "data that is empty": ([*TRAIN, "data.path=empty.txt"], "empty.txt: no text in it"),
    "data shorter than a window": ([*TRAIN, "data.path=short.txt"], "one window needs 17"),
    "a window longer than the data": ([*TRAIN, "model.context_length=100000"], "one window needs 100001"),
    "no validation to speak of": ([*TRAIN, "data.validation_fraction=1e-9"], "validation"),
    "data that is not UTF-8": ([*TRAIN, "data.path=latin.txt"], "latin.txt: 1 of 1 documents are not UTF-8"),
    "data of no known kind": ([*TRAIN, "data.path=tiny.yaml"], "tiny.yaml: unknown kind of file"),
    "a device": ([*TRAIN, "data.path=/dev/null"], "/dev/null: not a regular file"),
    "a gzip file cut short": ([*TRAIN, "data.path=cut.txt.gz"], "cut.txt.gz: not a whole gzip file"),
    "lines that are no JSON": ([*TRAIN, "data.path=bad.jsonl"], "bad.jsonl line 2: not JSON"),
    "lines without text": ([*TRAIN, "data.path=other.jsonl"], "no key 'text'; its keys are: body"),
    "a truncated shard": ([*TRAIN, "data.path=run-cut/data"], "train-00000.tokens: has"),
    "an edited shard": ([*TRAIN, "data.path=run-edited/data"], "train-00000.tokens: changed since it was prepared"),
    "sources mixed with shards": ([*TRAIN, "data.path=[run/data, text.txt]"], "prepared shards"),
    # Tokenizers.
    "a tokenizer that is missing": ([*TRAIN, "tokenizer={kind: file, path: no.json}"], "no.json: no such file"),
    "a tokenizer that is none": ([*TRAIN, "tokenizer={kind: file, path: text.txt}"], "text.txt: not JSON"),
    "a vocabulary larger than the model's": ([*TRAIN, "model.vocab_size=9"], "model.vocab_size=9 is smaller than"),
    "a tokenizer that lacks characters": (
        [*TRAIN, "tokenizer={kind: file, path: abc.json}"],
        "has no token in this tokenizer",
    ),
    "a tokenizer that did not make the shards": (
        [*TRAIN, "data.path=run/data", "tokenizer={kind: file, path: abc.json}"],
        "prepared with another tokenizer",
    ),
    "a run whose tokenizer was changed": (["train", "--resume", "--out", "run-abc"], "prepared with another tokenizer"),
    "a run whose tokenizer is larger than its model": (
        ["generate", "run-bytes", "--prompt", "a"],
        "the tokenizer has 257 ids, the model",
    ),
    "a run whose tokenizer is gone": (["generate", "run-mute", "--prompt", "a"], "tokenizer.json: no such file"),
    # Folders of runs.
    "an out that is not UTF-8": (["train", "tiny.yaml", "--out", "new/a\udcff"], "not UTF-8, so no checkpoint can be"),
    "an out that exists": (["train", "tiny.yaml", "--out", "run"], "run: exists already; continue it with --resume"),
    "an out that is a file": (["train", "tiny.yaml", "--out", "text.txt"], "text.txt: exists and is no run"),
    "a demo's out that exists": (["demo", "--short", "--out", "run"], "run: exists already"),
    "shards' out that exists": (
        ["data", "prepare", "text.txt", "--tokenizer", "abc.json", "--out", "run"],
        "run: exists already",
    ),
    "a tokenizer's out that exists": (["tokenizer", "train", "text.txt", "--out", "run"], "exists already"),
    "a page that exists": (["show", "run", "--html", "text.txt"], "text.txt: exists already; choose another name"),
    "a page that is a folder": (["show", "gpt2", "--html", "run"], "run: exists already; choose another name"),
    "a page of a run without weights": (
        ["show", "run-empty", "--html", "new/p.html"],
        "run-empty: no usable checkpoint",
    ),
    "to go on without a run": (["train", "--resume", "--out", "none"], "none: no run here (it has no config.yaml)"),
    "to go on with a folder": (["train", "--resume", "--out", "nothing"], "nothing: no run here"),
    "to go on with another model": (
        ["train", "--resume", "model.embed_dim=32", "--out", "run"],
        "embed_dim=16, not 32",
    ),
    "to go on with a truncated shard": (["train", "--resume", "--out", "run-cut"], "train-00000.tokens: has"),
    "to go on with an edited shard": (["train", "--resume", "--out", "run-edited"], "train-00000.tokens: changed"),
    "to generate from no run": (["generate", "none", "--prompt", "a"], "no model 'none'"),
    "to generate from a file": (["generate", "text.txt", "--prompt", "a"], "text.txt: not a model; name a .gguf file"),
    "to generate without a checkpoint": (
        ["generate", "run-empty", "--prompt", "a"],
        "run-empty: no usable checkpoint; train it with: polygpt train --resume --out run-empty",
    ),
    "to generate text from random weights": (["generate", "bigram", "--prompt", "a"], "this model has no tokenizer"),
    # Prompts and how they are continued.
    "an empty prompt": (["generate", "run", "--prompt", ""], "the prompt is empty"),
    "a prompt with a letter it lacks": (["generate", "run", "--prompt", "the \N{SNOWMAN}"], "'☃' (U+2603) at index 4"),
    "a prompt that is no text": (["generate", "run", "--prompt", "a\udcff"], "--prompt: not UTF-8 text (character 1)"),
    "a prompt longer than the context": (["generate", "run", "--prompt", "the " * 5], "the prompt has 20 tokens"),
    "no new tokens": (
        [*GENERATE, "--max-new-tokens", "0"],
        "max_new_tokens must be a whole number of at least 1",
    ),
    "negative new tokens": (
        [*GENERATE, "--max-new-tokens", "-3"],
        "of at least 1, not -3",
    ),
    "a negative temperature": (
        [*GENERATE, "--temperature", "-1"],
        "temperature: must be greater than or equal",
    ),
    "a temperature that is no number": ([*GENERATE, "--temperature", "nan"], "temperature: must be a finite"),
    "a top-p of nothing": ([*GENERATE, "--top-p", "0"], "top_p: must be greater than 0"),
    "a top-p above all": ([*GENERATE, "--top-p", "2"], "top_p: must be less than or equal to 1"),
    "a top-k of nothing": ([*GENERATE, "--top-k", "0"], "top_k: must be greater than 0"),
    "a min-p of all": ([*GENERATE, "--min-p", "1"], "min_p: must be less than 1"),
    "a negative seed": ([*GENERATE, "--seed", "-1"], "'--seed'"),
    "too large a seed to generate": ([*GENERATE, "--seed", str(10**30)], "'--seed'"),
}

# Requests in order that cannot be carried out.
FAILURES = {
    "an out below a file": (["train", "tiny.yaml", "--out", "text.txt/out"], "text.txt/out: cannot be written"),
    "an out where nothing can be": (["train", "tiny.yaml", "--out", "/proc/no/out"], "/proc/no/out: cannot be written"),
    "a page below a file": (["show", "gpt2", "--html", "text.txt/page"], "text.txt/page: cannot be written"),
    "a page where nothing can be": (["show", "gpt2", "--html", "/proc/no/page"], "/proc/no/page: cannot be written"),
    "a tokenizer below a file": (["tokenizer", "train", "text.txt", "--out", "text.txt/t"], "text.txt/t"),
    "shards below a file": (
        ["data", "prepare", "text.txt", "--tokenizer", "run", "--out", "text.txt/shards"],
        "text.txt/shards: cannot be written",
    ),
}


@pytest.fixture(scope="module")
def mess(tiny_run, tiny_files, tmp_path_factory):
    """A folder of good files and bad ones, which no request of this file may change."""
    from polygpt.tokenizers import TokenizerConfig, train_tokenizer

    folder = tmp_path_factory.mktemp("mess")
    for name in ("text.txt", "tiny.yaml"):
        shutil.copy(tiny_files / name, folder)
    texts = {
        "list.yaml": "- a\n- b\n",
        "empty.yaml": "",
        "twice.yaml": "training: {}\ntraining: {}\n",
        "broken.yaml": "model: [\n",
        "halved.yaml": "training: {steps: 1, batch_size: 1}\n",
        "models.yaml": "model: [1, 2]\n",
        "empty.txt": "",
        "short.txt": "too short",
        "bad.jsonl": '{"text": "a"}\n{"text": \n',
        "other.jsonl": '{"body": "a"}\n',
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.yaml").write_bytes(b"a: \xe9\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"the cat " * 999)[:-9])
    (folder / "nothing").mkdir()
    (folder / "nothing/picture.png").write_bytes(b"")
    train_tokenizer(TokenizerConfig(kind="char"), ["abc"]).save(folder / "abc.json")
    for name in ("", "-cut", "-edited", "-abc", "-bytes", "-mute", "-empty", "-flipped"):
        shutil.copytree(tiny_run, folder / f"run{name}")
    tokens = "data/train-00000.tokens"
    data = (tiny_run / tokens).read_bytes()
    (folder / "run-cut" / tokens).write_bytes(data[:-2])
    (folder / "run-edited" / tokens).write_bytes(data[:-2] + b"\0\1")
    shutil.copy(folder / "abc.json", folder / "run-abc/tokenizer.json")
    train_tokenizer(TokenizerConfig(kind="byte"), []).save(folder / "run-bytes/tokenizer.json")
    for name in ("", "-cut", "-edited"):  # a folder of shards carries the tokenizer that made it
        shutil.copy(tiny_run / "tokenizer.json", folder / f"run{name}/data")
    (folder / "run-mute/tokenizer.json").unlink()
    shutil.rmtree(folder / "run-empty/checkpoints")
    flipped = next((folder / "run-flipped/checkpoints/step_00000006/params/d").iterdir())
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def untouched(mess, snapshot):
    return snapshot(mess)


@pytest.fixture
def refused(mess, untouched, snapshot, program, monkeypatch):
    """`refused(words, code)`: the complaint about a request, which leaves the folder as it was."""
    monkeypatch.chdir(mess)

    def call(words, code):
        done = program(*words)
        assert done.code == code, done
        assert done.out == ""
        assert "Traceback" not in done.err
        assert 1 <= len(done.complaint) <= 3
        assert all(len(line) < 400 for line in done.complaint)
        assert snapshot(mess) == untouched
        return "\n".join(done.complaint)

    return call


@pytest.mark.parametrize(("words", "said"), REQUESTS.values(), ids=REQUESTS)
def test_a_wrong_request_is_refused(refused, words, said):
    assert said in refused(words, code=2)


@pytest.mark.parametrize(("words", "said"), FAILURES.values(), ids=FAILURES)
def test_a_request_that_cannot_be_carried_out_fails(refused, words, said):
    assert said in refused(words, code=1)


def test_a_flipped_byte_is_named_and_the_step_before_is_used(mess, program, monkeypatch):
    monkeypatch.chdir(mess)
    words = ["--prompt", "the ", "--temperature", "0", "--max-new-tokens", "8", "--json"]
    done = program("generate", "run-flipped", *words)
    assert done.code == 0
    assert "warning: run-flipped/checkpoints/step_00000006/params/d/" in done.err
    assert "trying the step before it" in done.err
    shutil.copytree(mess / "run-flipped", mess / "run-before")
    shutil.rmtree(mess / "run-before/checkpoints/step_00000006")
    before = program("generate", "run-before", *words)
    shutil.rmtree(mess / "run-before")
    assert json.loads(done.out)["tokens"] == json.loads(before.out)["tokens"]
    assert before.err == ""


def test_every_step_damaged_is_no_model(run, program):
    for info in run.glob("checkpoints/*/info.json"):
        info.write_text("{}")
    done = program("generate", run, "--prompt", "a")
    assert (done.code, done.err.count("warning: ")) == (2, 2)
    assert "no usable checkpoint" in done.complaint[0]


@LIMITABLE
@pytest.mark.parametrize("limit", [0, 3_000])
def test_a_disk_that_is_full_from_the_start_leaves_nothing(workdir, process, snapshot, limit):
    before = snapshot(workdir)
    done = process("train", "tiny.yaml", "--out", "new/out", largest_file=limit)
    assert done.code == 1
    assert "cannot be written (File too large)" in done.complaint[0]
    assert snapshot(workdir) == before


@LIMITABLE
def test_a_disk_that_fills_up_leaves_the_last_good_step(run, process, program):
    steps = {path.name for path in (run / "checkpoints").iterdir()}
    largest = max(path.stat().st_size for path in run.rglob("checkpoints/**/*") if path.is_file())
    words = ["train", "--resume", "training.steps=8", "--out", run]
    done = process(*words, largest_file=largest // 2)
    assert done.code == 1, done.err
    assert done.complaint[0].endswith("cannot be saved (File too large); earlier checkpoints are intact")
    assert "Traceback" not in done.err
    assert {path.name for path in (run / "checkpoints").iterdir()} == steps
    done = program(*words, "--json")
    assert (done.code, json.loads(done.out)["steps"]) == (0, 8)
