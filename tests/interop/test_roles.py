"""The roles of special tokens, through Hugging Face folders and GGUF files."""

import json

import pytest
import tokenizers as hf
from gguf_zoo import lively, model

from polygpt.errors import RequestError
from polygpt.interop import export_gguf, export_huggingface, open_gguf, open_huggingface
from polygpt.interop.gguf.container import GGUFFile
from polygpt.tokenizers import Tokenizer, TokenizerConfig, train_tokenizer

SPECIALS = ("<s>", "<|end|>", "<pad>")
BYTES = train_tokenizer(TokenizerConfig(kind="byte", special_tokens=SPECIALS), [])
ROLES = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<pad>"}
IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def tokenizer(**roles):
    return Tokenizer(hf.Tokenizer.from_str(BYTES.to_json()), roles)


@pytest.fixture
def export(tmp_path):
    config = model("llama").replace(vocab_size=260)

    def write(name, tokens, **settings):
        run = export_gguf if name.endswith(".gguf") else export_huggingface
        run(tmp_path / name, config, lively(config), tokens, **settings)
        return tmp_path / name

    return write


def json_of(path):
    return json.loads(path.read_text())


def test_a_hugging_face_folder_keeps_names_and_ids(export):
    folder = export("out", tokenizer(**ROLES), stop_tokens=(256,))
    assert ROLES.items() <= json_of(folder / "tokenizer_config.json").items()
    assert json_of(folder / "generation_config.json") == IDS | {"eos_token_id": [256, 257]}
    found = open_huggingface(folder)
    assert (found.tokenizer.roles, found.tokenizer.end_of_text) == (ROLES, 257)
    assert found.stop_tokens == (256, 257)


def test_what_has_no_role_gets_none(export):
    folder = export("out", tokenizer(eos_token="<|end|>"))
    assert open_huggingface(folder).tokenizer.roles == {"eos_token": "<|end|>"}


def test_ids_of_the_model_are_enough(export):
    folder = export("out", BYTES)
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(IDS | {"eos_token_id": [257]}))
    found = open_huggingface(folder).tokenizer
    assert (found.roles, found.end_of_text) == (ROLES, 257)


def test_a_gguf_file_keeps_ids(export):
    path = export("out.gguf", tokenizer(**ROLES), stop_tokens=(256, 257))
    metadata = GGUFFile(path).metadata
    ids = {"bos_token_id": 256, "eos_token_id": 257, "padding_token_id": 258, "eot_token_id": 256}
    assert {key: metadata.get(f"tokenizer.ggml.{key}") for key in ids} == ids
    found = open_gguf(path)
    assert (found.tokenizer.roles, found.tokenizer.end_of_text) == (ROLES, 257)
    assert found.stop_tokens == (257, 256)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["</s>", 2.0, [257, "x"], True])
def test_an_id_that_is_no_number_is_refused(export, file, value):
    folder = export("out", BYTES)
    content = json_of(folder / file) if (folder / file).exists() else {}
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / file).write_text(json.dumps(content | {"eos_token_id": value}))
    with pytest.raises(RequestError, match=rf"{file}: eos_token_id is .*; it must be a token's id, or a list of ids"):
        open_huggingface(folder)


def test_a_negative_id_is_no_token(export):
    folder = export("out", BYTES)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": -1, "pad_token_id": -1}))
    found = open_huggingface(folder)
    assert (found.stop_tokens, found.tokenizer.role("pad_token")) == ((), None)
