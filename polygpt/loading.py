"""Opens a MODEL, as commands and scripts name it, as a `LanguageModel`, and saves one as a folder of ours.

Such a folder holds `config.yaml` (of a run, or of a model only), `tokenizer.json`, `checkpoints/`, and for an imported
model `origin.json`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from polygpt import checkpoint
from polygpt.config import Config, merge, read_yaml, to_yaml, validate
from polygpt.errors import RequestError
from polygpt.files import check_checkpoint_path, expand, new_folder, write_text
from polygpt.folders import CONFIG
from polygpt.hub import PREFIX as HUB
from polygpt.interop import StoredModel, fetch, is_huggingface, open_huggingface
from polygpt.kernels import WeightType, check_weight_type
from polygpt.language_model import NO_TOKENIZER, LanguageModel
from polygpt.model import ModelConfig, ParameterInfo, Params, model_of
from polygpt.origin import Origin
from polygpt.presets import PRESET_VOCAB, check_model_name, models_in, preset
from polygpt.process import command_line
from polygpt.settings import read_json
from polygpt.sharding import MeshConfig, Scope, check_fit
from polygpt.tokenizers import Tokenizer, load_tokenizer

TOKENIZER, CHECKPOINTS, ORIGIN = "tokenizer.json", "checkpoints", "origin.json"
RESULT, BEST = "result.json", "best.json"  # BEST is in CHECKPOINTS: which step had the lowest validation loss
Warn = Callable[[str], None]


def build(config: ModelConfig, seed: int = 0, tokenizer: Tokenizer | None = None) -> LanguageModel:
    """A model with random weights.

    Raises:
        RequestError: `vocab_size` is open and there is no tokenizer to give it.
    """
    if not isinstance(config, ModelConfig):
        kind = type(config).__name__ if isinstance(config, Config) else repr(config)
        raise RequestError(f"a ModelConfig is needed (such as polygpt.preset('gpt2')), not {kind}")
    if tokenizer is not None:
        config = config.with_vocab(tokenizer.vocab_size)
    return LanguageModel(config, model_of(config).init(seed), tokenizer)


def load(
    name: str | Path,
    *,
    dtype: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: WeightType | Literal["auto"] | None = None,
    for_text: bool = False,
    check: Callable[[ModelConfig], object] | None = None,
    mesh: MeshConfig | Scope | None = None,
    warn: Warn = warnings.warn,
    on_progress: Callable[[int], None] = int,
) -> LanguageModel:
    """The model called `name`, with its weights.

    Args:
        name: a run's folder (its newest verified checkpoint), one step of it (`RUN/checkpoints/step_00000200`, or
            `RUN/checkpoints/best` where `training.keep_best` is set), an imported or a Hugging Face folder,
            `hf:owner/name[@revision]`, a llama2.c or GGUF file, or a preset (random weights).
        dtype: of parameters and activations; None keeps the checkpoint's.
        overrides: fields of the model's configuration to change, nested. Parameters must keep their shapes, except that
            a larger `vocab_size` pads the vocabulary.
        weights: pack the weights for inference in this type (`LanguageModel.pack`); `auto` packs them in their own type
            on a CPU, where that is faster, and nowhere else; None leaves them as parameters.
        for_text: refuse a model without a tokenizer before its weights are read.
        check: is given the configuration before the weights are read, and may raise.
        mesh: the devices that the weights are split over as they are read, and that then compute together: a
            configuration for all that there are, or a `Scope` of some. None means the first device.
        warn: is given warnings.
        on_progress: progress callback, given the number of weights read.

    Raises:
        RequestError: there is no such model, or it cannot be used.
    """
    if weights not in (None, "auto"):
        check_weight_type(weights)
    found = find(name, warn)
    if for_text and found.tokenizer is None:
        raise RequestError(NO_TOKENIZER)
    if found.tokenizer is not None and found.tokenizer.dropout:
        warn(f"the tokenizer's BPE dropout of {found.tokenizer.dropout} is off: a text always has the same ids")
    config = adapted(found.config, dtype, overrides or {})
    check_shapes(found.config, config, str(name))
    if check is not None:
        check(config)
    scope = mesh if isinstance(mesh, Scope) else Scope.of(mesh)
    if scope is None:
        if weights == "auto":
            weights = config.param_dtype if jax.default_backend() == "cpu" else None
        params = found.read(config, on_progress, weights)
    else:
        if weights not in (None, "auto"):
            raise RequestError("packed weights are on one device: leave out weights or mesh")
        weights, parameters = None, model_of(config).parameters
        for note in check_fit(parameters, scope):
            warn(f"mesh: {note}")
        params = found.read(config, on_progress, shardings=scope.placement(parameters))
    origin = Origin(found.stop_tokens, found.chat_template, dict(found.facts))
    return LanguageModel(config, params, found.tokenizer, origin, weights, scope)


def find(name: str | Path, warn: Warn = warnings.warn) -> StoredModel:
    """The model that `load` would read, found and checked; its weights are not read yet.

    Raises:
        RequestError: as `load`.
    """
    if str(name).startswith(HUB):
        return open_huggingface(fetch(str(name)))
    path = expand(name)
    if path.parent.name == CHECKPOINTS and (path.parent.parent / CONFIG).is_file():
        return _open_own(path.parent.parent, warn, path.name)
    check_model_name(str(name))
    if path.is_dir():
        return open_huggingface(path) if _is_foreign(path) else _open_own(path, warn)
    if path.is_file():
        return _open_file(path)
    return StoredModel(preset(str(name)).with_vocab(PRESET_VOCAB), _drawn)


def _is_foreign(folder: Path) -> bool:
    """Whether a folder is a Hugging Face model's. A stray config.yaml or config.json beside a model does not matter.

    Raises:
        RequestError: it holds a model of ours as well.
    """
    ours = (folder / CONFIG).exists() and (folder / CHECKPOINTS).is_dir()
    theirs = is_huggingface(folder) and any(folder.glob("*.safetensors"))
    if ours and theirs:
        raise RequestError(
            f"{folder}: two models in one folder: {CONFIG} with {CHECKPOINTS}/, and config.json with *.safetensors;\n"
            "move one of them to a folder of its own"
        )
    return theirs or (is_huggingface(folder) and not (folder / CONFIG).exists())


def _drawn(
    config: ModelConfig,
    on_progress: Callable[[int], None],
    weights: WeightType | None = None,
    shardings: PyTree | None = None,
) -> Params:
    """Random weights."""
    model = model_of(config)
    params = model.init(0, shardings)
    return model.pack(params, weights) if weights else params


def adapted(config: ModelConfig, dtype: str | None, overrides: Mapping[str, Any]) -> ModelConfig:
    """`config` with another type and with changed fields; a larger vocabulary is padding.

    Raises:
        RequestError: a field does not fit, or the vocabulary would shrink.
    """
    fields = merge(config.to_dict(), overrides)
    if dtype is not None:
        fields |= {"param_dtype": dtype, "compute_dtype": dtype}
    wanted, tokens = fields["vocab_size"], config.vocab_size - config.vocab_padding
    if wanted != config.vocab_size:
        if not isinstance(wanted, int) or wanted < tokens:
            raise RequestError(f"model.vocab_size={wanted}: this model has {tokens:,} ids, and none can be removed")
        fields["vocab_padding"] = wanted - tokens
    return validate(ModelConfig, fields)


def check_shapes(stored: ModelConfig, wanted: ModelConfig, name: str) -> None:
    """Refuses a configuration that the stored weights do not fit; only padding and fewer positions may differ.

    Raises:
        RequestError: a parameter has another shape; the first is named.
    """
    if stored == wanted:
        return
    there, here = (_shapes(config) for config in (stored, wanted))
    for path in sorted(there.keys() | here.keys()):
        theirs, ours = there.get(path), here.get(path)
        if theirs is None or ours is None or not all(map(_serves, theirs.shape, ours.shape, ours.axes)):
            had, asked = ("missing" if i is None else list(i.shape) for i in (theirs, ours))
            raise RequestError(
                f"{name}: {path} is {had} in the checkpoint and {asked} in the model asked for; "
                "remove the override that changes this shape"
            )


def _serves(stored: int, wanted: int, axis: str) -> bool:
    return stored == wanted or (axis == "vocab" and stored < wanted) or (axis == "position" and stored > wanted)


def _shapes(config: ModelConfig) -> dict[str, ParameterInfo]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(model_of(config).parameters)
    return {jax.tree_util.keystr(path, simple=True, separator="."): info for path, info in leaves}


def save(lm: LanguageModel, folder: Path) -> None:
    """Writes a model into a new folder of ours, with SHA-256 sums.

    Raises:
        RequestError: the folder exists, or the weights are packed.
        PolygptError: it cannot be written.
    """
    lm.check_unpacked()
    if folder.exists():
        raise RequestError(f"{folder}: exists already; choose another --out")
    check_checkpoint_path(folder)
    with new_folder(folder) as partial:
        write_text(partial / CONFIG, to_yaml({"model": lm.config.to_dict()}))
        write_origin(partial, lm.origin)
        if lm.has_tokenizer:
            lm.tokenizer.save(partial / TOKENIZER)
        checkpoint.save(partial / CHECKPOINTS, checkpoint.Snapshot(0, lm.params))


def write_origin(folder: Path, origin: Origin) -> None:
    """Writes where a model came from, if it is known."""
    if origin != Origin():
        write_text(folder / ORIGIN, origin.to_json())


def read_origin(folder: Path) -> Origin:
    """Reads what `write_origin` wrote.

    Raises:
        RequestError: the file is something else.
    """
    path = folder / ORIGIN
    return Origin.from_json(read_json(path), str(path)) if path.is_file() else Origin()


def _step_called(checkpoints: Path, name: str) -> checkpoint.Checkpoint:
    """The step whose folder is `name`, or the best one.

    Raises:
        RequestError: there is no such step.
        PolygptError: it fails verification.
    """
    folder = checkpoints / name
    if name == "best":
        path = checkpoints / BEST
        if not path.is_file():
            raise RequestError(f"{folder}: this run has marked no best step (training.keep_best=true does)")
        folder = checkpoint.step_folder(checkpoints, read_json(path)["step"])
    if not folder.is_dir():
        there = ", ".join(sorted(p.name for p in checkpoints.glob("step_*"))) or "none"
        raise RequestError(f"{folder}: no such checkpoint; there are: {there}")
    return checkpoint.verify(folder)


def _open_own(folder: Path, warn: Warn, step: str | None = None) -> StoredModel:
    path = folder / CONFIG
    if not path.is_file():
        start = command_line("train", "RECIPE", "--out", folder)
        inside = models_in(folder)
        near = f"there are models inside: {', '.join(sorted(inside)[:5])}" if inside else f"start a run with: {start}"
        raise RequestError(f"{folder}: no model here (neither {CONFIG} nor config.json); {near}")
    fields = read_yaml(path)
    config = validate(ModelConfig, fields.get("model") or {}, f"{path}: model")
    # A run always has a tokenizer; an imported model may have none.
    wanted = "tokenizer" in fields or (folder / TOKENIZER).exists()
    tokenizer = load_tokenizer(folder / TOKENIZER) if wanted else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise RequestError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
    try:
        check_checkpoint_path(folder)
    except RequestError:
        raise RequestError(f"{folder}: not UTF-8, so its checkpoints cannot be read; rename the folder") from None
    checkpoints = folder / CHECKPOINTS
    saved = checkpoint.newest(checkpoints, warn) if step is None else _step_called(checkpoints, step)
    if saved is None:
        command = command_line("train", "--resume", "--out", folder)
        raise RequestError(f"{folder}: no usable checkpoint; train it with: {command}")
    origin = read_origin(folder)

    def read(
        wanted: ModelConfig,
        on_progress: Callable[[int], None],
        weights: WeightType | None = None,
        shardings: PyTree | None = None,
    ) -> Params:
        like = jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), model_of(config).parameters)
        if shardings is not None:  # a table that is padded or cut is placed by its stored shape first
            mesh = jax.tree.leaves(shardings)[0].mesh
            like = jax.tree.map(partial(_placed, mesh=mesh), like, shardings)
        params = _converted(checkpoint.restore(saved, like).params, wanted)
        params = params if shardings is None else jax.device_put(params, shardings)
        return model_of(wanted).pack(params, weights) if weights else params

    facts = {**origin.facts, **({} if step else _figures(folder))}
    return StoredModel(config, read, tokenizer, origin.stop_tokens, origin.chat_template, facts)


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """`leaf` with its placement; replicated if it cannot be split like that."""
    try:
        sharding.shard_shape(leaf.shape)
    except ValueError:
        sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _figures(folder: Path) -> dict[str, Any]:
    """The results of a finished run."""
    path = folder / RESULT
    wanted = ("steps", "train_loss", "val_loss", "val_bits_per_byte")
    return {key: value for key, value in read_json(path).items() if key in wanted} if path.is_file() else {}


def _converted(params: Params, wanted: ModelConfig) -> Params:
    """Parameters for a configuration with another type, more padding of the vocabulary, or fewer positions."""

    def convert(leaf: jax.Array, info: ParameterInfo) -> jax.Array:
        if leaf.shape != info.shape:
            leaf = jnp.pad(leaf, [(0, max(n - m, 0)) for n, m in zip(info.shape, leaf.shape, strict=True)])
            leaf = leaf[tuple(slice(n) for n in info.shape)]
        return leaf.astype(info.dtype)

    return jax.tree.map(convert, params, model_of(wanted).parameters)


def _open_file(path: Path) -> StoredModel:
    from polygpt import interop

    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        return interop.open_gguf(path)
    if path.suffix == ".bin":
        return interop.open_llama2c(path)
    if path.suffix == ".safetensors":
        raise RequestError(f"{path}: only weights; name the folder that also holds their config.json")
    raise RequestError(f"{path}: not a model; name a .gguf file, a llama2.c .bin file, or a folder")
