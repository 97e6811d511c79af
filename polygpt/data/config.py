"""The configuration of data: what to read, how to split it, and how to cut it into windows."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from polygpt.config import Config, Tuple
from polygpt.errors import suggest

BUILTIN = "builtin"
_EXECUTION = ("workers", "engine", "batch_chars")  # settings that do not change the tokens


class SourceConfig(Config):
    """One source of a mixture.

    Attributes:
        path: as `data.path`; a folder of prepared shards as well.
        weight: its share of training windows, relative to the other sources' weights.
        epochs: how often its windows may be read; then it is left out. None: as often as its share asks for.
        name: what metrics and the run's folder call it; None is the last part of `path`, without suffixes.
        text_key: None is `data.text_key`.
    """

    path: str | Tuple[str] = Field(min_length=1)
    weight: float = Field(1.0, ge=0)
    epochs: float | None = Field(None, gt=0)
    name: str | None = Field(None, pattern=r"^\w[\w.-]*$")
    text_key: str | None = None

    @property
    def title(self) -> str:
        """Its name, or one taken from the path."""
        path = self.path if isinstance(self.path, str) else self.path[0]
        last = re.sub(r"[^\w-]+", "_", PurePath(path).name.partition(".")[0]).strip("_-")
        return self.name or last or "source"


class StageConfig(Config):
    """Other weights of a mixture from a step of training on.

    Attributes:
        from_step: the first step whose batch has these weights.
        weights: by the source's name; a source that is not named keeps its weight.
    """

    from_step: int = Field(ge=1)
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)


class DataConfig(Config):
    """Where text comes from and how it becomes windows of tokens.

    Attributes:
        path: `builtin` (the documentation and standard library of the running Python); a .txt, .jsonl or .csv file,
            plain or compressed (.gz, .zst), or a .parquet file; a folder of these; a glob; a name from
            `polygpt data list`; `hf:datasets/owner/name[@revision]/GLOB` on the Hugging Face hub; a list of any of
            them; or one folder of prepared shards.
        sources: a mixture, in place of `path`: each source is prepared and validated by itself, and training windows
            are taken from them in proportion to their weights.
        stages: changes of the sources' weights by step, in order.
        text_key: the key of a .jsonl object, or the column of a .csv or .parquet file, that holds the text.
        split: `document` assigns each document to training or validation by a hash of its text; `fraction` holds out
            the end of the whole text, as nanoGPT does; `auto` is `fraction` for fewer than 100 documents.
        validation_fraction: share of the text, or of the documents, that is held out.
        stride: tokens between the starts of training windows; None is the context length, 1 is every offset.
        packing: `windows` cuts the text into windows wherever they fall; `documents` fills each window with whole
            documents as far as they fit, which do not see each other, and pads the rest. Only a document that is longer
            than a window is divided.
        invalid_utf8: text that is not UTF-8 is an error, becomes U+FFFD, or its document is left out (the last two are
            counted).
        workers: processes that tokenize the text. The tokens are the same for any number; with 2 or more, a preparation
            that was interrupted keeps the parts that are done.
        engine: `local` starts the workers on this machine. `ray` runs as many tasks on a Ray cluster: the one that the
            environment variable RAY_ADDRESS names, or one started here (`pip install 'polygpt[ray]'`).
        batch_chars: characters that each process gives to the tokenizer at once, for which it takes about 100 bytes of
            memory a token. A longer document is given in pieces, if the tokenizer allows it (GPT-2's and those trained
            here do). The tokens are the same for any number.
    """

    path: str | Tuple[str] = Field(BUILTIN, min_length=1)
    sources: Tuple[SourceConfig] = ()
    stages: Tuple[StageConfig] = ()
    text_key: str = "text"
    split: Literal["document", "fraction", "auto"] = "document"
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    stride: int | None = Field(None, ge=1)
    packing: Literal["windows", "documents"] = "windows"
    invalid_utf8: Literal["refuse", "replace", "skip"] = "refuse"
    workers: int = Field(1, ge=1, le=1024)
    engine: Literal["local", "ray"] = "local"
    batch_chars: int = Field(1 << 20, ge=1 << 14)

    @model_validator(mode="after")
    def _stride_of_windows(self) -> DataConfig:
        if self.stride is not None and self.packing == "documents":
            raise ValueError("stride is between windows of text; leave it out with packing: documents")
        return self

    @model_validator(mode="after")
    def _sources_are_the_only_ones(self) -> DataConfig:
        titles = [source.title for source in self.sources]
        twice = next((title for index, title in enumerate(titles) if title in titles[:index]), None)
        if twice is not None:
            raise ValueError(f"sources: two are called '{twice}'; give one of them another name (name: ...)")
        if titles and self.path != BUILTIN:
            raise ValueError("sources: given beside path; give one of the two (path: builtin counts as none)")
        if titles and not any(source.weight for source in self.sources):
            raise ValueError("sources: the weights sum to 0; give at least one source a weight above 0")
        return self

    @model_validator(mode="after")
    def _stages_of_sources(self) -> DataConfig:
        before, titles = 0, [source.title for source in self.sources]
        for index, (stage, weights) in enumerate(zip(self.stages, self.weights()[1:], strict=True)):
            if not titles:
                raise ValueError("stages: change the weights of sources, and there are none; give data.sources")
            if stage.from_step <= before:
                raise ValueError(f"stages.{index}.from_step: {stage.from_step} does not come after {before}")
            for name in stage.weights:
                if name not in titles:
                    raise ValueError(f"stages.{index}.weights: no source is called '{name}'; {suggest(name, titles)}")
            if not any(weights[1]):
                raise ValueError(f"stages.{index}.weights: sum to 0; give at least one source a weight above 0")
            before = stage.from_step
        return self

    def weights(self) -> list[tuple[int, list[float]]]:
        """The step from which on the sources have certain weights, and these, for each stage."""
        weights = {source.title: source.weight for source in self.sources}
        found = [(0, list(weights.values()))]
        for stage in self.stages:
            weights |= {name: weight for name, weight in stage.weights.items() if name in weights}
            found.append((stage.from_step, list(weights.values())))
        return found

    def each(self) -> dict[str, DataConfig]:
        """The configuration of each source of a mixture, by name; of other data itself, without a name."""
        own = {"sources": (), "stages": ()}
        return {
            source.title: self.model_copy(
                update={**own, "path": source.path, "text_key": source.text_key or self.text_key}
            )
            for source in self.sources
        } or {"": self}

    def without_execution(self) -> DataConfig:
        """This, with the defaults of the settings that do not change the tokens."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in _EXECUTION})

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple of paths."""
        return (self.path,) if isinstance(self.path, str) else self.path
