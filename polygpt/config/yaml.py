"""YAML 1.2 text to values and back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.representer import SafeRepresenter

from polygpt.errors import RequestError

if TYPE_CHECKING:
    from polygpt.config.base import Config


class _Representer(SafeRepresenter):
    """Double-quotes a string that holds a Unicode line break: only there is it escaped, and so read back unchanged."""

    def represent_str(self, data: str) -> Any:
        style = '"' if set(data) & {"\r", "\x85", "\u2028", "\u2029", "\ufeff"} else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def _yaml(typ: Literal["safe", "base"] = "safe") -> YAML:
    # YAML 1.2 (`1e-3` is a float, `yes` a string) and duplicate keys refused; PyYAML gets all three wrong.
    yaml = YAML(typ=typ, pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = None
    yaml.width = 110
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def parse_yaml(text: str, where: str = "YAML", *, scalars: bool = True) -> Any:
    """The value of a YAML 1.2 text; without `scalars` every scalar stays the string that was written.

    Raises:
        RequestError: the text is not YAML, or a mapping repeats a key.
    """
    try:
        return _yaml("safe" if scalars else "base").load(text)
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RequestError(f"{where}{line}: {error.problem or error.context}") from None
    except YAMLError as error:
        raise RequestError(f"{where}: {str(error).splitlines()[0]}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file `path`.

    Raises:
        RequestError: there is no such file, it is not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 text (byte {error.start})") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise RequestError(f"{path}: a mapping is needed, not {type(value).__name__}")
    return value


def to_yaml(value: Config | Mapping[str, Any]) -> str:
    """`value` as YAML text, keys in the order of declaration."""
    stream = io.StringIO()
    _yaml().dump(dict(value) if isinstance(value, Mapping) else value.to_dict(), stream)
    text = stream.getvalue()
    # A flow mapping is broken after a blank. Blanks at the end of a line may be part of a string, too.
    stripped = "".join(line.rstrip(" ") + "\n" for line in text.split("\n")[:-1])
    return stripped if parse_yaml(stripped) == parse_yaml(text) else text
