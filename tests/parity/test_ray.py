"""Preparation on a Ray cluster of two nodes on this machine, one of which dies on the way."""

import json
import os
import random

import pytest

from polygpt.data import DataConfig, formats, open_source, prepare_in_parallel
from polygpt.errors import PolygptError, RequestError
from polygpt.tokenizers import TokenizerConfig, train_tokenizer

ray = pytest.importorskip("ray", reason="needs ray")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    documents = ["".join(draw.choices("abc é\n", k=draw.randrange(1, 200))) for _ in range(60)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes with one processor each, to which RAY_ADDRESS leads."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setattr(formats, "PART_BYTES", 300)
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.second = made.add_node(num_cpus=1)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        made.shutdown()


def prepared(text, out, tokenizer, engine, **options):
    config = DataConfig(path=str(text), validation_fraction=0.3, workers=2, engine=engine)
    prepare_in_parallel(open_source(config), tokenizer, out, config, shard_tokens=1000, **options)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_shards_are_those_of_local_workers_though_a_node_dies(text, cluster, tmp_path):
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), [])
    expected = prepared(text, tmp_path / "local", tokenizer, "local")
    seen = []

    def progress(found):
        seen.append(found.parts)
        if len(seen) == 3:
            cluster.remove_node(cluster.second, allow_graceful=False)

    assert prepared(text, tmp_path / "ray", tokenizer, "ray", progress=progress) == expected
    assert len(seen) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "ray"]


def test_a_failure_on_the_cluster_is_the_one_of_local_workers_and_finished_parts_are_kept(text, cluster, tmp_path):
    documents = [json.loads(line)["text"] for line in (text / "a.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), documents)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jsonl").write_text((text / "a.jsonl").read_text() + '{"text": 3}\n')
    found = []
    for engine in ("local", "ray"):
        with pytest.raises(RequestError) as refused:
            prepared(tmp_path / "bad", tmp_path / engine, tokenizer, engine)
        found.append(str(refused.value))
        assert any(entry.name.isdecimal() for entry in (tmp_path / f"{engine}.work").iterdir())
    assert found[0] == found[1]
    assert "'text' must be text, not int" in found[0]


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("nowhere", RequestError, "RAY_ADDRESS=nowhere: must be host:port, or auto"),
        ("127.0.0.1:9", PolygptError, "RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers there"),
    ],
)
def test_a_cluster_that_is_not_there_is_named(text, tmp_path, monkeypatch, address, error, message):
    monkeypatch.setitem(os.environ, "RAY_ADDRESS", address)
    with pytest.raises(error, match=message):
        prepared(text, tmp_path / "out", train_tokenizer(TokenizerConfig(kind="byte"), []), "ray")
    assert not (tmp_path / "out").exists()
