"""`hf:owner/name` against a hub on this machine: what comes, is kept, is refused."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
from hub_server import Hub, commit_of, serving
from make_references import REFERENCES

from polygpt.tokenizers import TokenizerConfig, load_tokenizer, train_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?'-\nABCDEFGHIJKLMNOP"  # 50, as the references' ids


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two revisions of a model; the second has another head, a tokenizer, and files that are not to be fetched."""
    root = tmp_path_factory.mktemp("hub")
    for name, reference in (("first", "llama"), ("second", "qwen2")):
        shutil.copytree(REFERENCES / reference, root / name)
    train_tokenizer(TokenizerConfig(kind="char"), [LETTERS]).save(root / "second/tokenizer.json")
    (root / "second/pytorch_model.bin").write_bytes(b"not to be fetched")
    (root / "second/modeling.py").write_text("raise SystemExit('ran')")
    (root / "bare").mkdir()
    (root / "bare/README.md").write_text("nothing")
    return root


@pytest.fixture
def hub(folders):
    models = {
        "tiny/model": {"main": folders / "second", "v1": folders / "first"},
        "tiny/bare": {"main": folders / "bare"},
    }
    with serving(Hub(models)) as served:
        yield served


@pytest.fixture
def surroundings(hub, tmp_path):
    """An environment with the hub's address and a cache below `tmp_path`."""
    ours = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_TELEMETRY": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "POLYGPT_MAX"))}
    return kept | ours


@pytest.fixture
def polygpt(program, surroundings, monkeypatch, tmp_path):
    """`polygpt(*words, **changes)` in this process, with changes of the environment and the library loaded anew: it
    reads the environment once."""
    monkeypatch.chdir(tmp_path)

    def forget():
        names = [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]
        return {name: sys.modules.pop(name) for name in names}

    def call(*words, **changes):
        forget()
        logging.getLogger("huggingface_hub").handlers.clear()  # they hold the standard error of another test
        with monkeypatch.context() as patched:
            patched.setattr(os, "environ", surroundings | changes)
            return program(*words)

    before = forget()
    yield call
    forget()
    sys.modules.update(before)  # other tests patch the library that they have imported


