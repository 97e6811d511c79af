"""Constraints: what a continuation must match (a JSON schema, a regular expression, a list of choices, a grammar).

Grammars are compiled and followed by llguidance (github.com/guidance-ai/llguidance), which says before every token
which ones keep the text on a path that the grammar allows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import UInt32

from polygpt.errors import RequestError

MISSING = "constraints need the package llguidance: pip install 'polygpt[constraints]'"
# llguidance's limits, where ours are lower: Earley items and lexer steps that one token may take. An ambiguous grammar
# takes 20 ms a token with them, 500 ms with its own (50,000 and 200,000); other grammars take a tenth of them.
LIMITS = {"step_max_items": 10_000, "step_lexer_fuel": 100_000}
# Words of llguidance's about a grammar that exceeds a limit: by the text that it forces, by its ambiguity, by its size.
_ENDLESS = "ff_tokens"
_TOO_AMBIGUOUS = ("too many items", "current row has")
_TOO_LARGE = ("too many expressions", "too many states", "too big", "too large", "too complex", "fuel", "lexer")
# How its errors about a place in a grammar begin (line and column), and then those about a regular expression there.
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")
_QUOTED = re.compile(r'invalid regex "(?:[^"\\]|\\.)*" \(in regex\): ', re.DOTALL)
# The errors of its parser of regular expressions: the expression, a mark below the place, and the reason.
_MARKED = re.compile(r"regex parse error:\n {4}(.*)\n {4}( *)\^")
_UNPARSED = re.compile(r"regex parse error:\n.*^error: (.*)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Vocabulary:
    """What a constraint must know of a tokenizer.

    Attributes:
        tokens: the bytes that each id stands for; ids in order.
        special: ids that stand for no text.
        end: the id that ends a text; None if there is none.
        encode: text to ids.
    """

    tokens: Sequence[bytes]
    special: Sequence[int]
    end: int | None
    encode: Callable[[str], list[int]]

    @cached_property
    def compiled(self) -> Any:
        """The tokenizer as llguidance holds it.

        Raises:
            RequestError: llguidance is not installed.
        """
        llguidance = _library()
        # Where no token ends a text, one past the vocabulary does, which is never sampled.
        self_end = len(self.tokens) if self.end is None else self.end
        tokens = [*self.tokens, b"<end>"] if self.end is None else list(self.tokens)
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Wrapped(self, tokens, self_end)), len(tokens))


class _Wrapped:
    """A vocabulary with the names that llguidance asks for."""

    def __init__(self, vocabulary: Vocabulary, tokens: list[bytes], end: int):
        self.tokens, self.eos_token_id, self.bos_token_id = tokens, end, None
        self.special_token_ids = sorted({*vocabulary.special, end})
        self._encode = vocabulary.encode

    def __call__(self, text: str) -> list[int]:
        if isinstance(text, bytes):  # llguidance tries whether bytes are taken
            raise TypeError("text, not bytes")
        return self._encode(text)


def as_grammar(
    schema: Mapping[str, Any] | str | bool | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    grammar: str | None = None,
) -> str | None:
    """The constraint that was given, in llguidance's own form; None if there is none.

    Args:
        schema: a JSON schema, as an object or as text.
        regex: a regular expression that the whole continuation matches.
        choices: texts, one of which the continuation is.
        grammar: in Lark's notation, or in llama.cpp's (GBNF).

    Raises:
        RequestError: several are given, one is malformed, or llguidance is not installed.
    """
    given = {"schema": schema, "regex": regex, "choices": choices, "grammar": grammar}
    named = [name for name, value in given.items() if value is not None]
    if not named:
        return None
    if len(named) > 1:
        raise RequestError(f"give one constraint, not {' and '.join(named)}")
    matcher = _library().LLMatcher
    if choices is not None:
        if isinstance(choices, str) or not choices or not all(isinstance(text, str) and text for text in choices):
            raise RequestError("choices must be a list of texts, none of them empty")
        regex = "|".join(map(re.escape, choices))
    if schema is not None:
        made = matcher.grammar_from_json_schema(_as_schema(schema))
    elif regex is not None:
        made = matcher.grammar_from_regex(_checked_regex(_text(regex, "regex")))
    else:
        made = matcher.grammar_from_lark(_as_lark(_text(grammar, "grammar")))
    failed = matcher.validate_grammar(made, limits=_limits())
    if failed and not failed.startswith("WARNING"):
        # Only of a grammar has the user written the lines that llguidance counts.
        raise RequestError(f"the {named[0]} cannot be used: {_reason(failed, places=grammar is not None)}")
    return made


def _as_lark(grammar: str) -> str:
    """The grammar in Lark's notation; its rules are `name: ...`, those of GBNF are `name ::= ...`."""
    if re.search(r"(?m)^\s*[\w-]+\s*::=", grammar) is None:
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # of no type of its own where a rule is missing
        reason = str(error).partition(", '")[0]  # without the text that follows there
        raise RequestError(f"the grammar cannot be used: as GBNF, {reason}") from None


