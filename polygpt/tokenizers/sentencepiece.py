"""SentencePiece's BPE from pieces and scores, as a tokenizer of the `tokenizers` library.

SentencePiece repeatedly merges the two neighbours that form the piece with the best score (Kudo & Richardson 2018). The
library merges by rank: ranking every way of cutting every piece in two, best score first, chooses the same. (Where two
cuts of one piece overlap in a run of one character, SentencePiece takes the left one, the library the better ranked.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import IntEnum

import tokenizers as hf

from polygpt.errors import RequestError

SPACE = "▁"  # how a space is written
_LONGEST = 256  # characters of a piece; SentencePiece's own limit is 16, and every cut is tried
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class PieceKind(IntEnum):
    """The kind of a piece; the numbers are those of SentencePiece and of GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def score_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    space_prefix: bool = True,
    start: int | None = None,
) -> hf.Tokenizer:
    """The tokenizer of `pieces`, whose positions are their ids.

    Args:
        pieces: distinct; spaces are written as `SPACE`, the byte 10 as `<0x0A>`.
        scores: one for each piece.
        kinds: a `PieceKind` for each; only normal pieces are merged.
        space_prefix: a text is encoded as if it began with one more space, and decoded without it.
        start: the id to put before a text.

    Raises:
        RequestError: the pieces do not make a tokenizer.
    """
    longest = max(map(len, pieces), default=0)
    if longest > _LONGEST:
        raise RequestError(f"the pieces make no tokenizer (one has {longest:,} characters; the limit is {_LONGEST})")
    unknown = next((piece for piece, kind in zip(pieces, kinds, strict=True) if kind == PieceKind.UNKNOWN), None)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    has_bytes = sum(_BYTE.fullmatch(piece) is not None for piece in pieces) == 256
    merges = _merges(pieces, scores, kinds)
    try:
        model = hf.models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    except Exception as error:  # the library raises plain Exceptions
        raise RequestError(f"the pieces make no tokenizer ({str(error).splitlines()[0]})") from None
    made = hf.Tokenizer(model)
    prefix = [hf.normalizers.Prepend(SPACE)] if space_prefix else []
    made.normalizer = hf.normalizers.Sequence([*prefix, hf.normalizers.Replace(" ", SPACE)])
    strip = [hf.decoders.Strip(" ", 1, 0)] if space_prefix else []
    steps = [hf.decoders.Replace(SPACE, " "), hf.decoders.ByteFallback(), hf.decoders.Fuse(), *strip]
    made.decoder = hf.decoders.Sequence(steps)
    add_tokens(made, pieces, kinds)
    if start is not None:
        put_before(made, pieces[start], start)
    return made


def add_tokens(made: hf.Tokenizer, pieces: Sequence[str], kinds: Sequence[int]) -> None:
    """Marks control tokens as special, and user-defined ones as matched wherever a text contains them."""
    for piece, kind in zip(pieces, kinds, strict=True):  # in order: tokens outside the vocabulary get the next ids
        special = kind in (PieceKind.UNKNOWN, PieceKind.CONTROL)
        if piece and (special or kind == PieceKind.USER_DEFINED):
            add = made.add_special_tokens if special else made.add_tokens
            add([hf.AddedToken(piece, special=special, normalized=False)])


def put_before(made: hf.Tokenizer, piece: str, number: int) -> None:
    """Puts the token `piece`, whose id is `number`, before every text.

    Raises:
        RequestError: the library's templates cannot spell it.
    """
    try:
        made.post_processor = hf.processors.TemplateProcessing(
            single=[piece, "$A"], pair=[piece, "$A", piece, "$B:1"], special_tokens=[(piece, number)]
        )
    except Exception:  # the library raises plain Exceptions
        raise RequestError(f"the token {piece!r} cannot begin a text: its name has a colon or a dollar") from None


def _merges(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Every way of cutting a normal piece into two normal ones, the best scores first."""
    normal = {p: i for i, (p, kind) in enumerate(zip(pieces, kinds, strict=True)) if kind == PieceKind.NORMAL}
    ranked = []
    for piece, number in normal.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in normal and piece[cut:] in normal:
                ranked.append((-scores[number], number, -cut, piece))
    return [(piece[:-cut], piece[-cut:]) for _, _, cut, piece in sorted(ranked)]
