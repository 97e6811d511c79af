"""Configurations of tokenizers, and training on text."""

import pytest

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.tokenizers import END_OF_TEXT, TokenizerConfig, first_bytes, load_tokenizer, train_tokenizer

TEXTS = ["low lower lowest ", "new newer newest ", "low new "] * 30


def test_tiny_shakespeare_has_65_characters(shared_data):
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), [text])
    assert tokenizer.vocab_size == 65
    assert tokenizer.encode("\n z") == [0, 1, 64]
    assert tokenizer.end_of_text is None


def test_char_ids_follow_the_code_points_and_not_the_order_of_texts():
    config = TokenizerConfig(kind="char")
    one, other = train_tokenizer(config, ["ba", "🙂é"]), train_tokenizer(config, ["é🙂", "ab"])
    assert one.encode("abé🙂") == [0, 1, 2, 3]
    assert one.fingerprint == other.fingerprint


def test_bpe_learns_the_commonest_pairs_first_and_ends_with_the_special_tokens():
    config = TokenizerConfig(vocab_size=270, special_tokens=(END_OF_TEXT, "<|user|>"))
    tokenizer = train_tokenizer(config, TEXTS)
    assert tokenizer.vocab_size == 270
    assert tokenizer.special_tokens == {END_OF_TEXT: 268, "<|user|>": 269}
    assert tokenizer.end_of_text == 268
    assert len(tokenizer.encode("low")) == 1
    assert len(tokenizer.encode("new")) == 1
    assert len(tokenizer.encode("qqq")) == 3


def test_bpe_never_merges_across_words():
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=2000), ["aa bb " * 100])
    assert not any(" " in tokenizer.decode([i])[1:] for i in range(tokenizer.vocab_size))
    assert tokenizer.vocab_size < 300  # the text is used up long before 2000


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_is_refused(kind, texts):
    with pytest.raises(RequestError, match="no text"):
        train_tokenizer(TokenizerConfig(kind=kind), texts)


def test_a_lone_surrogate_in_the_texts_is_refused():
    for kind in ("char", "bpe"):
        with pytest.raises(RequestError, match="surrogate"):
            train_tokenizer(TokenizerConfig(kind=kind), ["fine", "a\udfff"])


def test_kind_file_loads(tmp_path):
    made = train_tokenizer(TokenizerConfig(kind="byte"), [])
    made.save(tmp_path / "tokenizer.json")
    config = validate(TokenizerConfig, {"kind": "file", "path": str(tmp_path)})
    assert train_tokenizer(config, []).fingerprint == load_tokenizer(tmp_path).fingerprint == made.fingerprint


def test_a_path_implies_its_kind():
    assert validate(TokenizerConfig, {"path": "x"}).kind == "file"
    assert validate(TokenizerConfig, {"path": "x", "vocab_size": 300}).kind == "file"
    assert validate(TokenizerConfig, {"path": None}).kind == validate(TokenizerConfig, {}).kind == "bpe"
    assert validate(TokenizerConfig, {"path": "x"}).replace(path="y").path == "y"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "bpe", "vocab_size": 257}, "at least 258"),
        ({"kind": "bpe", "vocab_size": 258, "special_tokens": ["a1", "b1"]}, "at least 259"),
        ({"kind": "file"}, "needs path"),
        ({"kind": "file", "path": "x", "special_tokens": ["a"]}, "has its own"),
        ({"kind": "char", "path": "x"}, "path is for kind 'file'"),
        ({"special_tokens": ["a", "a"]}, "distinct"),
        ({"special_tokens": [""]}, "not empty"),
        ({"kind": "words"}, "kind"),
        ({"vocab": 300}, "vocab_size"),
    ],
)
def test_a_configuration_that_cannot_be_right_is_refused(data, message):
    with pytest.raises(RequestError, match=message):
        validate(TokenizerConfig, data)


def test_a_list_of_special_tokens_is_read_and_written_back():
    config = validate(TokenizerConfig, {"special_tokens": ["<|a|>", "<|b|>"]})
    assert config.specials == ("<|a|>", "<|b|>")
    assert validate(TokenizerConfig, config.to_dict()) == config


def test_bpe_reads_as_many_bytes_as_it_may_and_no_more():
    read = []

    def texts():
        for number in range(10):
            read.append(number)
            yield "é" * 9 + f" {number}{number} " * 20  # 98 bytes

    limited = train_tokenizer(TokenizerConfig(vocab_size=400, train_bytes=250), texts())
    assert read == [0, 1, 2]
    whole = list(texts())
    assert (
        limited.fingerprint == train_tokenizer(TokenizerConfig(vocab_size=400), [*whole[:2], whole[2][:45]]).fingerprint
    )
    assert limited.fingerprint != train_tokenizer(TokenizerConfig(vocab_size=400), whole).fingerprint
    assert "".join(first_bytes(["aé", "é", "b"], 4)) == "aé", "no half of a character"
    assert list(first_bytes(["a", "b"], 9)) == ["a", "b"]


def test_bpe_is_the_same_of_a_long_text_as_of_its_words(monkeypatch):
    monkeypatch.setattr("polygpt.tokenizers.train.PIECE_CHARS", 40)
    text = "".join(f"the {number * 7919 % 10007} cat's\n\n  hat{number % 7} " for number in range(500))
    cut = train_tokenizer(TokenizerConfig(vocab_size=500), [text])
    monkeypatch.undo()
    assert cut.fingerprint == train_tokenizer(TokenizerConfig(vocab_size=500), [text]).fingerprint