@dataclass(frozen=True)
class Constraint:
    """A grammar that a whole continuation must match.

    It is compiled when it is made, so that no engine waits for that. A large grammar takes up to a few seconds, during
    which other threads run.

    Attributes:
        vocabulary: of the tokens that it is written in.
        grammar: as `as_grammar` gives it.

    Raises:
        RequestError: no text satisfies the grammar, or it exceeds llguidance's limits, and that shows at its first
            token; otherwise `Matcher` raises it.
    """

    vocabulary: Vocabulary = field(repr=False, compare=False)
    grammar: str

    def __post_init__(self) -> None:
        _ = self.compiled

    @cached_property
    def compiled(self) -> Any:
        """llguidance's matcher at the start of a text, for `Matcher` to copy.

        What the first token may be is computed here too: that takes longer than for any later one.
        """
        matcher = _library().LLMatcher(self.vocabulary.compiled, self.grammar, log_level=0, limits=_limits())
        _check(matcher)
        forced = matcher.compute_ff_tokens()
        matcher.compute_bitmask()
        _check(matcher)
        if forced:  # after the first of them llguidance finds out whether they end
            first = matcher.deep_copy()
            first.consume_tokens(forced[:1])
            _check(first)
        return matcher


class Matcher:
    """Follows one continuation through a grammar.

    Copies of one constraint share its lexer, and llguidance's limits to the lexer's size.

    Attributes:
        end: the id that ends a text; None if there is none.
    """

    def __init__(self, constraint: Constraint):
        vocabulary = constraint.vocabulary
        self._size, self.end = len(vocabulary.tokens), vocabulary.end
        self._matcher = constraint.compiled.deep_copy()

    @property
    def stopped(self) -> bool:
        """The text is complete, and nothing may follow."""
        return self._matcher.is_stopped()

    def forced(self) -> list[int]:
        """The ids that must come next, since nothing else may."""
        return [token for token in self._matcher.compute_ff_tokens() if token < self._size]

    def allowed(self, words: int) -> UInt32[np.ndarray, "W"]:
        """Which ids may come next, a bit each: id 32 i + j is bit j of word i."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        _check(self._matcher)
        allowed = np.zeros(words, np.uint32)
        whole, rest = divmod(self._size, 32)  # beyond the tokenizer's ids llguidance may have one of its own
        used = min(words, -(-self._size // 32), len(bits))
        allowed[:used] = bits[:used]
        if rest and whole < words:
            allowed[whole] &= np.uint32((1 << rest) - 1)
        return allowed

    def take(self, ids: Sequence[int]) -> None:
        """Goes on by `ids`."""
        if ids:
            self._matcher.consume_tokens(list(ids))
        _check(self._matcher)


def _as_schema(schema: Mapping[str, Any] | str | bool) -> str:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise RequestError(f"the schema is not JSON: {error}") from None
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"a JSON schema is an object, true or false, not {schema!r:.40}")
    try:
        return json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise RequestError(f"the schema cannot be written as JSON: {error}") from None


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name} must be text, not {value!r:.40}")
    return value


def _check(matcher: Any) -> None:
    if matcher.is_error():
        failed = matcher.get_error()
        if failed.startswith("NoExtension"):
            raise RequestError("the constraint cannot be met: no text matches it")
        raise RequestError(f"the constraint cannot be followed: {_reason(failed)}")


def _checked_regex(regex: str) -> str:
    """`regex`, unless it ends within an escape sequence: llguidance drops a last backslash."""
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise RequestError("the regex cannot be used: it ends with a backslash that escapes nothing")
    return regex


def _reason(message: str, places: bool = True) -> str:
    """An error of llguidance's in one line, and what would be right if a limit is exceeded.

    Args:
        message: its words; they may go on over several lines, with the place marked in a picture.
        places: say at which line and column of a grammar it is.
    """
    place = _PLACE.match(message)
    where = f"line {place[1]}, column {place[2]}: " if place and places else ""
    rest = message[place.end() :] if place else message
    if "regex parse error:" in rest:
        return where + _of_regex(rest)
    quoted = _QUOTED.match(rest)
    reason = (rest[quoted.end() if quoted else 0 :].strip().splitlines() or ["unknown"])[0][:200]
    if place:
        return where + reason
    words = reason.lower()
    if _ENDLESS in words:
        return (
            f"the text that it forces never ends or is too long ({reason}); a rule that contains itself, such as "
            'start: "a" start, needs an alternative that does not'
        )
    if any(word in words for word in _TOO_AMBIGUOUS):
        return f"it can be read in too many ways ({reason}); write lists as item*, not as list: list list"
    if any(word in words for word in _TOO_LARGE):
        return f"it is too complex ({reason}); repeat less, above all within repetitions, as in (a{{1,500}}){{1,500}}"
    return reason


def _of_regex(message: str) -> str:
    """Why a regular expression does not parse, and where, if it is a single line."""
    marked, told = _MARKED.search(message), _UNPARSED.search(message)
    reason = told[1].splitlines()[0] if told else "it does not parse"
    if marked is None:
        return reason
    return f"{reason}, at character {len(marked[2]) + 1} of the regular expression {marked[1]:.100}"


def _limits() -> Any:
    return _library().LLParserLimits(**LIMITS)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise RequestError(MISSING) from None
    return llguidance
