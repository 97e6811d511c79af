"""Damaged and hostile folders: each is refused in one to three lines that name the file and the thing."""

import ast
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_references import REFERENCES
from safetensors.numpy import load_file, save_file

import polygpt
from polygpt.errors import RequestError
from polygpt.interop import open_huggingface

NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A copy of the reference `llama`."""
    shutil.copytree(REFERENCES / "llama", tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def tensors(folder):
    return load_file(folder / FILE)


def refused(folder, match):
    with pytest.raises(RequestError, match=match) as caught:
        open_huggingface(folder)
    assert len(str(caught.value).splitlines()) <= 3


def save(folder, tensors):
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, folder / FILE)


def raw(folder, header, data: bytes = b"", size: int | None = None):
    """A file with this header, as text or as an object."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


# --- Tensors ----------------------------------------------------------------------------------------------------


def test_a_missing_tensor(folder, tensors):
    del tensors[NORM]
    save(folder, tensors)
    refused(folder, r"the tensor model\.norm\.weight is missing$")


def test_a_misspelled_tensor(folder, tensors):
    tensors["model.norm.weigth"] = tensors.pop(NORM)
    save(folder, tensors)
    refused(folder, r"model\.norm\.weight is missing; did you mean 'model\.norm\.weigth'\?")


def test_an_extra_tensor(folder, tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    save(folder, tensors)
    refused(folder, r"the tensor model\.layers\.2\.mlp\.up_proj\.weight \[24, 16\] is not known for this model")


def test_a_bias_that_the_configuration_does_not_speak_of(folder, tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
    save(folder, tensors)
    refused(folder, r"q_proj\.bias \[16\] is not known")


def test_a_transposed_tensor(folder, tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].T
    save(folder, tensors)
    refused(folder, r"up_proj\.weight is \[16, 24\]; by the configuration it must be \[24, 16\] \(it is transposed\)")


def test_a_tensor_of_another_shape(folder, tensors):
    tensors[NORM] = np.zeros(17, np.float32)
    save(folder, tensors)
    refused(folder, r"model\.norm\.weight is \[17\]; by the configuration it must be \[16\]")


@pytest.mark.parametrize("dtype", ["I64", "F8_E4M3", "F64"])
def test_a_tensor_of_another_type(folder, tensors, dtype):
    size = {"I64": 8, "F8_E4M3": 1, "F64": 8}[dtype]
    header, data = {}, b""
    for name, values in tensors.items():
        content = bytes(values.size * size) if name == NORM else values.tobytes()
        kind = dtype if name == NORM else "F32"
        header[name] = {"dtype": kind, "shape": values.shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    raw(folder, header, data)
    refused(folder, rf"the tensor model\.norm\.weight is {dtype}; known: F32, F16, BF16")


# --- Files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1])
def test_a_truncated_file(folder, kept):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:kept])
    refused(folder, r"model\.safetensors: (not a safetensors file|a damaged safetensors file)")


def test_bytes_after_the_end(folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes() + b"more")
    refused(folder, r"model\.safetensors: a damaged safetensors file")


@pytest.mark.parametrize("size", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_larger_than_the_file(folder, size):
    raw(folder, {}, size=size)
    refused(folder, rf"not a safetensors file \(its header would have {size:,} bytes\)")


@pytest.mark.parametrize(
    "header",
    ["", "{", "[]", "3", '"a"', '{"a": 3}', '{"a": {"dtype": "F32"}}', '{"a": {"dtype": 3, "shape": 1}}', "[" * 9999],
)
def test_a_header_that_is_none(folder, header):
    raw(folder, header)
    refused(folder, r"model\.safetensors: (not a|a damaged) safetensors file")


def test_a_tensor_twice_in_a_header(folder):
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    raw(folder, f'{{"{NORM}": {entry}, "{NORM}": {entry}}}', bytes(4))
    refused(folder, rf"not a safetensors file \(duplicate key '{NORM}'\)")


@pytest.mark.parametrize("offsets", [[0, 8], [4, 8], [-4, 0], [4, 0], [0, 1 << 62], [0]])
def test_offsets_that_do_not_fit(folder, offsets):
    raw(folder, {NORM: {"dtype": "F32", "shape": [1], "data_offsets": offsets}}, bytes(4))
    refused(folder, r"safetensors file")


def test_tensors_that_lie_over_each_other(folder):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    raw(folder, {"a": entry, "b": entry}, bytes(4))
    refused(folder, r"a damaged safetensors file")


def test_no_weights_at_all(folder):
    (folder / FILE).unlink()
    refused(folder, r"no model\.safetensors here$")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_alone_are_not_opened(folder, name):
    (folder / FILE).rename(folder / name)
    refused(folder, rf"no model\.safetensors here; {name} could run code when opened and is not read; save it as")


def test_weights_that_are_a_folder(folder):
    (folder / FILE).unlink()
    (folder / FILE).mkdir()
    refused(folder, r"no model\.safetensors here")


# --- Several files ----------------------------------------------------------------------------------------------


@pytest.fixture
def shards(folder, tensors):
    """Writes the tensors into two files; `shards(weight_map=..., **files)` changes either."""
    names = sorted(tensors)
    halves = {"a.safetensors": names[:5], "b.safetensors": names[5:]}

    def write(weight_map: dict | None = None, **more: list):
        (folder / FILE).unlink(missing_ok=True)
        for file, held in halves.items():
            wanted = {*held, *more.get(file[0], [])}
            save_file({name: tensors[name] for name in wanted}, folder / file)
        plain = {name: file for file, held in halves.items() for name in held}
        (folder / INDEX).write_text(json.dumps({"weight_map": plain | (weight_map or {})}))

    return write


def test_shards_as_they_should_be(folder, shards):
    shards()
    assert open_huggingface(folder).config.num_layers == 2


@pytest.mark.parametrize(
    "place",
    [
        "../b.safetensors",
        "/etc/b.safetensors",
        "sub/b.safetensors",
        "..\\b.safetensors",
        "",
        ".",
        "..",
        "b.bin",
        3,
        None,
    ],
)
def test_an_index_that_points_elsewhere(folder, shards, place):
    shards({NORM: place})
    refused(
        folder, rf"{INDEX}: model\.norm\.weight is said to be in .*, which is not a safetensors file of this folder"
    )


def test_a_file_that_is_missing(folder, shards):
    shards()
    (folder / "b.safetensors").unlink()
    refused(folder, rf"b\.safetensors is missing; {INDEX} lists it")


def test_a_tensor_in_two_files(folder, shards):
    shards(b=["lm_head.weight"])
    refused(folder, rf"b\.safetensors: the tensor lm_head\.weight is in the file but not in {INDEX}")


def test_a_tensor_that_is_not_in_its_file(folder, shards):
    shards({"lm_head.weight": "b.safetensors"})
    refused(folder, rf"b\.safetensors: the tensor lm_head\.weight is not in the file but in {INDEX}")


def test_a_tensor_that_only_the_index_has(folder, shards):
    shards({"model.extra": "b.safetensors"})
    refused(folder, rf"b\.safetensors: the tensor model\.extra is not in the file but in {INDEX}")


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 1}'])
def test_an_index_that_is_none(folder, shards, index):
    shards()
    (folder / INDEX).write_text(index)
    refused(folder, rf"{INDEX}: ")


def test_a_tensor_twice_in_an_index(folder, shards):
    shards()
    (folder / INDEX).write_text('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}')
    refused(folder, rf"{INDEX}: not JSON \(duplicate key 'a'\)")


# --- Texts beside the weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", '{"a": 1, "a": 2}', '{"a": NaN}'])
def test_a_damaged_text(folder, name, text):
    (folder / name).write_bytes(text.encode("latin-1"))
    refused(folder, name.replace(".", r"\."))


@pytest.mark.parametrize("value", ["[]", "-1", "null"])
def test_stop_tokens_that_are_none_are_left_out(folder, value):
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    assert open_huggingface(folder).stop_tokens in ((), (2,))


@pytest.mark.parametrize("value", ['"2"', "{}", "1.5", "true"])
def test_stop_tokens_that_are_no_ids(folder, value):
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    refused(folder, r"generation_config\.json: eos_token_id is .*; it must be a token's id")


def test_the_weights_alone_are_no_model(folder):
    with pytest.raises(RequestError, match=r"only weights; name the folder that also holds their config\.json"):
        polygpt.load(folder / FILE)


# --- Nothing read can run code ----------------------------------------------------------------------------------

UNSAFE = {"torch", "pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "transformers"}


def test_nothing_that_interop_reaches_unpickles():
    package = Path(polygpt.__file__).parent
    files = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }
    seen, waiting = set(), ["polygpt.interop"]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(files[name].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            assert not {module.split(".")[0] for module in found} & UNSAFE, f"{name} imports {found[0]}"
            assert not any(module.startswith(("numpy.load", "numpy.lib.format")) for module in found), name
            waiting += [module for module in found if module in files]
    assert {"polygpt.interop.huggingface.safetensors_files", "polygpt.interop.weights"} <= seen


def test_opening_a_folder_imports_no_torch(folder):
    code = "import sys, polygpt; polygpt.load(sys.argv[1]); sys.exit(int('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
