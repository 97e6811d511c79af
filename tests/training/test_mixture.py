"""A run on a mixture of sources: prepared apart, read by weight, validated together and apart, resumed as it was."""

import json
import shutil
from pathlib import Path

import pytest

from polygpt.errors import RequestError
from polygpt.recipes import load_recipe
from polygpt.tokenizers import TokenizerConfig, first_bytes, train_tokenizer
from polygpt.training import Evaluated, Measured, Started, open_run, run_folder, train

SOURCES = [{"path": "text.txt", "weight": 3}, {"path": "b.jsonl", "weight": 1, "name": "other"}]


def mixed(**changes):
    changes = {"data": {"sources": SOURCES, "split": "fraction", "path": "builtin"}, **changes}
    return load_recipe("tiny.yaml", changes)


@pytest.fixture
def sources(workdir):
    Path("b.jsonl").write_text("".join(json.dumps({"text": f"{i} times {i} is {i * i}"}) + "\n" for i in range(60)))
    return workdir


def test_a_mixture_is_prepared_read_and_validated_by_source(sources):
    seen = []
    config = mixed()
    train(config, "run", listeners=[seen.append])
    assert sorted(path.name for path in Path("run/data").iterdir()) == ["other", "text"]
    facts = next(event.facts for event in seen if isinstance(event, Started))
    assert facts["data text"].startswith("75.0% of windows, ")
    measured = [event for event in seen if isinstance(event, Measured)]
    whole = [event for event in seen if isinstance(event, Evaluated)][-1]
    apart = {key: value for event in measured[-2:] for key, value in event.metrics.items()}
    assert set(apart) == {f"{n}/{m}" for n in ("text", "other") for m in ("val_loss", "val_bits_per_byte")}
    assert min(apart["text/val_loss"], apart["other/val_loss"]) < whole.val_loss
    assert max(apart["text/val_loss"], apart["other/val_loss"]) > whole.val_loss
    run = open_run(Path("run"))
    names = list(run.train_loader.loaders)
    assert [names[run.train_loader.mixture.locate(n)[0]] for n in range(8)].count("other") == 2
    held_out = [shards.validation.tokens for shards in run.shards.sources.values()]
    assert run.validation_loader.split.tokens == sum(held_out)


def test_a_bpe_is_trained_on_an_equal_share_of_the_limit_from_each_source(sources):
    config = mixed(tokenizer={"kind": "bpe", "vocab_size": 280, "train_bytes": 400})
    found = run_folder._tokenizer(config, lambda text: None)
    other = [f"{i} times {i} is {i * i}" for i in range(60)]
    texts = [Path("text.txt").read_text()[:200], *first_bytes(other, 200)]
    assert found.fingerprint == train_tokenizer(TokenizerConfig(vocab_size=280), texts).fingerprint


def test_shards_that_were_removed_are_prepared_again(sources):
    train(mixed(), "run", listeners=[])
    before = open_run(Path("run")).train_loader.fingerprint
    shutil.rmtree("run/data/other")
    train(mixed(**{"training.steps": 7}), "run", resume=True, listeners=[])
    assert open_run(Path("run")).train_loader.fingerprint == before


def test_prepared_shards_may_be_a_source(sources):
    train(mixed(), "first", listeners=[])
    shutil.copytree("first/data/other", "shards")
    shutil.copy("first/tokenizer.json", "shards")
    data = {"sources": [{"path": "text.txt"}, {"path": "shards"}], "split": "fraction", "path": "builtin"}
    train(mixed(data=data), "second", listeners=[])
    assert [path.name for path in Path("second/data").iterdir()] == ["text"]
    assert list(open_run(Path("second")).shards.sources) == ["text", "shards"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sources": [{"path": "text.txt", "weight": 0}]}, "the weights sum to 0"),
        ({"sources": [{"path": "text.txt"}, {"path": "other/text.txt"}]}, "two are called 'text'"),
        ({"sources": [{"path": "text.txt"}], "path": "b.jsonl"}, "given beside path"),
        ({"sources": [{"path": "missing.txt"}]}, "missing.txt: no such file"),
        ({"sources": [{"path": "text.txt", "epochs": 0.01}]}, "they last for|no source may be read"),
        ({"sources": [{"path": "text.txt", "wait": 2}]}, "wait"),
    ],
)
def test_a_mixture_that_cannot_be_right_is_refused_and_leaves_nothing(sources, snapshot, data, message):
    before = snapshot(sources)
    with pytest.raises(RequestError, match=message):
        train(mixed(data={"split": "fraction", "path": "builtin", **data}), "run", listeners=[])
    assert snapshot(sources) == before
