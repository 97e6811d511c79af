"""A foreign configuration, read key by key: see `polygpt.settings`."""

from polygpt.settings import LIMIT, Settings, read_json, unique

__all__ = ["LIMIT", "Settings", "read_json", "unique"]
