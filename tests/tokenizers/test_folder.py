"""Folders: roles of special tokens in the files beside a tokenizer, and vocab.json with merges.txt."""

import json

import pytest
import tokenizers as hf

from polygpt.errors import RequestError
from polygpt.tokenizers import END_OF_TEXT, Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer

SPECIALS = ("<s>", "<|end|>", "<pad>")
BYTES = train_tokenizer(TokenizerConfig(kind="byte", special_tokens=SPECIALS), [])
TRAINED = train_tokenizer(
    TokenizerConfig(vocab_size=300, special_tokens=()), ["Hi 12345 there, don't I'LL cafe\u0301 au lait " * 9]
)


@pytest.fixture
def folder(tmp_path):
    """`folder(name=value)`: a folder with `name.json`."""

    def make(**files):
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return make


def with_tokenizer(path):
    BYTES.save(path / "tokenizer.json")
    return path


def roles_of(tokenizer):
    return tokenizer.role("bos_token"), tokenizer.role("eos_token"), tokenizer.role("pad_token")


ROLES = {"bos_token": "<s>", "eos_token": {"content": "<|end|>", "__type": "AddedToken"}, "pad_token": "<pad>"}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": ROLES},
        {"special_tokens_map": ROLES},
        {"tokenizer_config": {"eos_token": "<pad>"}, "special_tokens_map": ROLES},
        {"tokenizer_config": ROLES | {"added_tokens_decoder": {}}, "special_tokens_map": {"eos_token": "<s>"}},
        {"tokenizer_config": ROLES | {"add_bos_token": True, "unk_token": None, "model_max_length": 5}},
    ],
)
def test_roles_are_read_from_the_files_beside(folder, files):
    path = with_tokenizer(folder(**files))
    for where in (path, path / "tokenizer.json"):
        tokenizer = load_tokenizer(where)
        assert roles_of(tokenizer) == (256, 257, 258)
        assert (tokenizer.end_of_text, tokenizer.roles["eos_token"]) == (257, "<|end|>")
        assert tokenizer.role("mask_token") is None
    assert load_tokenizer(path).fingerprint == BYTES.fingerprint
    BYTES.save(path / "other.json")
    assert load_tokenizer(path / "other.json").roles == {}  # the files beside belong to tokenizer.json


def test_roles_known_from_elsewhere_fill_in(folder):
    path = with_tokenizer(folder(tokenizer_config={"eos_token": "<|end|>"}))
    tokenizer = load_tokenizer(path, {"eos_token": 256, "bos_token": 256, "pad_token": 97})
    assert roles_of(tokenizer) == (None, 257, None)  # a template may ask whether there is a bos_token
    (path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": None}))
    assert roles_of(load_tokenizer(path, {"eos_token": 257, "bos_token": 256})) == (None, 257, 258)
    (path / "tokenizer_config.json").write_text("{}")
    assert roles_of(load_tokenizer(path, {"eos_token": 257, "bos_token": 256})) == (256, 257, None)
    # 97 is the letter a, and 9999 nothing.
    assert roles_of(load_tokenizer(path, {"eos_token": 97, "pad_token": 9999})) == (None, None, None)


def test_roles_survive_saving_and_only_they_write_a_second_file(tmp_path):
    made = Tokenizer(hf.Tokenizer.from_str(BYTES.to_json()), ROLES)
    made.save(tmp_path / "a" / "tokenizer.json")
    again = load_tokenizer(tmp_path / "a")
    assert (again.roles, again.end_of_text) == (made.roles, 257)
    made.save(tmp_path / "b" / "other.json")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["other.json"]


def test_a_role_makes_an_ordinary_token_special():
    made = Tokenizer(hf.Tokenizer.from_str(TRAINED.to_json()), {"eos_token": "!", "pad_token": "<none>"})
    assert made.special_tokens == {"!": made.end_of_text}
    assert made.vocab_size == TRAINED.vocab_size
    assert made.role("pad_token") is None
    named = Tokenizer(train_tokenizer(TokenizerConfig(kind="byte"), [])._plain, {"eos_token": "<none>"})
    assert named.end_of_text == 256  # known by its name, as the one that has the role is missing
    assert made.roles["pad_token"] == "<none>"


def test_without_roles_the_end_is_known_by_its_name():
    assert train_tokenizer(TokenizerConfig(kind="byte"), []).end_of_text == 256
    assert BYTES.end_of_text is None


@pytest.mark.parametrize("value", [7.5, ["<s>"], {"content": 3}])
def test_a_role_that_is_no_token_is_refused(folder, value):
    path = with_tokenizer(folder(tokenizer_config={"eos_token": value}))
    with pytest.raises(RequestError, match="is not a token") as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def vocab_merges(path, tokenizer_config=None, **files):
    """The two files of `TRAINED` with `<|endoftext|>`, and JSON files beside them."""
    spec = json.loads(TRAINED.to_json())["model"]
    vocab = spec["vocab"] | {END_OF_TEXT: TRAINED.vocab_size}
    (path / "vocab.json").write_text(json.dumps(vocab))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["merges"]]
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    if tokenizer_config is not None:
        files["tokenizer_config"] = tokenizer_config
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


