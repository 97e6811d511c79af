"""What the tests of the data room share."""

import json

import pytest

from polygpt.data import DataConfig, open_source, prepare
from polygpt.tokenizers import TokenizerConfig, train_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer():
    return train_tokenizer(TokenizerConfig(kind="byte"), [])


@pytest.fixture
def prepared(tmp_path, byte_tokenizer):
    """`prepared(texts, **settings)`: the shards of a .jsonl file of `texts`."""

    def make(texts, tokenizer=byte_tokenizer, shard_tokens=10**8, name="shards", **settings):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config = DataConfig(path=str(path), **settings)
        return prepare(open_source(config), tokenizer, tmp_path / name, config, shard_tokens=shard_tokens)

    return make
