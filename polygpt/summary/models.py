"""Which model or run a name refers to, and what the model costs, as plain data for tables and JSON."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import AbstractMesh

from polygpt.config import as_yaml, dotted_to_nested, merge, to_yaml, validate
from polygpt.errors import PolygptError, RequestError
from polygpt.files import expand
from polygpt.model import ModelConfig, model_of
from polygpt.presets import PRESET_VOCAB
from polygpt.recipes import load_recipe, model_changes, named_fields, without_mesh
from polygpt.sharding import MESH_AXES, MeshOnly, Rules, Scope, bytes_per_device, describe_mesh, replication
from polygpt.summary.schedule import schedule_points
from polygpt.summary.tree import model_tree

if TYPE_CHECKING:
    from polygpt.training import RunConfig, TrainingConfig

# Imported where they are used, for runs and files only: loading, data and training. They take as long as the model.

# A larger text (in bytes) is not read just to count its characters.
LARGEST_TEXT = 2**26


@dataclass(frozen=True)
class Resolved:
    """What a name refers to.

    Attributes:
        model: the model, its vocabulary filled in.
        run: the run it belongs to, the vocabulary as configured; None for a model alone.
        vocabulary: how an open vocabulary was filled in; None if it was not open.
        repeatable: whether the result depends on nothing but the name, polygpt's own files and the named YAML file.
    """

    model: ModelConfig
    run: RunConfig | None = None
    vocabulary: str | None = None
    repeatable: bool = True


def resolve_model(name: str, overrides: Mapping[str, Any] | None = None, *, recipe_first: bool = False) -> Resolved:
    """The model that a preset, a recipe, a YAML file (of a model or a run), or any MODEL names.

    Overrides are written as in a run (`model.num_layers=4`). A name that a preset and a recipe share is the preset,
    unless `recipe_first`.

    Raises:
        RequestError: there is nothing by that name, or an override is wrong.
    """
    found = named_fields(name, overrides, recipe_first=recipe_first)
    if found is None:
        from polygpt.loading import find

        fields = merge(find(name).config.to_dict(), as_yaml(model_changes(without_mesh(overrides or {}))))
        return Resolved(validate(ModelConfig, fields, name), repeatable=False)
    fields, of_run = found
    if not of_run:
        model = validate(ModelConfig, fields, name)
        counted = None if model.vocab_size else f"counted with GPT-2's {PRESET_VOCAB:,} ids"
        return Resolved(model.with_vocab(PRESET_VOCAB), None, counted)
    from polygpt.training import RunConfig

    initial = fields["training"].get("initial") if isinstance(fields["training"], Mapping) else None
    derived = initial is not None and not expand(name).is_dir()  # a run's folder has all of its model
    run = load_recipe(name, overrides) if derived else validate(RunConfig, fields)
    if run.model.vocab_size is not None:
        return Resolved(run.model, run, repeatable=run.training.initial is None)
    size, source, repeatable = _vocabulary(run)
    return Resolved(run.model.with_vocab(size), run, source, repeatable)


def _vocabulary(run: RunConfig) -> tuple[int, str, bool]:
    """The size of the run's vocabulary, how it is known, and whether no file had to be read for it."""
    from polygpt.data import is_prepared, open_shards, open_source
    from polygpt.tokenizers import load_tokenizer

    tokenizer = run.tokenizer
    try:
        for data in run.data.each().values():
            if is_prepared(data):
                return open_shards(data.paths[0]).manifest.vocab_size, "that of the prepared shards", False
        match tokenizer.kind:
            case "byte":
                return 256 + len(tokenizer.specials), "every byte", True
            case "bpe":
                return tokenizer.vocab_size, "tokenizer.vocab_size; a short text gives fewer", True
            case "file" | "hf":
                return load_tokenizer(tokenizer.place).vocab_size, f"that of {tokenizer.place}", False
        sources = [open_source(data) for data in run.data.each().values()]
        if sum(Path(file).stat().st_size for source in sources for file in source.files) <= LARGEST_TEXT:
            alphabet = set().union(*(document.text for source in sources for document in source))
            return len(alphabet) + len(tokenizer.specials), "the characters of the text", False
    except (PolygptError, OSError):  # training reports what is wrong
        pass
    size = len(string.printable)
    return size, "assumed; it will be the number of characters in the text", False