SIZE = TRAINED.vocab_size
TEXT = "Hi 12345 there, don't I'LL cafe\u0301 au lait"


def pieces(tokenizer, text=TEXT, special=False):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text, special=special)]


@pytest.mark.parametrize(
    "files",
    [{}, {"config": {"model_type": "gpt2"}}, {"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast"}}],
    ids=["alone", "model type", "class"],
)
def test_vocab_and_merges_are_gpt2s_where_nothing_else_is_said(tmp_path, files):
    tokenizer = load_tokenizer(vocab_merges(tmp_path, **files))
    assert tokenizer.encode(TEXT) == TRAINED.encode(TEXT)
    assert (tokenizer.end_of_text, tokenizer.start, tokenizer.role("pad_token")) == (SIZE, (), None)
    assert tokenizer.encode(f"a{END_OF_TEXT}", special=True)[-1] == SIZE
    again = train_tokenizer(TokenizerConfig(path=str(tmp_path), kind="file"), [])
    assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    "files", [{"config": {"model_type": "qwen3"}}, {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}}]
)
def test_qwen2_splits_digits_and_composes(tmp_path, files):
    tokenizer = load_tokenizer(vocab_merges(tmp_path, **files))
    assert pieces(tokenizer, " 12345")[-5:] == list("12345")
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"
    assert (tokenizer.role("pad_token"), tokenizer.role("bos_token")) == (SIZE, None)


def test_gpt_neox_composes_and_keeps_digits_together(tmp_path):
    tokenizer = load_tokenizer(vocab_merges(tmp_path, {"tokenizer_class": "GPTNeoXTokenizer"}))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"
    assert "12345" in pieces(tokenizer)[1]


def test_a_prefix_space_and_a_start_token_are_those_of_the_configuration(tmp_path):
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "add_bos_token": True}
    tokenizer = load_tokenizer(vocab_merges(tmp_path, config))
    assert tokenizer.encode("Hi") == TRAINED.encode(" Hi")
    assert tokenizer.start == (SIZE,)
    named = load_tokenizer(vocab_merges(tmp_path, config | {"bos_token": "<s>"}))
    assert named.start == (named.special_tokens["<s>"],) == (SIZE + 1,)
    assert load_tokenizer(vocab_merges(tmp_path, config | {"bos_token": None})).start == ()


ADDED = {"content": "<|im_end|>", "special": True, "normalized": False}


@pytest.mark.parametrize(
    "files",
    [
        {
            "tokenizer_config": {
                "added_tokens_decoder": {str(SIZE + 1): ADDED | {"content": "<x>"}, str(SIZE + 2): ADDED}
            }
        },
        {"tokenizer_config": {"eos_token": "<|im_end|>"}, "added_tokens": {"<|im_end|>": SIZE + 2, "<x>": SIZE + 1}},
        {"added_tokens": {"<|im_end|>": SIZE + 2, "<x>": SIZE + 1}, "special_tokens_map": {"eos_token": ADDED}},
    ],
)
def test_added_tokens_have_their_ids(tmp_path, files):
    tokenizer = load_tokenizer(vocab_merges(tmp_path, **files))
    assert tokenizer.encode("Hi<x><|im_end|>", special=True) == [*TRAINED.encode("Hi"), SIZE + 1, SIZE + 2]
    assert SIZE + 2 not in tokenizer.encode("Hi<x><|im_end|>")
    assert tokenizer.special_tokens["<|im_end|>"] == SIZE + 2
    assert tokenizer.vocab_size == SIZE + 3


