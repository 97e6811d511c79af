"""`/v1/completions`: prompts, as text or ids, are continued."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from polygpt.errors import RequestError
from polygpt.generation import Logprob, Part, as_prompts
from polygpt.server.answers import Answer, Continued, Form, finish_reason
from polygpt.server.bodies import read_body
from polygpt.server.errors import invalid
from polygpt.server.logprobs import Offsets, chat_logprobs, completion_logprobs
from polygpt.server.sampling import check_count, constraint_of, works_of
from polygpt.server.schemas import Completion
from polygpt.server.served import Served
from polygpt.server.settings import ServerSettings
from polygpt.server.state import facts_of, state_of


async def completions(request: Request) -> Any:
    """Continues one prompt or several."""
    state = state_of(request)
    body = await read_body(request, Completion, state.settings.json_depth)
    served = state.model(body.model)
    facts_of(request).model = served.name
    _check(body, served, state.settings)
    constraint = await constraint_of(served, state.settings, regex=body.regex, grammar=body.grammar)
    prompts = await _prompts(body, served, state.settings)
    echoed = [Echo(served, ids) for ids in prompts] if body.echo else []
    form = CompletionForm(served, body, len(prompts), echoed)
    answer = Answer(request, served, body, form, prompts)
    if body.beams is not None:
        return await answer.respond_with_beams(body.max_tokens)
    if body.echo and body.logprobs is not None:
        for echo in echoed:
            echo.scores = await answer.meanwhile(served.score(echo.tokens, body.logprobs))
    samples = max(body.n, body.best_of or 0)
    logprobs = 0 if body.logprobs is None and samples > body.n else body.logprobs
    works = []
    if body.max_tokens:
        how = {"samples": samples, "max_tokens": body.max_tokens, "logprobs": logprobs, "constraint": constraint}
        works = works_of(served, prompts, body, state.settings, **how)
    return await answer.respond(works)


class Echo:
    """A prompt that is given back before its continuation."""

    def __init__(self, served: Served, tokens: list[int]):
        start = len(served.lm.tokenizer.start)
        hidden = start if tuple(tokens[:start]) == served.lm.tokenizer.start and len(tokens) > start else 0
        self.tokens, self.hidden = tokens, hidden
        self.text = served.lm.tokenizer.decode_after(tokens[:hidden], tokens[hidden:])
        self.scores: list[Logprob | None] = []


class CompletionForm(Form):
    """The answers of `/v1/completions`."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, served: Served, body: Completion, prompts: int, echoed: list[Echo]):
        self.served, self.body, self.prompts, self.echoed = served, body, prompts, echoed
        self.offsets = [Offsets(served) for _ in range(prompts * body.n)]

    def beginnings(self) -> list[dict[str, Any]]:
        """The echoed prompts; for `max_tokens` 0 they are the whole answer."""
        if not self.echoed:
            return []
        reason = None if self.body.max_tokens else "length"
        return [self._choice(index, Continued(finish_reason=reason), True) for index in range(len(self.offsets))]

    def deltas(self, index: int, part: Part) -> list[dict[str, Any]]:
        """One choice for a part."""
        return [self._choice(index, Continued(part.tokens, part.text, part.logprobs, part.finish_reason), False)]

    def choices(self, sequences: list[Continued]) -> list[dict[str, Any]]:
        """The choices of all prompts; of `best_of` samples the `n` with the highest mean log probability."""
        n = self.body.n
        if not sequences:
            sequences = [Continued(finish_reason="length")] * len(self.offsets)
        samples = len(sequences) // self.prompts
        best = []
        for start in range(0, len(sequences), samples):
            own = sequences[start : start + samples]
            best += own if samples == n else sorted(own, key=_mean_logprob, reverse=True)[:n]
        return [self._choice(index, sequence, bool(self.echoed)) for index, sequence in enumerate(best)]

    def _choice(self, index: int, done: Continued, with_prompt: bool) -> dict[str, Any]:
        tokens, text, scores = done.tokens, done.text, list(done.scores)
        if with_prompt:
            echo = self.echoed[index // self.body.n]
            text, tokens = echo.text + text, echo.tokens[echo.hidden :] + tokens
            scores = echo.scores[echo.hidden :] + scores
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason(done.finish_reason)}
        if self.body.logprobs is not None:
            choice["logprobs"] = completion_logprobs(self.served, tokens, scores, self.offsets[index])
            if self.body.return_token_ids:
                choice["logprobs"]["content"] = chat_logprobs(self.served, tokens, scores, True)
        if self.body.return_token_ids:
            choice["token_ids"] = tokens
        return choice


def _mean_logprob(done: Continued) -> float:
    if not done.scores:
        return 0.0
    return sum(score.logprob for score in done.scores) / len(done.scores)


def _check(body: Completion, served: Served, settings: ServerSettings) -> None:
    check_count("n", body.n, settings.max_n)
    check_count("best_of", body.best_of, settings.max_n)
    check_count("max_tokens", body.max_tokens, served.length)
    if not body.max_tokens and not body.echo:
        raise invalid("max_tokens: 0 goes with echo, which gives the prompt back", param="max_tokens")
    if body.best_of is not None and body.best_of < body.n:
        raise invalid(f"best_of: {body.best_of} is below n={body.n}", param="best_of")
    if body.stream and body.best_of is not None and body.best_of > body.n:
        raise invalid("best_of: the best are known at the end only, so they cannot be streamed", param="best_of")


async def _prompts(body: Completion, served: Served, settings: ServerSettings) -> list[list[int]]:
    try:
        prompts, _ = as_prompts(body.prompt)
    except RequestError as error:
        raise invalid(f"prompt: {error}", param="prompt") from None
    check_count("prompt", len(prompts), settings.max_prompts)
    return [await served.prompt_ids(prompt) for prompt in prompts]
