"""Encoding and decoding: exact round trips, special tokens, published ids, files."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from polygpt.errors import PolygptError, RequestError
from polygpt.tokenizers import END_OF_TEXT, Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from polygpt.tokenizers import encoding as module

SAMPLE = "the cat sat on the mat, the rat ate the oat; another brought together Größe 東京 🙂\n" * 20
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
BYTE = train_tokenizer(TokenizerConfig(kind="byte"), [])
BPE = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), [SAMPLE])
CHAR = train_tokenizer(TokenizerConfig(kind="char"), [SAMPLE])
SPACES = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), ["the    cat,    \n\n\n\n sat" * 20])
BYTE_LEVEL = pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])


@BYTE_LEVEL
@settings(deadline=None, max_examples=60)
@given(text=ANY_TEXT)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.encode_bytes(text.encode()) == ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@BYTE_LEVEL
@settings(deadline=None, max_examples=60)
@given(data=st.binary() | st.lists(st.sampled_from([b"\xff", b"\xc3", b"\xa9", b"the ", "é🙂".encode()])).map(b"".join))
def test_any_bytes_come_back(tokenizer, data):
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode(errors="replace")


@settings(deadline=None, max_examples=60)
@given(text=st.text(sorted(set(SAMPLE))))
def test_char_comes_back_a_character_an_id(text):
    ids = CHAR.encode(text)
    assert len(ids) == len(text)
    assert CHAR.decode(ids) == text
    assert CHAR.decode_bytes(ids) == text.encode()


def test_byte_ids_are_the_byte_values():
    assert BYTE.encode("aé\n") == list("aé\n".encode())
    assert BYTE.encode_bytes(bytes(range(256))) == list(range(256))
    assert (BYTE.kind, BYTE.vocab_size, BYTE.end_of_text) == ("byte", 257, 256)


@pytest.mark.parametrize("special", [False, True])
def test_char_refuses_a_character_outside_its_alphabet_by_name_and_place(special):
    tokenizer = train_tokenizer(TokenizerConfig(kind="char", special_tokens=(END_OF_TEXT,)), ["abc"])
    text = END_OF_TEXT + "abcéa" if special else "abcéa"
    at = text.index("é")
    with pytest.raises(RequestError, match=rf"'é' \(U\+00E9\) at index {at} "):
        tokenizer.encode(text, special=special)


def test_char_knows_its_special_tokens_though_their_letters_are_not_in_the_alphabet():
    tokenizer = train_tokenizer(TokenizerConfig(kind="char", special_tokens=(END_OF_TEXT,)), ["cab"])
    assert tokenizer.encode(f"ab{END_OF_TEXT}c", special=True) == [0, 1, 3, 2]
    assert tokenizer.end_of_text == 3
    with pytest.raises(RequestError, match="'<'"):
        tokenizer.encode(f"ab{END_OF_TEXT}c")


def test_char_holds_text_only():
    with pytest.raises(RequestError, match="char"):
        CHAR.encode_bytes(b"\xff")


@pytest.mark.parametrize("tokenizer", [CHAR, BYTE, BPE], ids=["char", "byte", "bpe"])
def test_a_lone_surrogate_is_refused(tokenizer):
    for special in (False, True):
        with pytest.raises(RequestError, match=r"index 3 .*U\+D800"):
            tokenizer.encode("the\ud800", special=special)


@BYTE_LEVEL
def test_special_tokens_that_a_user_types_are_text(tokenizer):
    text = f"a{END_OF_TEXT}b"
    assert tokenizer.end_of_text not in tokenizer.encode(text)
    assert tokenizer.encode(text, special=True).count(tokenizer.end_of_text) == 1
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text, special=True)) == text
    assert tokenizer.end_of_text not in tokenizer.encode_batch([text])[0]


def test_both_ways_at_once_from_many_threads():
    text = f"the{END_OF_TEXT}cat"
    expected = {special: BPE.encode(text, special=special) for special in (False, True)}
    assert expected[False] != expected[True]
    with ThreadPoolExecutor(8) as pool:
        kinds = [bool(i % 2) for i in range(200)]
        found = list(pool.map(lambda special: BPE.encode(text, special=special), kinds))
    assert found == [expected[special] for special in kinds]


@pytest.mark.parametrize("tokenizer", [CHAR, BYTE, BPE, SPACES], ids=["char", "byte", "bpe", "spaces"])
def test_a_long_text_cut_into_pieces_has_the_ids_of_the_whole(tokenizer, monkeypatch):
    text = (SAMPLE + "  the   cat\n\n\n a1 2e \t at's  \n") * 3
    if tokenizer is CHAR:
        text = "".join(char for char in text if char in SAMPLE)
    whole = tokenizer._plain.encode(text, add_special_tokens=False).ids
    for size in range(1, 40):
        monkeypatch.setattr(module, "PIECE_CHARS", size)
        assert tokenizer.encode_batch([text], 50)[0].tolist() == whole, size
    batch = tokenizer.encode_batch([text, "", "the"], 50)
    assert [b.tolist() for b in batch] == [whole, [], tokenizer.encode("the")]
    assert {b.dtype for b in batch} == {np.dtype(np.int32)}


def test_ids_without_a_token_are_shown_and_numpy_ids_are_taken():
    for tokenizer in (CHAR, BYTE, BPE):
        ids = np.array([*tokenizer.encode("the"), tokenizer.vocab_size, -1], np.int32)
        assert tokenizer.decode(ids) == "the\ufffd\ufffd"


def test_saved_and_loaded_it_is_the_same(tmp_path):
    for tokenizer in (CHAR, BYTE, BPE):
        path = tmp_path / tokenizer.kind / "tokenizer.json"
        tokenizer.save(path)
        for again in (load_tokenizer(path), load_tokenizer(path.parent)):
            assert again.fingerprint == tokenizer.fingerprint
            assert (again.kind, again.vocab_size, again.end_of_text) == (
                tokenizer.kind,
                tokenizer.vocab_size,
                tokenizer.end_of_text,
            )
            assert again.encode("the cat") == tokenizer.encode("the cat")
        assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


def test_fingerprints_tell_vocabularies_apart():
    others = [
        train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=301), [SAMPLE]),
        train_tokenizer(TokenizerConfig(kind="char"), [SAMPLE + "Q"]),
        train_tokenizer(TokenizerConfig(kind="byte", special_tokens=()), []),
    ]
    assert len({t.fingerprint for t in [BYTE, BPE, CHAR, *others]}) == 6
    assert train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), [SAMPLE]).fingerprint == BPE.fingerprint


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(PolygptError, match="taken"):
        BYTE.save(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not JSON"),
        (b"", "not JSON"),
        (b'{"model":', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "not a tokenizer.json"),
        (b"[1]", "not a tokenizer.json"),
        (b'{"vocab_size": 5, "model_type": "gpt2"}', "not a tokenizer.json"),
        (
            b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{},"merges":[]}}',
            "empty vocabulary",
        ),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_missing_file_and_a_folder_without_one_are_refused(tmp_path):
    with pytest.raises(RequestError, match="no such file"):
        load_tokenizer(tmp_path / "nothing.json")
    with pytest.raises(RequestError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def gpt2(shared_data, tmp_path_factory):
    folder = shared_data / "gpt2-bpe"
    made = hf.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens([END_OF_TEXT])
    path = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    made.save(str(path))
    return load_tokenizer(path)


def test_gpt2_gives_its_published_ids(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    assert (gpt2.kind, gpt2.vocab_size, gpt2.end_of_text) == ("bpe", 50257, 50256)
    assert gpt2.encode(END_OF_TEXT, special=True) == [50256]
    assert 50256 not in gpt2.encode(END_OF_TEXT)
    assert gpt2.decode([15496, 50256, 995]) == f"Hello{END_OF_TEXT} world"
    assert gpt2.decode_bytes(gpt2.encode_bytes(b"\xff\xfeHello \xf0\x9f")) == b"\xff\xfeHello \xf0\x9f"


def test_gpt2_counts_tiny_shakespeare_as_published(gpt2, shared_data):
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()
    cut = int(len(text) * 0.9)
    train, validation = gpt2.encode_batch([text[:cut], text[cut:]])
    assert (len(train), len(validation)) == (301_966, 36_059)
    assert gpt2.decode(validation) == text[cut:]


def test_a_foreign_file_adds_cuts_and_pads_nothing():
    made = hf.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 7}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.normalizer = normalizers.Lowercase()
    made.add_special_tokens(["</s>"])
    made.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 7)])
    made.enable_truncation(2)
    made.enable_padding(length=9)
    tokenizer = Tokenizer(made)
    assert tokenizer.encode("a B zzz a") == [1, 2, 0, 1]
    assert [ids.tolist() for ids in tokenizer.encode_batch(["a", "b a b"])] == [[1], [2, 1, 2]]
    assert tokenizer.encode("a b </s>", special=True) == [1, 2, 7]
    assert tokenizer.vocab_size == 8  # one past the largest id: a table of 5 rows would be too short
    assert tokenizer.end_of_text == 7
    assert tokenizer.decode([1, 5, 2]) == "a \ufffd b"  # joined as the library joins words


def test_an_added_token_that_is_not_special_is_never_cut_in_two(monkeypatch):
    made = hf.Tokenizer.from_str(BPE._plain.to_str())
    made.add_tokens(["cat sat"])
    tokenizer = Tokenizer(made)
    monkeypatch.setattr(module, "PIECE_CHARS", 5)
    added = tokenizer.vocab_size - 1
    assert added in tokenizer.encode("the cat sat on")
    assert tokenizer.decode(tokenizer.encode("the cat sat on")) == "the cat sat on"


NO_UNKNOWN = {
    "bpe": models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]),
    "bpe whose unknown token is missing": models.BPE({"a": 0, "b": 1}, [], unk_token="<unk>"),
    "bpe with a few bytes": models.BPE({"a": 0, "b": 1, "<0xC3>": 2}, [], byte_fallback=True),
    "unigram": models.Unigram([("a", -1.0), ("b", -1.0)]),
    "wordlevel": models.WordLevel({"a": 0, "b": 1}),
}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", NO_UNKNOWN)
def test_text_that_would_be_dropped_is_refused_by_character_and_place(name, special):
    made = hf.Tokenizer(NO_UNKNOWN[name])
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_tokens(["<x>"])
    tokenizer = Tokenizer(made)
    assert tokenizer.decode(tokenizer.encode("b<x>a", special=special)).replace(" ", "") == "b<x>a"
    for index, encode in (
        (5, lambda: tokenizer.encode("a<x>bé<é", special=special)),
        (1, lambda: tokenizer.encode_batch(["ab", "aéb"])),
    ):
        place = rf"'é' \(U\+00E9\) at index {index} of the text has no token"
        with pytest.raises(RequestError, match="the word 'é' is no token" if name == "wordlevel" else place):
            encode()


def test_what_is_refused_leaves_the_file_as_it_was(tmp_path):
    made = hf.Tokenizer(NO_UNKNOWN["bpe"])
    before = made.to_str()
    tokenizer = Tokenizer(made)
    with pytest.raises(RequestError):
        tokenizer.encode("abé")
    tokenizer.save(tmp_path / "tokenizer.json")
    assert hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).to_str() == before


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("split", [True, False])
def test_a_space_that_begins_a_text_is_kept(scheme, split):
    pieces = ["▁", "a", "b", "▁a", "▁b", "▁a▁b"]
    merges = [("▁", "a"), ("▁", "b"), ("▁a", "▁b")]
    made = hf.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer = Tokenizer(made)
    for text in ("a b", " a b", "  a b", " ", "a", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a b") == made.encode("a b").ids


UNIGRAM = models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁a", -1.0), ("b", -2.0)], unk_id=0)
WORDS = models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
LETTERS = models.BPE({"<unk>": 0, "a": 1, "b": 2, " ": 3}, [], unk_token="<unk>", fuse_unk=True)


@pytest.mark.parametrize(
    ("model", "parts", "text", "lost"),
    [
        (
            WORDS,
            {"pre_tokenizer": pre_tokenizers.Whitespace()},
            "a  b é a",
            6,
        ),
        (WORDS, {"pre_tokenizer": pre_tokenizers.WhitespaceSplit()}, "a b", 1),
        (LETTERS, {}, "a你好b", 6),
        (LETTERS, {"normalizer": normalizers.Strip()}, "  a b ", 3),
        (UNIGRAM, {"pre_tokenizer": pre_tokenizers.Metaspace()}, " a bé", 2),
        (UNIGRAM, {"pre_tokenizer": pre_tokenizers.Metaspace()}, "a bb a", 0),
    ],
)
def test_bytes_that_no_token_stands_for_are_counted(model, parts, text, lost):
    made = hf.Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    assert Tokenizer(made).count_lost(text) == lost
    assert Tokenizer(made).count_lost("") == 0


@pytest.mark.parametrize("lossy", [False, True])
def test_byte_level_loses_nothing_unless_a_part_drops_text(lossy):
    made = hf.Tokenizer.from_str(BPE.to_json())
    made.normalizer = normalizers.NFC()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    if lossy:
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("x", "removed"), made.pre_tokenizer])
    assert Tokenizer(made).count_lost("the x  cafe\u0301\n 東") == int(lossy)
    assert BPE.count_lost("the x  cafe\u0301\n 東") == 0
    made.normalizer = None
    assert Tokenizer(made).count_lost("axa") == int(lossy)


def test_a_word_that_a_tokenizer_of_words_lacks_is_named():
    words = hf.Tokenizer(models.WordLevel({"hello": 0, "world": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(words)
    assert list(tokenizer.encode("hello world")) == [0, 1]
    with pytest.raises(RequestError, match="the word 'there' is no token of this tokenizer"):
        tokenizer.encode("hello there world")
