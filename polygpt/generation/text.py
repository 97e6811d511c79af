"""From ids to text: one stream for everything that generates.

A `TextStream` is fed a sequence's new ids in any portions and gives back the text that can no longer change. The pieces
joined are the same for every division into portions, since ids are decoded one at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# decode(context, ids): the text that `ids` add after `context` (`Tokenizer.decode_after`).
Decode = Callable[[Sequence[int], Sequence[int]], str]


class TextStream:
    """The text of one continuation.

    Attributes:
        text: the text so far, up to a stop string.
        stopped: a stop string was met; ids that come after it are ignored.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        """`prompt`: the ids that the continuation follows."""
        self.text, self.stopped = "", False
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._starts: list[int] = []  # the length of the text before each of them
        self._shown = 0
        self._context = list(prompt)
        # Ids that end within a character, which decode to U+FFFD there until its last byte has come.
        self._unfinished: list[int] = []
        self._settled = ""  # the text before them

    @property
    def tokens(self) -> list[int]:
        """The ids of `text`: without those of a stop string, unless one holds the end of the text as well."""
        if not self.stopped:
            return list(self._ids)
        return self._ids[: sum(start < len(self.text) for start in self._starts)]

    @property
    def shown_tokens(self) -> int:
        """How many ids belong to the text that was given out so far: those that begin within it."""
        return bisect_left(self._starts, self._shown)

    def feed(self, ids: Iterable[int]) -> str:
        """Takes further ids; gives the new text that can no longer change."""
        for token in ids:
            if self.stopped:
                break
            self._add(token)
        text = self._finished_text()
        held = 0 if self.stopped else max((_overlap(text, word) for word in self._stop), default=0)
        return self._show(text[: len(text) - held])

    def close(self) -> str:
        """No more ids come: gives the rest of the text."""
        searched, self._unfinished = len(self._finished_text()), []
        self._stop_at_word(searched)
        return self._show(self.text)

    def _show(self, text: str) -> str:
        piece = text[self._shown :]
        self._shown += len(piece)
        return piece

    def _finished_text(self) -> str:
        """The text without a character that is not complete yet."""
        return self._settled + self.text[len(self._settled) :].rstrip(REPLACEMENT) if self._unfinished else self.text

    def _add(self, token: int) -> None:
        before = self._finished_text()
        self._ids.append(token)
        self._starts.append(len(before))
        new = self._decode(self._context, [*self._unfinished, token])
        if self._unfinished:
            alone = self._decode([*self._context, *self._unfinished], [token])
            # Then `token` does not continue the character. (A token that adds nothing may be the next byte of one.)
            if alone and new == self.text[len(self._settled) :] + alone:
                self._settle()
                new = alone
        self._unfinished.append(token)
        self.text = self._settled + new
        if not new.endswith(REPLACEMENT):
            self._settle()
        self._stop_at_word(len(before))

    def _settle(self) -> None:
        self._settled = self.text
        self._context, self._unfinished = [*self._context, *self._unfinished][-4:], []

    def _stop_at_word(self, searched: int) -> None:
        """Cuts the text at a stop string that ends after the first `searched` characters."""
        text = self._finished_text()
        places = [text.find(word, max(searched - len(word) + 1, 0)) for word in self._stop]
        cut = min((at for at in places if at >= 0), default=None)
        if cut is not None:
            self.text, self.stopped, self._unfinished = text[:cut], True, []


def _overlap(text: str, word: str) -> int:
    """The length of the longest end of `text` with which `word` begins, short of all of it."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
