"""What came with an imported model, besides its weights and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from polygpt.errors import RequestError


@dataclass(frozen=True)
class Origin:
    """What came with an imported model.

    Attributes:
        stop_tokens: ids at which generation ends, beside the tokenizer's own.
        chat_template: Jinja, for `LanguageModel.chat_prompt`.
        facts: format, architecture, name.
    """

    stop_tokens: tuple[int, ...] = ()
    chat_template: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> Origin:
        """What `to_json` wrote, parsed.

        Raises:
            RequestError: it is something else; `where` is named.
        """
        try:
            origin = cls(tuple(map(int, values["stop_tokens"])), values["chat_template"], dict(values["facts"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(f"{where}: not what an import writes ({type(error).__name__}: {error})") from None
        return origin