def test_a_model_is_imported_and_afterwards_read_without_the_hub(polygpt, process, surroundings, hub, tmp_path):
    done = process("import", "hf:tiny/model", "--out", "m", "--json", env=surroundings, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    facts = json.loads(done.out)
    assert (facts["source"], facts["architecture"], facts["tokenizer"]) == ("hf:tiny/model", "Qwen2ForCausalLM", "char")
    assert not any("pytorch_model" in request or "modeling" in request for request in hub.requests)
    assert any(request.startswith("GET") and "model.safetensors" in request for request in hub.requests)
    hub.requests.clear()
    # Once more: nothing is fetched twice.
    words = ["generate", "hf:tiny/model", "--prompt", "ab", "--max-new-tokens", "3", "--temperature", "0", "--json"]
    first = polygpt(*words)
    assert first.code == 0
    assert not any(request.startswith("GET") and "resolve" in request for request in hub.requests)
    hub.requests.clear()
    offline = polygpt(*words, HF_HUB_OFFLINE="1")
    assert offline.code == 0
    assert hub.requests == []
    assert json.loads(offline.out)["tokens"] == json.loads(first.out)["tokens"]
    from_import = polygpt("generate", "m", *words[2:])
    assert json.loads(from_import.out)["tokens"] == json.loads(first.out)["tokens"]


def test_the_cache_serves_when_the_hub_is_gone(polygpt, tmp_path):
    assert polygpt("import", "hf:tiny/model", "--out", "m").code == 0
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    assert polygpt("import", "hf:tiny/model", "--out", "again", **gone).code == 0
    assert polygpt("import", "hf:tiny/model", "--out", "unreachable", HF_ENDPOINT=gone["HF_ENDPOINT"]).code == 0
    done = polygpt("import", "hf:tiny/other", "--out", "other", **gone)
    assert (done.code, len(done.complaint)) == (1, 1)
    assert "not in the cache, and the hub cannot be reached" in done.err
    assert not (tmp_path / "other").exists()


def test_a_revision_is_another_model(polygpt, folders):
    for revision in ("v1", commit_of(folders / "first")):
        done = polygpt("import", f"hf:tiny/model@{revision}", "--out", revision[:4], "--json")
        assert json.loads(done.out)["architecture"] == "LlamaForCausalLM"


def test_a_tokenizer_by_name_trains_a_model(polygpt, hub, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 100)
    small = ["model.context_length=8", "model.embed_dim=8", "model.num_layers=1", "model.attention.num_heads=1"]
    small += ["model.attention.num_kv_heads=1", "model.feedforward.mlp_dim=8", "training.batch_size=1"]
    words = ["train", "own_text", "data.path=text.txt", *small, "training.steps=1", "training.eval_batches=1"]
    done = polygpt(*words, "tokenizer={name: tiny/model}", "--out", "run", "--json")
    assert done.code == 0, done.err
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer.vocab_size == len(LETTERS)
    assert not any("model.safetensors" in request for request in hub.requests)  # the weights are not fetched
    prepared = polygpt(
        "data", "prepare", "text.txt", "--tokenizer", "hf:tiny/model", "--out", "shards", "--split", "fraction"
    )
    assert prepared.code == 0, prepared.err
    assert load_tokenizer(tmp_path / "shards").encode("cat") == tokenizer.encode("cat")
    refused = polygpt(*words, "tokenizer={name: tiny/nothing}", "--out", "other")
    assert (refused.code, len(refused.complaint)) == (2, 1)
    assert "hf:tiny/nothing: no such tokenizer on the hub" in refused.err
    assert not (tmp_path / "other").exists()


# source, environment, what is served wrongly -> exit code, what the complaint must say
REFUSED = {
    "another model": ("hf:tiny/none", {}, 2, "hf:tiny/none: no such model on the hub, or it is private (set HF_TOKEN)"),
    "another revision": ("hf:tiny/model@v9", {}, 2, "hf:tiny/model@v9: the model has no revision 'v9'"),
    "no model": ("hf:tiny/bare", {}, 2, "it has no config.json, so it is not a model of the transformers library"),
    "no name": ("hf:tiny", {}, 2, "'hf:tiny' is not of the form hf:owner/name or hf:owner/name@revision"),
    "a path": ("hf:../model", {}, 2, "'hf:../model'"),
    "too much": (
        "hf:tiny/model",
        {"POLYGPT_MAX_DOWNLOAD_GB": "1e-6"},
        2,
        "to download, more than 1e-06; raise POLYGPT",
    ),
    "no limit": (
        "hf:tiny/model",
        {"POLYGPT_MAX_DOWNLOAD_GB": "much"},
        2,
        "POLYGPT_MAX_DOWNLOAD_GB=much is not a number",
    ),
    "nan": ("hf:tiny/model", {"POLYGPT_MAX_DOWNLOAD_GB": "nan"}, 2, "POLYGPT_MAX_DOWNLOAD_GB=nan is not a number"),
    "no https": (
        "hf:tiny/model",
        {"HF_ENDPOINT": "http://hub.example"},
        2,
        "HF_ENDPOINT=http://hub.example: must be https",
    ),
    "a host that seems ours": ("hf:tiny/model", {"HF_ENDPOINT": "http://localhost.example"}, 2, "must be https"),
    "no server": ("hf:tiny/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "hf:tiny/model: "),
}


@pytest.mark.parametrize(("source", "environment", "code", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_fetched_is_refused(polygpt, tmp_path, source, environment, code, message):
    done = polygpt("import", source, "--out", "m", **environment)
    assert message in done.err
    assert done.code == code
    assert 1 <= len(done.complaint) <= 3
    assert "Traceback" not in done.err
    assert not (tmp_path / "m").exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_wrong_bytes_are_refused_and_not_kept(polygpt, hub, tmp_path):
    hub.lies.add("model.safetensors")
    done = polygpt("import", "hf:tiny/model", "--out", "m")
    assert (done.code, len(done.complaint)) == (1, 1)
    assert "model.safetensors: the download does not match the SHA-256 that the hub states; try again" in done.err
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    hub.lies.clear()
    assert polygpt("import", "hf:tiny/model", "--out", "m").code == 0


def test_the_library_is_not_loaded_for_what_is_here(process, folders):
    code = "import sys, polygpt; polygpt.load(sys.argv[1]); sys.exit(int('huggingface_hub' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code, folders / "first"], check=False).returncode == 0
