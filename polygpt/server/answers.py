"""What both kinds of completion share: running a job and laying out its answer, whole or as a stream."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from polygpt.generation import Logprob, Part
from polygpt.server.errors import invalid
from polygpt.server.jobs import Job, Work
from polygpt.server.sampling import check_count
from polygpt.server.schemas import Sampled
from polygpt.server.served import Served
from polygpt.server.state import facts_of, state_of
from polygpt.server.streaming import COMMENT, DONE, EventStream, dump, event, unless_gone, watched

T = TypeVar("T")


@dataclass
class Continued:
    """One finished continuation."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    scores: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, part: Part) -> None:
        """Appends a part."""
        self.tokens += part.tokens
        self.text += part.text
        self.scores += part.logprobs
        self.finish_reason = part.finish_reason


class Form(ABC):
    """How the answers of one route look.

    Attributes:
        prefix, whole, chunk: of the answer's id, and its `object` as a whole and as a chunk of a stream.
    """

    prefix: ClassVar[str]
    whole: ClassVar[str]
    chunk: ClassVar[str]

    @abstractmethod
    def beginnings(self) -> list[dict[str, Any]]:
        """The choices of a stream's first events, before anything is decoded."""

    @abstractmethod
    def deltas(self, index: int, part: Part) -> list[dict[str, Any]]:
        """A part as choices of a stream's event."""

    @abstractmethod
    def choices(self, sequences: list[Continued]) -> list[dict[str, Any]]:
        """The choices of a whole answer."""


def finish_reason(reason: str | None) -> str | None:
    """The engine's reason in OpenAI's words."""
    return "length" if reason == "context_length" else reason


class Answer:
    """A job on its way to a client."""

    def __init__(self, request: Request, served: Served, body: Sampled, form: Form, prompts: list[list[int]]):
        """`prompts`: the ids of each; the job of `respond` has as many sequences of each as of any other."""
        self.request, self.served, self.body, self.form = request, served, body, form
        self.prompts = prompts
        self.settings = state_of(request).settings
        self.head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": served.name}
        # What the events of a stream have in common, around their choices.
        common = dump({"object": form.chunk, **self.head, "choices": []})
        self._before, self._after = b"data: " + common[:-2], b',"usage":null}' if body.wants_usage else b"}"

    async def respond(self, works: list[Work]) -> Response | EventStream:
        """Runs the sequences and gives the answer; a stream runs as it is sent.

        Raises:
            ApiError: the job was refused, or failed.
        """
        runner, deadline = self.served.runner, self.settings.deadline_seconds
        job = Job(works)
        job.on_end.append(lambda: self._count(job))
        runner.submit(job)
        if self.body.stream:
            return EventStream(job, runner, self._events(job), deadline)
        sequences = [Continued() for _ in works]
        with watched(job, runner, self.request.receive, deadline):
            while parts := await job.next():
                for index, part in parts:
                    sequences[index].add(part)
        return self._whole(sequences, self._usage_of(job))

    async def meanwhile(self, computing: Coroutine[Any, Any, T]) -> T:
        """What `computing` gives, unless the client goes away or the deadline passes.

        Raises:
            Disconnected, ApiError: it did.
        """
        return await unless_gone(computing, self.request.receive, self.settings.deadline_seconds)

    async def respond_with_beams(self, max_tokens: int) -> Response:
        """The likeliest continuations of each prompt, found by beam search.

        Raises:
            ApiError: the request asks for what does not go with beams.
        """
        body = self.body
        check_count("beams", body.beams, self.settings.max_beams)
        self._refuse_with_beams()
        found: list[Continued] = []
        for prompt in self.prompts:
            best = await self.meanwhile(self.served.beams(prompt, body.beams, body.n, max_tokens))
            found += [Continued(beam.tokens, beam.text, [], beam.finish_reason) for beam in best]
        generated = sum(len(done.tokens) for done in found)
        state_of(self.request).metrics.count_tokens(self.served.name, sum(map(len, self.prompts)), generated)
        return self._whole(found, self._usage(generated, 0))

    def _refuse_with_beams(self) -> None:
        """Beams search; what samples, cuts or streams does not go with them."""
        fields = type(self.body).model_fields
        plain = {"model", "prompt", "messages", "n", "beams", "max_tokens", "max_completion_tokens", "return_token_ids"}
        for name in sorted(self.body.model_fields_set - plain):
            value = getattr(self.body, name)
            if value != fields[name].get_default(call_default_factory=True) and (name, value) != ("temperature", 0):
                raise invalid(f"{name} does not go with beams", param=name)
        if self.body.n > self.body.beams:
            raise invalid(f"{self.body.beams} beams give at most {self.body.beams} choices", param="n")

    def _whole(self, sequences: list[Continued], usage: dict[str, Any]) -> Response:
        answer = {"object": self.form.whole, **self.head, "choices": self.form.choices(sequences), "usage": usage}
        return Response(dump(answer), media_type="application/json")

    async def _events(self, job: Job) -> AsyncIterator[bytes]:
        if beginnings := self.form.beginnings():
            yield b"".join(map(self._event, beginnings))
        while (parts := await job.next(self.settings.comment_seconds)) or not job.ended:
            if not parts:
                yield COMMENT
            choices = (choice for index, part in merged(parts) for choice in self.form.deltas(index, part))
            data = b"".join(map(self._event, choices))
            if data:
                yield data
        if self.body.wants_usage:
            yield event({"object": self.form.chunk, **self.head, "choices": [], "usage": self._usage_of(job)})
        yield DONE

    def _event(self, choice: dict[str, Any]) -> bytes:
        return b"%b%b]%b\n\n" % (self._before, to_json(choice), self._after)

    def _count(self, job: Job) -> None:
        """Reports a finished job to the metrics and the log, however it ended."""
        state_of(self.request).metrics.count(self.served.name, job, self.prompts)
        self._usage_of(job)

    def _usage_of(self, job: Job) -> dict[str, Any]:
        """The numbers of a job's tokens; a prompt of several samples counts once."""
        return self._usage(sum(job.tokens), job.cached_tokens(len(self.prompts)))

    def _usage(self, generated: int, cached: int) -> dict[str, Any]:
        facts, prompted = facts_of(self.request), sum(map(len, self.prompts))
        facts.prompt_tokens, facts.completion_tokens = prompted, generated
        return {
            "prompt_tokens": prompted,
            "completion_tokens": generated,
            "total_tokens": prompted + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def merged(parts: list[tuple[int, Part]]) -> list[tuple[int, Part]]:
    """The parts with those of one sequence joined: a client that lags behind gets fewer and longer ones."""
    if len(parts) == 1:
        return parts
    joined: dict[int, Part] = {}
    for index, part in parts:
        before = joined.get(index)
        if before is not None:
            tokens, logprobs = before.tokens + part.tokens, before.logprobs + part.logprobs
            part = Part(tokens, before.text + part.text, logprobs, part.finish_reason)
        joined[index] = part
    return list(joined.items())
