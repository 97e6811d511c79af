"""`polygpt generate --prompts`: many prompts from a file, through one engine, into a file that can be continued."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import click

from polygpt.config import validate
from polygpt.errors import PolygptError, RequestError, suggest
from polygpt.generation import (
    Handle,
    Request,
    Sampler,
    Speculation,
    TextStream,
    as_ids,
    as_prompts,
    as_stop_strings,
    check_requests,
    engine_for,
)

if TYPE_CHECKING:
    from polygpt.language_model import LanguageModel

# Tokens decoded between two looks at what has ended.
STEPS = 16
# Seconds between two lines of progress where standard error is not a terminal.
EVERY = 10.0
_CONSTRAINTS = {"schema", "regex", "choices", "grammar"}
_OWN = {"prompt", "id", "max_new_tokens", "seed", "stop", "stop_tokens", "logprobs", "chat", *_CONSTRAINTS}
# Wrong lines that are named; the others are counted.
_NAMED = 2


@dataclass(frozen=True)
class Job:
    """One line of the input.

    Attributes:
        number: of the line, from 1.
        shown: what its line in the output begins with: its id, if it has one, and the prompt.
        request: what is generated.
        stops: the strings that end it.
        key: a digest of all that its text depends on.
    """

    number: int
    shown: dict[str, Any]
    request: Request
    stops: tuple[str, ...]
    key: str


class Outcome(NamedTuple):
    """What a job has done.

    Attributes:
        kept: lines that were there already.
        added: lines that were written now.
        tokens: in the lines that were written now.
        failed: the errors of all prompts that failed, those of the kept lines included, by their lines in the input.
    """

    kept: int
    added: int
    tokens: int
    failed: dict[int, str]


def run_batch(
    lm: LanguageModel,
    name: str,
    prompts: Path,
    out: Path,
    settings: Mapping[str, Any],
    draft: Speculation | None = None,
) -> Outcome:
    """Continues every prompt of a file, and appends a line to `out` for each, in the order of the input.

    If a prompt fails, its line has the error instead of a text, and the others go on.

    Args:
        lm: the model.
        name: what it is called; the texts in `out` must be of one model.
        prompts: a line of JSON for each prompt.
        out: lines that are there already are kept, and only the others are generated.
        settings: of every prompt that does not have its own.
        draft: for speculation; texts do not depend on it.

    Raises:
        RequestError: a line of the input is wrong, or `out` does not belong to the input; nothing has been generated.
        PolygptError: `out` cannot be written.
    """
    if out.exists() and prompts.samefile(out):
        raise RequestError(f"--out {out} is the file of the prompts; choose another name")
    jobs = read_jobs(lm, name, prompts, settings)
    kept, length, failed = _finished(out, prompts, jobs)
    progress = _Progress(len(jobs))
    tokens = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("ab") as file:
            file.truncate(length)
            for done, (job, handle) in enumerate(_generate(lm, jobs, kept, draft), start=kept + 1):
                line = _line(job, handle)
                _append(file, line)
                if "error" in line:
                    failed[job.number] = line["error"]
                tokens += len(line.get("tokens", ()))
                progress(done, tokens)
    except OSError as error:
        raise PolygptError(f"{out}: cannot be written ({error.strerror or error})") from None
    return Outcome(kept, len(jobs) - kept, tokens, failed)


# --- The input ----------------------------------------------------------------------------------------------------


def read_jobs(lm: LanguageModel, name: str, path: Path, settings: Mapping[str, Any]) -> list[Job]:
    """The jobs of a file's lines; empty lines are passed over.

    Raises:
        RequestError: lines are wrong (the first ones are named by number), or there is none.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    jobs, wrong, ids = [], [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            job = _job(lm, name, number, line, settings)
            first = ids.setdefault(job.shown["id"], number) if "id" in job.shown else number
            if first != number:
                raise RequestError(f"the id {job.shown['id']!r} is that of line {first}, too")
        except RequestError as error:
            wrong.append(f"{path} line {number}: {error}")
        else:
            jobs.append(job)
    if len(wrong) > _NAMED + 1:
        wrong[_NAMED:] = [f"and {len(wrong) - _NAMED} more lines are wrong"]
    if wrong:
        raise RequestError("\n".join(wrong))
    if not jobs:
        raise RequestError(f'{path}: no prompts in it; a line is an object such as {{"prompt": "Once upon a time"}}')
    return jobs


def _job(lm: LanguageModel, name: str, number: int, line: bytes, settings: Mapping[str, Any]) -> Job:
    own = _parsed(line)
    known = _OWN | set(Sampler.model_fields)
    unknown = next((key for key in own if key not in known), None)
    if unknown is not None:
        raise RequestError(f"no setting '{unknown:.40}'; {suggest(unknown, known)}")
    if "prompt" not in own:
        raise RequestError('no "prompt"; it is text or a list of token ids')
    shown = {key: own[key] for key in ("id", "prompt") if key in own}
    if not isinstance(shown.get("id", ""), str | int) or isinstance(shown.get("id"), bool):
        raise RequestError(f"id is text or a whole number, not {shown['id']!r:.40}")
    # null is the default, as in Python.
    ours = {key: value for key, value in settings.items() if key not in _CONSTRAINTS or not own.keys() & _CONSTRAINTS}
    asked = ours | {key: value for key, value in own.items() if key not in shown and value is not None}
    stops = as_stop_strings(asked.pop("stop", ()))
    if stops:
        _ = lm.tokenizer  # refuses a model that has none
    request = _request(lm, own["prompt"], asked)
    check_requests(lm.config, [request])
    return Job(number, shown, request, stops, _key(name, request, stops))


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise RequestError("not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise RequestError(f'not an object such as {{"prompt": "Once upon a time"}}, but {value!r:.40}')
    return value


def _request(lm: LanguageModel, prompt: Any, asked: dict[str, Any]) -> Request:
    prompts, single = as_prompts(prompt)
    if not single:
        raise RequestError("several prompts in one line: write a line for each")
    chat = asked.pop("chat", False)
    if not isinstance(chat, bool):
        raise RequestError(f"chat must be true or false, not {chat!r:.40}")
    if isinstance(prompts[0], str):
        if not lm.has_tokenizer:
            raise RequestError("this model has no tokenizer: give the prompt as a list of token ids")
        ids = lm.prompt_tokens(prompts[0], chat, most=lm.config.context_length)
    elif chat:
        raise RequestError("chat lays out a message, which is text; a prompt of ids is taken as it is")
    else:
        ids = prompts[0]
    ends = tuple(dict.fromkeys([*lm.stop_tokens, *as_ids(asked.pop("stop_tokens", ()), "stop_tokens")]))
    most, seed, logprobs = asked.pop("max_new_tokens", 100), asked.pop("seed", 0), asked.pop("logprobs", None)
    constraint = lm.constraint(**{name: asked.pop(name) for name in _CONSTRAINTS if name in asked})
    bias = asked.get("logit_bias")
    if isinstance(bias, dict):  # JSON has only text as keys
        asked["logit_bias"] = {int(token) if token.isdecimal() else token: value for token, value in bias.items()}
    return Request(ids, most, validate(Sampler, asked), seed, ends, logprobs, constraint)


def _key(name: str, request: Request, stops: Sequence[str]) -> str:
    sampler = request.sampler.model_dump(mode="json")
    parts = [name, list(request.prompt), request.max_new_tokens, sampler, request.seed]
    parts += [request.stop_tokens, request.logprobs, stops]
    if request.constraint is not None:
        parts.append(request.constraint.grammar)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# --- The output ---------------------------------------------------------------------------------------------------


def _finished(out: Path, prompts: Path, jobs: Sequence[Job]) -> tuple[int, int, dict[int, str]]:
    """How many jobs have their line in `out` already, how many bytes these lines are, and which of the jobs failed.

    A torn last line does not count.

    Raises:
        RequestError: a line is not that of its job.
    """
    if not out.exists():
        return 0, 0, {}
    try:
        data = out.read_bytes()
    except OSError as error:
        raise RequestError(f"{out}: cannot be read ({error.strerror})") from None
    whole = data[: data.rfind(b"\n") + 1]
    lines, torn = whole.split(b"\n")[:-1], data[len(whole) :]
    advice = "choose another --out, or remove it"
    if len(lines) + bool(torn) > len(jobs):
        raise RequestError(f"{out} has more lines than {prompts} has prompts; {advice}")
    failed = {}
    for number, (line, job) in enumerate(zip(lines, jobs, strict=False), start=1):
        try:
            written = json.loads(line)
            key = written["key"]
        except (ValueError, TypeError, KeyError):
            raise RequestError(f"{out} line {number}: not what such a job writes; {advice}") from None
        if key != job.key:
            raise RequestError(
                f"{out} line {number}: written for another prompt, other settings or another model; {advice}"
            )
        if "error" in written:
            failed[job.number] = written["error"]
    if torn:
        begin = _json(jobs[len(lines)].shown)[:-1]
        if not (torn.startswith(begin) or begin.startswith(torn)):
            raise RequestError(f"{out} line {len(lines) + 1}: not what such a job writes; {advice}")
    return len(lines), len(whole), failed


def _line(job: Job, handle: Handle) -> dict[str, Any]:
    if handle.error is not None:
        return job.shown | {"error": str(handle.error), "key": job.key}
    line = job.shown | {"text": handle.text, "tokens": handle.tokens, "finish_reason": handle.finish_reason}
    if job.request.logprobs is not None:
        line["logprobs"] = [score.logprob for score in handle.logprobs]
    if job.request.logprobs:
        line["top_logprobs"] = [score.top for score in handle.logprobs]
    return line | {"key": job.key}


def _append(file: BinaryIO, line: Mapping[str, Any]) -> None:
    file.write(_json(line) + b"\n")
    file.flush()


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


# --- In between ---------------------------------------------------------------------------------------------------


def _generate(
    lm: LanguageModel, jobs: Sequence[Job], start: int, draft: Speculation | None
) -> Iterator[tuple[Job, Handle]]:
    """Every job from `start` on with its request, which has finished or failed, in order."""
    if start == len(jobs):
        return
    # Its shape follows from all jobs, those that are done included: a job that was interrupted ends as it would have.
    vocab_size = lm.tokenizer.vocab_size if lm.has_tokenizer else None
    engine = engine_for(lm.model, lm.params, [job.request for job in jobs], vocab_size=vocab_size, draft=draft)
    handles = [engine.submit(job.request, _stream(lm, job)) for job in jobs[start:]]
    for job, handle in zip(jobs[start:], handles, strict=True):
        while not handle.ended:
            engine.step(STEPS)
        yield job, handle


def _stream(lm: LanguageModel, job: Job) -> TextStream | None:
    return TextStream(lm.tokenizer.decode_after, job.request.prompt, job.stops) if lm.has_tokenizer else None


class _Progress:
    """Says on standard error how far a job is: in one line of a terminal, elsewhere in a line now and then."""

    def __init__(self, total: int):
        self.total, self.began, self.shown = total, time.monotonic(), time.monotonic()

    def __call__(self, done: int, tokens: int) -> None:
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if now - self.shown < (0.2 if terminal else EVERY) and done < self.total:
            return
        self.shown = now
        speed = tokens / max(now - self.began, 1e-9)
        line = f"{done:,} of {self.total:,} prompts, {speed:,.0f} tokens/s"
        click.echo(f"\r\x1b[K{line}" if terminal else line, err=True, nl=not terminal or done == self.total)