def shown(name: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that `polygpt show` prints for `name`, ready for JSON.

    `yaml` is the configuration to be printed, of the whole run where there is one; `facts` is what `summary` gives, and
    of a run its other settings under `run` and its learning rate by step under `schedule`; on a mesh what each device
    holds under `mesh`; `tree` holds the parts;
    `vocabulary` and `repeatable` are those of `Resolved`.

    Raises:
        RequestError: as `resolve_model`.
    """
    resolved = resolve_model(name, overrides)
    run = resolved.run
    facts = summary(resolved.model, run and run.training)
    if (placed := _on_mesh(resolved, overrides or {})) is not None:
        facts["mesh"] = placed
    if run is not None:
        facts["schedule"] = schedule_points(run.training)
        facts["run"] = {key: value for key, value in run.to_dict().items() if key != "model"}
    text = to_yaml(resolved.model if run is None else {"model": resolved.model.to_dict(), **facts["run"]})
    own = any(":" in kind for kind in _kinds(facts))  # the code of a user's own part may change
    return {
        "yaml": text,
        "facts": facts,
        "tree": model_tree(model_of(resolved.model)).to_dict(),
        "vocabulary": resolved.vocabulary,
        "repeatable": resolved.repeatable and not own,
    }


def _on_mesh(resolved: Resolved, overrides: Mapping[str, Any]) -> dict[str, Any] | None:
    """What each device of the mesh holds: that of the run, of `mesh` among the overrides, or the model's own layout."""
    changes = {key: value for key, value in overrides.items() if key.partition(".")[0] == "mesh"}
    asked = validate(MeshOnly, dotted_to_nested(changes)).mesh if resolved.run is None else resolved.run.mesh
    layout = resolved.model.layout
    mesh = layout if asked is None or asked == "auto" else asked
    if mesh is None:
        return None
    if layout is not None and mesh.shape == layout.shape and not (mesh.rules or mesh.activation_rules):
        mesh = layout
    scope, parameters = Scope(AbstractMesh(mesh.shape, MESH_AXES), Rules.of(mesh)), model_of(resolved.model).parameters
    return {
        "devices": mesh.devices,
        "axes": dict(zip(MESH_AXES, mesh.shape, strict=True)),
        "layout": describe_mesh(mesh.shape),
        "parameter_bytes": bytes_per_device(parameters, scope),
        "replicated": replication(parameters, scope),
    }


def _kinds(value: Any) -> list[str]:
    """The kinds of all parts in plain data."""
    if isinstance(value, Mapping):
        own = [value["kind"]] if isinstance(value.get("kind"), str) else []
        return own + [kind for inner in value.values() for kind in _kinds(inner)]
    return [kind for inner in value for kind in _kinds(inner)] if isinstance(value, list) else []


def summary(config: ModelConfig, training: TrainingConfig | None = None) -> dict[str, Any]:
    """The resolved configuration and what it costs.

    The state's bytes are those of decoding one sequence, FLOPs those of training on one token at full context.
    `training_bytes` counts parameters, gradients and the optimizer's state (without `training`, Adam's two moments),
    but not activations.
    `attention_implementation` is None if the requested one cannot run on this machine; `notes` says so, along with
    anything else worth knowing before training.
    """
    model = model_of(config)
    init_optimizer = None
    if training is not None:
        from polygpt.training import build_optimizer

        init_optimizer = build_optimizer(training.optimizer, model, lambda step: 0.0, training.groups).init
    implementation, refusal = None, None
    try:
        implementation = model.attention_implementation()
    except RequestError as error:
        refusal = f"cannot run on this machine: {error}"
    return {
        "config": config.to_dict(),
        "parameters": model.num_parameters,
        "active_parameters": model.num_active_parameters,
        "non_embedding_parameters": model.num_non_embedding_parameters,
        "training_bytes": model.training_bytes(init_optimizer),
        "kv_cache_bytes_per_token": model.state_bytes_per_token,
        "state_bytes_at_full_context": model.state_bytes(config.context_length),
        "flops_per_token": model.flops_per_token,
        "attention_implementation": implementation,
        "causal_in_training": model.training_caveat is None,
        "notes": [note for note in (model.training_caveat, refusal) if note],
    }
