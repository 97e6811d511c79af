"""Typed, frozen, validated configuration: YAML <-> objects, dotted overrides, parts chosen by `kind`, helpful errors.

Knows nothing of models, data or training: each package declares its own `Config` classes from what is here.
"""

from polygpt.config.base import Config, PartConfig, Seed, Tuple, slot, validate
from polygpt.config.keys import check_keys, known_keys, mistakes
from polygpt.config.overrides import dotted_to_nested, merge, parse_overrides
from polygpt.config.words import as_yaml
from polygpt.config.yaml import parse_yaml, read_yaml, to_yaml

__all__ = [
    "Config",
    "PartConfig",
    "Seed",
    "Tuple",
    "as_yaml",
    "check_keys",
    "dotted_to_nested",
    "known_keys",
    "merge",
    "mistakes",
    "parse_overrides",
    "parse_yaml",
    "read_yaml",
    "slot",
    "to_yaml",
    "validate",
]