def test_tokens_that_only_have_a_role_get_the_next_ids_in_the_order_of_transformers(tmp_path):
    config = {"pad_token": "<pad>", "eos_token": {"content": "</s>", "rstrip": True}, "bos_token": "<s>"}
    tokenizer = load_tokenizer(vocab_merges(tmp_path, config | {"extra_special_tokens": ["<a>"]}))
    ids = [*TRAINED.encode("Hi"), SIZE + 1, *TRAINED.encode("Hi"), SIZE + 2, SIZE + 3, SIZE + 4]
    assert tokenizer.encode("Hi<s>Hi</s>  <pad><a>", special=True) == ids
    # The default of the class comes before, as it would have to; alone it is left out.
    config = {"tokenizer_class": "GPTNeoXTokenizer", "extra_special_tokens": ["<a>"]}
    tokenizer = load_tokenizer(vocab_merges(tmp_path, config))
    assert (tokenizer.role("pad_token"), tokenizer.special_tokens["<a>"]) == (SIZE + 1, SIZE + 2)
    tokenizer = load_tokenizer(vocab_merges(tmp_path, {"tokenizer_class": "GPTNeoXTokenizer"}))
    assert (tokenizer.role("pad_token"), tokenizer.vocab_size) == (None, SIZE + 1)


def test_a_qwen2_model_has_its_own_class_whatever_the_folder_names(tmp_path):
    files = {"config": {"model_type": "qwen2"}, "tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}
    assert pieces(load_tokenizer(vocab_merges(tmp_path, **files)), " 12345")[-5:] == list("12345")


def test_extra_special_tokens_are_added(tmp_path):
    tokenizer = load_tokenizer(vocab_merges(tmp_path, {"additional_special_tokens": ["<a>", {"content": "<b>"}]}))
    assert tokenizer.encode("<a><b>", special=True) == [SIZE + 1, SIZE + 2]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"tokenizer_class": "RobertaTokenizer"}},
            "tokenizer_class 'RobertaTokenizer' splits.*\n.*Qwen2",
        ),
        ({"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}}, r"put its tokenizer\.json beside"),
        ({"added_tokens": {"<x>": SIZE + 9}}, f"'<x>' has id {SIZE + 9}, which leaves a gap"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "not a list of added tokens"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"5": {"content": "a", "odd": 1}}}},
            "not a list of added tokens",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "not a list of added tokens"),
        ({"added_tokens": {"<x>": "five"}}, "not a list of added tokens"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, files, message):
    with pytest.raises(RequestError, match=message) as caught:
        load_tokenizer(vocab_merges(tmp_path, **files))
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_model_type_that_does_not_say_is_refused(tmp_path):
    with pytest.raises(RequestError, match="model_type 'llama' splits"):
        load_tokenizer(vocab_merges(tmp_path, config={"model_type": "llama"}))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_damaged_files_are_refused_by_name(tmp_path, name):
    path = vocab_merges(tmp_path)
    (path / name).write_text("h e l\n")
    with pytest.raises(RequestError, match=name):
        load_tokenizer(path)
    (path / name).unlink()
    with pytest.raises(RequestError, match=r"holds no tokenizer\.json, nor vocab\.json with merges\.txt"):
        load_tokenizer(path)


def test_dropout_is_off_so_that_a_text_has_the_same_ids(tmp_path):
    content = json.loads(TRAINED.to_json())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    text = "there, don't 12345 au lait " * 5
    assert tokenizer.encode(text) == TRAINED.encode(text) == tokenizer.encode(text, special=True)
    assert (tokenizer.dropout, TRAINED.dropout) == (0.5, None)
    assert tokenizer.fingerprint == TRAINED.fingerprint


def test_an_added_token_whose_id_is_not_the_librarys_is_refused(tmp_path):
    content = json.loads(BYTES.to_json())
    content["added_tokens"][1]["id"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RequestError, match=r"'<\|end\|>' the id 300, but tokenizer.json gives it 257"):
        load_tokenizer(tmp_path)


LISTED = {"256": {"content": "<s>", "special": True}, "259": {"content": "<|call|>", "special": True}}


def test_tokens_listed_beside_a_tokenizer_are_added_with_their_ids(folder):
    tokenizer = load_tokenizer(with_tokenizer(folder(tokenizer_config={"added_tokens_decoder": LISTED})))
    assert (tokenizer.special_tokens["<|call|>"], tokenizer.vocab_size) == (259, 260)
    assert tokenizer.encode("a<|call|>", special=True) == [97, 259]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"258": {"content": "<s>", "special": True}}, "gives '<s>' the id 258, but tokenizer.json gives it 256"),
        ({"300": {"content": "<|call|>"}}, "gives '<|call|>' the id 300, but tokenizer.json gives it 259"),
        ({"x": {"content": "<s>"}}, "not a list of added tokens"),
        (["<s>"], "not a list of added tokens"),
    ],
)
def test_a_list_that_contradicts_the_tokenizer_is_refused(folder, listed, message):
    path = with_tokenizer(folder(tokenizer_config={"added_tokens_decoder": listed}))
    with pytest.raises(RequestError) as error:
        load_tokenizer(path)
    assert message in str(error.value)
    assert "tokenizer_config.json: added_tokens_decoder" in str(error.value)
