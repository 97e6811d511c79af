"""Data: sources of documents, their preparation into token shards, and the loader of batches.

`open_source` finds documents, `prepare` turns them into shards, `open_shards` opens and verifies shards, and
`Loader(shards.train, ...).batch(i)` is a pure function of (seed, i).
"""

from polygpt.data.catalogue import DATASETS, Dataset
from polygpt.data.config import DataConfig, SourceConfig
from polygpt.data.encoding import training_texts
from polygpt.data.loader import Loader
from polygpt.data.mixing import MixedLoader, Stage
from polygpt.data.preparation import prepare, prepare_in_parallel
from polygpt.data.reading import format_of, open_bytes
from polygpt.data.shards import JoinedShards, Manifest, Shards, TokenSplit, is_prepared, open_shards
from polygpt.data.sources import Document, Source, Tally, open_source
from polygpt.data.workers import Progress

__all__ = [
    "DATASETS",
    "DataConfig",
    "Dataset",
    "Document",
    "JoinedShards",
    "Loader",
    "Manifest",
    "MixedLoader",
    "Progress",
    "Shards",
    "Source",
    "SourceConfig",
    "Stage",
    "Tally",
    "TokenSplit",
    "format_of",
    "is_prepared",
    "open_bytes",
    "open_shards",
    "open_source",
    "prepare",
    "prepare_in_parallel",
    "training_texts",
]
