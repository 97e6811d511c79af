"""A polygpt model as lm-evaluation-harness sees one; agrees with the harness's own `hf` on the same weights.

The only file that imports the package at its top: import it after calling `harness.require_harness`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from polygpt.config import validate
from polygpt.errors import RequestError
from polygpt.evaluation.pairs import check_continuation
from polygpt.evaluation.scoring import ProgressCallback, no_progress, row_of, score_continuations, score_rows
from polygpt.generation import Request, Sampler, TextStream, engine_for, run_all
from polygpt.language_model import LanguageModel

# Settings of generation that a task may give; any other is refused rather than ignored.
_KNOWN = {"do_sample", "temperature", "top_p", "top_k", "min_p"}


class HarnessLM(TemplateLM):
    """`loglikelihood`, `loglikelihood_rolling` and `generate_until` of a `LanguageModel`.

    Context and continuation are divided by the harness's own `_encode_pair`. As in its `hf`, special tokens written in
    a text count as such, an empty context is the end-of-text token, and what is too long is cut from the left.
    """

    def __init__(self, lm: LanguageModel, progress: ProgressCallback = no_progress):
        super().__init__()
        self.lm, self._progress = lm, progress

    @property
    def max_length(self) -> int:
        """The model's context length."""
        return self.lm.config.context_length

    @property
    def max_gen_toks(self) -> int:
        """The harness's own default."""
        return 256

    @property
    def eot_token_id(self) -> int:
        """The end-of-text id.

        Raises:
            RequestError: the tokenizer has none.
        """
        found = self.lm.tokenizer.end_of_text
        if found is None:
            raise RequestError("this task scores text from its very beginning; the tokenizer has no end-of-text token")
        return found

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in the names of cached requests."""
        return self.lm.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """The ids of a text after the start token, if the tokenizer has one and the text does not begin with it."""
        start, ids = list(self.lm.tokenizer.start), self.lm.tokenizer.encode(string, special=True)
        return ids if add_special_tokens is False or ids[: len(start)] == start else start + ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        for text, _, continuation in requests:
            check_continuation(continuation, self.max_length, f"{text!r:.80}")
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = score_continuations(self.lm.model, self.lm.params, pairs, self._progress)
        answers = [(score.log_likelihood, score.greedy) for score in scores]
        for (text, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Σ ln p of each text, in the harness's windows: disjoint, but for the last, which has full context."""
        rows, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for window in windows:
                rows.append(row_of(*make_disjoint_window(window), self.max_length))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, score_rows(self.lm.model, self.lm.params, rows, self._progress), strict=True):
            sums[owner] += score.log_likelihood
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop strings."""
        if not requests:
            return []
        asked, streams = zip(*(self._asked(*request.args, seed) for seed, request in enumerate(requests)), strict=True)
        engine = engine_for(self.lm.model, self.lm.params, asked, vocab_size=self.lm.tokenizer.vocab_size)
        texts = [handle.text for handle in run_all(engine, asked, streams, progress=self._progress)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _asked(self, context: str, asked: dict[str, Any], seed: int) -> tuple[Request, TextStream]:
        settings = normalize_gen_kwargs(asked, self.max_gen_toks)
        new_tokens = settings.pop("max_gen_toks")
        tokenizer = self.lm.tokenizer
        end = None if tokenizer.end_of_text is None else tokenizer.decode([tokenizer.end_of_text])
        stop = [word for word in handle_stop_sequences(settings.pop("until", None), end) if word]
        prompt = self._prompt(context, new_tokens)
        request = Request(prompt, new_tokens, _sampler(settings), seed, self.lm.stop_tokens)
        return request, TextStream(self._decode, stop=stop)

    def _prompt(self, text: str, new_tokens: int) -> list[int]:
        """The ids of a context, cut from the left to leave room for `new_tokens`."""
        room = self.max_length - new_tokens
        if room < 1:
            raise RequestError(
                f"this task generates up to {new_tokens} tokens; the model's context holds {self.max_length} in all"
            )
        return (self.tok_encode(text) or [self.prefix_token_id])[-room:]

    def _decode(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """The text of `ids` as `hf` gives it: special tokens, and ids that the tokenizer lacks, leave none."""
        tokenizer = self.lm.tokenizer
        special = set(tokenizer.special_tokens.values())

        def kept(ids: Sequence[int]) -> list[int]:
            return [token for token in ids if token < tokenizer.vocab_size and token not in special]

        return tokenizer.decode_after(kept(context), kept(ids))


def _sampler(settings: dict[str, Any]) -> Sampler:
    """The sampler that a task's generation settings ask for; greedy unless they ask for `do_sample`.

    Raises:
        RequestError: a setting is not known here.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    unknown = sorted(given.keys() - _KNOWN)
    if unknown:
        raise RequestError(f"generation_kwargs.{unknown[0]} is not supported; known: {', '.join(sorted(_KNOWN))}")
    if not given.pop("do_sample", False):
        return Sampler(temperature=0.0)
    return validate(Sampler, given)


def register(load: Callable[[str], LanguageModel], name: str) -> None:
    """Makes `name` known to the harness as a model of one argument: `model`, which `load` opens."""
    from lm_eval.api.registry import register_model

    class Named(HarnessLM):
        """A model by its name, as the harness's command line gives it."""

        def __init__(self, model: str, batch_size: Any = None, max_batch_size: Any = None, device: Any = None):
            super().__init__(load(model))

    register_model(name)(Named)
