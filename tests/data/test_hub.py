"""Data sets by name and on a hub: found, downloaded once, waited for, and refused by name."""

import json

import pytest
from hub_server import Hub, serving
from huggingface_hub import constants

from polygpt.data import DATASETS, DataConfig, hub, open_source
from polygpt.errors import PolygptError, RequestError

STORIES = "hf:datasets/owner/stories/data/train-*.jsonl"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with the data set owner/stories, an empty cache, and the seconds that were waited."""
    root = tmp_path / "stories"
    (root / "data").mkdir(parents=True)
    for name, texts in {"train-1": ["three"], "train-0": ["one", "two"], "validation": ["held out"]}.items():
        (root / f"data/{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (root / "README.md").write_text("about")
    waited = []
    monkeypatch.setattr(hub.time, "sleep", waited.append)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for function in (hub._listed, hub._downloaded):
        function.cache_clear()
    with serving(
        Hub({}, datasets={"owner/stories": {"main": root}, "roneneldan/TinyStories": {"main": root}})
    ) as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        found.waited = waited
        yield found


def texts(path, **settings):
    return [document.text for document in open_source(DataConfig(path=path, **settings))]


def test_files_that_match_are_read_in_order_and_downloaded_once(served):
    source = open_source(DataConfig(path=STORIES))
    assert not served.requests  # nothing is looked up before it is needed
    assert [document.text for document in source] == ["one", "two", "three"]
    asked = len(served.requests)
    assert [document.text for document in source] == ["one", "two", "three"]
    assert len(served.requests) == asked
    assert not any("validation" in request for request in served.requests)
    assert STORIES in source.describe()


@pytest.mark.parametrize("trouble", [429, 503, "broken"])
def test_a_busy_hub_is_waited_for(served, trouble):
    served.troubles += [trouble, trouble]
    assert texts(STORIES) == ["one", "two", "three"]
    assert served.waited


def test_a_hub_that_stays_busy_is_named(served):
    served.troubles += [429] * 100
    with pytest.raises(PolygptError, match=r"owner/stories.*the hub cannot be read .*tried 7 times"):
        texts(STORIES)
    assert 3.0 in served.waited  # as Retry-After asks


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf:datasets/owner/nothing/*.jsonl", "no such data set on the hub"),
        ("hf:datasets/owner/stories@v9/*.jsonl", "no such revision"),
        ("hf:datasets/owner/stories/*.jsonl", "no file that can be read matches; the folders there are: ., data"),
        ("hf:datasets/owner/stories/README.md", "no file that can be read matches"),
        ("hf:owner/stories", "is not of the form hf:datasets/owner/name/GLOB"),
    ],
)
def test_what_is_not_there_is_refused(served, path, message):
    with pytest.raises(RequestError, match=message):
        texts(path)


def test_a_file_has_precedence_over_a_data_set_and_misspelt_names_are_mended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_source(DataConfig(path="tinystories")).files == (DATASETS["tinystories"].where,)
    (tmp_path / "tinystories").mkdir()
    (tmp_path / "tinystories" / "a.txt").write_text("mine")
    assert texts("tinystories") == ["mine"]
    with pytest.raises(RequestError, match="tinystory: no such file; did you mean 'tinystories'"):
        open_source(DataConfig(path="tinystory"))
    with pytest.raises(RequestError, match=r"enwik8: download it from https://mattmahoney\.net"):
        open_source(DataConfig(path="enwik8"))


def test_every_data_set_is_listed_and_can_be_named(program):
    found = json.loads(program("data", "list", "--json").out)
    assert set(found) == set(DATASETS)
    assert "fineweb-edu-10bt" in program("data", "list").out
    for name, dataset in DATASETS.items():
        if dataset.is_read:
            assert open_source(DataConfig(path=name)).files == (dataset.where,)
