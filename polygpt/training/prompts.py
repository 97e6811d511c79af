"""The prompts that samples continue: those of the configuration, or beginnings of lines of the held-out text."""

from __future__ import annotations

import numpy as np

from polygpt.data import Shards
from polygpt.errors import RequestError
from polygpt.tokenizers import Tokenizer
from polygpt.training.config import SamplingConfig

COUNT = 2  # prompts that are taken from the text
LENGTH = 24  # characters of each, up to the end of a word
LOOK = 1000  # tokens in which the beginning of a line is looked for


def prompts_of(samples: SamplingConfig, tokenizer: Tokenizer, shards: Shards, context_length: int) -> tuple[str, ...]:
    """The configured prompts; without any, the first words of lines from different places of the held-out text.

    Those take up half of the context at most.
    """
    if samples.prompts is not None:
        return samples.prompts
    split, end = shards.validation, shards.manifest.end_of_text
    found = []
    for start in np.linspace(0, split.tokens, COUNT, endpoint=False).astype(int):
        ids = split.read(int(start), min(int(start) + LOOK, split.tokens))
        texts = [tokenizer.decode(part[part != end]) for part in np.split(ids, np.flatnonzero(ids == end))]
        # The first line may begin in the middle of a sentence, or of a character.
        lines = "\n".join(texts).lstrip("\n").split("\n")[1:] or texts
        beginnings = [_beginning(line) for line in lines]
        prompt = next((words for words in beginnings if " " in words), max(beginnings, key=len) or "\n")
        while len(prompt) > 1 and len(tokenizer.encode(prompt)) > context_length // 2:
            prompt = prompt.rpartition(" ")[0] or prompt[:-1]
        found.append(prompt)
    return tuple(dict.fromkeys(found))


def _beginning(line: str) -> str:
    """The first words of a line, without a character that was cut."""
    line = line.strip().strip("\ufffd")
    if len(line) <= LENGTH:
        return line
    words = line[: LENGTH + 1].rpartition(" ")[0]
    return words or line[:LENGTH]


def check_prompts(samples: SamplingConfig, tokenizer: Tokenizer, context_length: int) -> None:
    """Refuses configured prompts that cannot be sampled from, before hours of training.

    Raises:
        RequestError: a prompt cannot be encoded, is too long, or is empty and there is no token to start from.
    """
    for index, prompt in enumerate(samples.prompts or () if samples.every else ()):
        where = f"training.samples.prompts.{index}"
        try:
            tokens = len(tokenizer.encode(prompt))
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        if tokens > context_length:
            raise RequestError(f"{where}: has {tokens} tokens, model.context_length is {context_length}; shorten it")
        if not tokens and tokenizer.end_of_text is None:
            raise RequestError(f"{where}: is empty, and the tokenizer has no end-of-text token to start from")
