"""Perplexity and bits per byte of a text, window by window."""

from __future__ import annotations

import math
import time
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from polygpt.data import DataConfig, Source, format_of, open_bytes
from polygpt.errors import RequestError
from polygpt.evaluation.scoring import ProgressCallback, Row, no_progress, score_rows
from polygpt.language_model import LanguageModel
from polygpt.tokenizers import Tokenizer

# Beyond it e^x is no float64.
_LARGEST = 700.0


@dataclass(frozen=True)
class PerplexityResult:
    """How well a text is predicted.

    Attributes:
        nats_per_token: mean -ln p over the scored tokens.
        perplexity: e to that; None where it exceeds a float.
        bits_per_byte: Σ -log2 p over `bytes`, comparable across tokenizers.
        tokens: how many were scored: all of them and the start tokens between documents, or without a start token all
            but the first.
        bytes: of the text in UTF-8, without `lost_bytes`.
        lost_bytes: those that the tokenizer drops or has no token for but an unknown one.
        context, stride: input tokens a window at most, and tokens between the starts of windows.
        start_token: the id put before each document, from which its first token is predicted; None: there was none.
        documents: how many texts were scored, one after the other.
        seconds: of scoring.
    """

    nats_per_token: float
    perplexity: float | None
    bits_per_byte: float
    tokens: int
    bytes: int
    lost_bytes: int
    context: int
    stride: int
    start_token: int | None
    documents: int
    seconds: float


class Text(NamedTuple):
    """Documents in ids, one after the other, each after the start token if there is one."""

    ids: np.ndarray
    bytes: int
    lost_bytes: int
    start_token: int | None
    documents: int


def read_text(path: Path, documents: bool = False, text_key: str = "text") -> list[str]:
    """The documents of a UTF-8 file, read as training reads them (.gz and .zst are decompressed).

    Those of a .jsonl, .csv or .parquet file are the `text_key` of its rows. Any other file is one text, `<|endoftext|>`
    in it ordinary text; with `documents` that mark divides it. A byte order mark at the beginning is removed.

    Raises:
        RequestError: it is missing, a folder, empty, not UTF-8, or a line is malformed.
    """
    if path.is_dir():
        raise RequestError(f"{path}: is a folder; give a file of text, or a .jsonl file of documents")
    if not documents and format_of(path) in ("text", None):
        return [_whole(path)]
    try:
        return [document.text for document in Source(DataConfig(path=str(path), text_key=text_key), (path,))]
    except RequestError as error:  # which speaks of training's settings
        reason = str(error).splitlines()[0].rstrip(";")
        raise RequestError(reason.replace("set data.text_key to one", "choose one with --text-key")) from None


def _whole(path: Path) -> str:
    with open_bytes(path) as stream:
        data = stream.read().removeprefix(BOM_UTF8)
    if not data:
        raise RequestError(f"{path}: is empty; there is nothing to score")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 text (byte {error.start})") from None


def encode_text(text: str | Sequence[str], tokenizer: Tokenizer, where: str, start: bool = True) -> Text:
    """A text, or several documents, in ids, with what the tokenizer puts before each: a start token, if its file names
    one, or else the end-of-text token, as in training here.

    Without `start`, or where the tokenizer has no such token, nothing is put before them. `<|endoftext|>` written in
    the text is ordinary text.

    Raises:
        RequestError: there is no token to predict, or the tokenizer cannot hold the text.
    """
    texts = [text] if isinstance(text, str) else list(text)
    try:
        encoded = tokenizer.encode_batch(texts)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None
    start_token = (*tokenizer.start, tokenizer.end_of_text)[0] if start else None
    before = [] if start_token is None else [start_token]
    ids = np.concatenate([part for document in encoded for part in (before, document)]).astype(np.int32)
    if len(ids) < 2:
        count = "one token" if len(ids) else "no tokens"
        raise RequestError(f"{where}: the text is {count} and nothing comes before it: there is nothing to predict")
    lost = sum(map(tokenizer.count_lost, texts))
    size = sum(len(each.encode()) for each in texts)
    return Text(ids, max(size - lost, 1), lost, start_token, len(texts))


def check_windows(context: int | None, stride: int | None, context_length: int) -> tuple[int, int]:
    """The window and stride that are meant: by default the model's context, and half of the window.

    Raises:
        RequestError: the window exceeds the model's context, the stride the window, or one is not positive.
    """
    window = context_length if context is None else context
    if not 0 < window <= context_length:
        raise RequestError(f"context={window} must lie in 1..{context_length}, the model's context_length")
    step = max(window // 2, 1) if stride is None else stride
    if not 0 < step <= window:
        raise RequestError(f"stride={step} must lie in 1..{window}, the context: every token is to be scored once")
    return window, step


def windows(ids: np.ndarray, context: int, stride: int) -> Iterator[Row]:
    """Window k reads ids k·stride … k·stride + context - 1 and scores what no window before it did.

    The first thus scores all it can, and every other one `stride` tokens from `context - stride` or more before them;
    with stride = context windows are disjoint. Every id but the first is scored exactly once.
    """
    scored = 0  # ids up to this one are
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids) - 1)
        if end > scored:
            yield Row(ids[begin:end], ids[scored + 1 : end + 1])
            scored = end


def perplexity(
    lm: LanguageModel,
    text: Text,
    context: int | None = None,
    stride: int | None = None,
    progress: ProgressCallback = no_progress,
) -> PerplexityResult:
    """Scores every token of `text` once, from at most `context` tokens before it.

    Raises:
        RequestError: as `check_windows`.
        PolygptError: a likelihood is not a number.
    """
    started = time.perf_counter()
    context, stride = check_windows(context, stride, lm.config.context_length)
    rows = list(windows(text.ids, context, stride))
    nats = -math.fsum(score.log_likelihood for score in score_rows(lm.model, lm.params, rows, progress))
    tokens = len(text.ids) - 1
    mean = nats / tokens
    return PerplexityResult(
        nats_per_token=mean,
        perplexity=math.exp(mean) if mean < _LARGEST else None,
        bits_per_byte=nats / math.log(2) / text.bytes,
        tokens=tokens,
        bytes=text.bytes,
        lost_bytes=text.lost_bytes,
        context=context,
        stride=stride,
        start_token=text.start_token,
        documents=text.documents,
        seconds=time.perf_counter() - started,
    )
