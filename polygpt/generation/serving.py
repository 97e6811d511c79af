"""The engine: a fixed number of slots, through which requests come and go. Knows token ids and streams of text.

The same request gives the same tokens alone or among others, in any slot, with a cold or a warm prefix cache: each
row's arithmetic is that of the same programs, whatever the other rows hold.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import jax
import numpy as np

from polygpt.errors import PolygptError, RequestError
from polygpt.generation.asking import Asked, ask
from polygpt.generation.engine import Request, check_requests
from polygpt.generation.handle import Handle, Listener, Logprob, Part
from polygpt.generation.prefix_cache import PrefixCache
from polygpt.generation.programs import CHUNK
from polygpt.generation.reader import PromptReader
from polygpt.generation.slots import FORCED, Decoded, Masks, empty_slots, slot_programs
from polygpt.generation.text import TextStream
from polygpt.model import Model, Params

# Decoding goes on without looking at arrivals for about this long, or for one step.
SECONDS = 0.01
# From so many on, tokens that a constraint leaves no choice of are read at once; fewer cost no more one by one.
FEWEST_FORCED = 4


class Statistics(NamedTuple):
    """What an engine has done so far, and what it holds now.

    Attributes:
        slots, slots_in_use: sequences that can be and are decoded together.
        queued: requests that wait for a slot.
        requests: that were submitted.
        prompt_tokens: of the prompts that have been read.
        cached_tokens: how many of them came from the prefix cache.
        tokens: that were decoded, those that a constraint forced included.
        steps: passes of the model over all slots.
    """

    slots: int
    slots_in_use: int
    queued: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    steps: int


class Engine:
    """Runs requests through `slots` slots of `length` tokens each.

    `submit` and `cancel` may be called from any thread. `step` may be too: one call runs at a time, the others wait.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        slots: int = 8,
        length: int | None = None,
        queue: int = 256,
        chunk: int = 64,
        cache_bytes: int = 2**28,
        vocab_size: int | None = None,
    ):
        """An engine with all slots free.

        Args:
            model: the decoder.
            params: its weights, which may be packed.
            slots: sequences that are decoded together.
            length: tokens of a sequence at most, prompt included; None is the model's context.
            queue: requests that may wait for a slot.
            chunk: tokens of a prompt that are read at once between steps of decoding, and a block of the prefix cache.
            cache_bytes: of the prefix cache; 0 keeps nothing.
            vocab_size: ids from here on are never sampled (the tokenizer's, where the model's is larger).

        Raises:
            RequestError: a number is out of its range.
        """
        longest = model.longest_sequence
        length = min(model.config.context_length, longest) if length is None else length
        for name, value, least in (
            ("slots", slots, 1),
            ("length", length, 2),
            ("queue", queue, 0),
            ("chunk", chunk, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise RequestError(f"{name} must be a whole number of at least {least}, not {value!r:.40}")
        if length > longest:
            raise RequestError(f"length={length} exceeds the model's longest sequence of {longest} tokens")
        chunk = min(chunk, length)
        self.model, self.params = model, params
        self.slots, self.length, self.queue = slots, length, queue
        self.prefixes = PrefixCache(cache_bytes, chunk)
        self._programs = slot_programs(model.config, length, chunk, vocab_size or model.config.vocab_size)
        self._reader = PromptReader(model, params, self._programs, length, chunk, self.prefixes)
        self._lock, self._stepping = threading.RLock(), threading.RLock()
        self._work = threading.Condition(self._lock)
        self._closed = False
        self._waiting: deque[Handle] = deque()
        self._running: list[Handle | None] = [None] * slots
        self._no_masks = jax.device_put(Masks.none(slots, model.config.vocab_size))
        self._step_seconds = SECONDS
        self._counts = dict.fromkeys(("requests", "prompt_tokens", "cached_tokens", "tokens", "steps"), 0)
        self._ready = False
        self._reset()

    # --- What any thread may call -----------------------------------------------------------------------------

    def submit(self, request: Request, stream: TextStream | None = None, listener: Listener | None = None) -> Handle:
        """Takes a request in; it runs as the engine is stepped.

        A constraint's grammar is compiled here, which may take a second for a large one.

        Args:
            request: what is continued, and how.
            stream: its text; None leaves it at tokens.
            listener: called with the handle and each part as it comes, and with None if the request fails, by the
                thread that steps or cancels; it must return at once. If it raises, its request ends.

        Raises:
            RequestError: the request is impossible, the queue is full, or the engine is closed.
        """
        check_requests(self.model.config, [request])
        if len(request.prompt) > self.length:
            raise RequestError(f"the prompt has {len(request.prompt)} tokens, the engine's length is {self.length}")
        limit = min(len(request.prompt) + request.max_new_tokens, self.length)
        handle = Handle(self, request, stream, limit - len(request.prompt), listener)
        with self._lock:
            if self._closed:
                raise RequestError("the engine is closed")
            free = sum(other is None or other.ended for other in self._running) - (self._reading is not None)
            if len(self._waiting) >= self.queue + free:
                raise RequestError(f"the queue is full: {self.queue} requests wait already; try again later")
            self._counts["requests"] += 1
            if handle.room and not handle.complete:
                self._waiting.append(handle)
                self._work.notify_all()
            else:
                handle.receive([], [])
        return handle

    def cancel(self, handle: Handle) -> None:
        """Ends a request; does nothing if it has ended."""
        with self._lock:
            if not handle.ended:
                if handle in self._waiting:
                    self._waiting.remove(handle)
                handle.end("cancelled")

    def close(self, error: Exception | None = None) -> None:
        """Ends every request, those that wait included, and takes no more; with an error they fail."""
        with self._lock:
            self._closed = True
            for handle in [*self._running, self._reading, *self._waiting]:
                if handle is not None and not handle.ended:
                    handle.end("cancelled") if error is None else handle.fail(error)
            self._waiting.clear()
            self._work.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until there is something to do, or the engine is closed; whether there is something to do."""
        with self._work:
            self._work.wait_for(lambda: self._closed or not self.idle, timeout)
            return not self.idle

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        with self._lock:
            held = [*self._running, self._reading]
            return not self._waiting and all(handle is None or handle.ended for handle in held)

    @property
    def statistics(self) -> Statistics:
        """Counts so far; cheap."""
        with self._lock:
            used = sum(handle is not None and not handle.ended for handle in [*self._running, self._reading])
            return Statistics(self.slots, min(used, self.slots), len(self._waiting), **self._counts)

    def step(self, most: int | None = None, waiting: Handle | None = None) -> list[tuple[Handle, Part]]:
        """Reads a chunk of prompts, then decodes some tokens of every running request.

        Args:
            most: tokens decoded at most; None chooses by time, so that new requests are seen soon.
            waiting: return at once if this request has parts or has ended by now, in another thread's step.

        Returns:
            What was decoded, each part with its request; parts are also kept for whoever iterates over the handle.

        Raises:
            Exception: whatever went wrong in a program; all requests that were running fail with it.
        """
        with self._stepping:
            if waiting is not None and (waiting._parts or waiting.ended):
                return []
            try:
                return self._step(most)
            except BaseException as error:
                self._fail(error)
                raise

    def compile(self) -> None:
        """Compiles every program now instead of at first use; only while the engine is idle."""
        with self._stepping:
            self._reader.compile()
            zero = np.int32(0)
            tokens = np.zeros(self.length, np.int32)
            self._state = self._programs.insert(
                self._state, self._reader.row, tokens, np.int32(1), zero, self._bias_of(None)
            )
            self._state = self._programs.append(self.params, self._state, zero, np.zeros(FORCED, np.int32), zero)
            self._compile_decoding(np.zeros(self.slots, bool))

    # --- Within a step ------------------------------------------------------------------------------------------

    def _step(self, most: int | None) -> list[tuple[Handle, Part]]:
        with self._lock:
            for slot, handle in enumerate(self._running):
                if handle is not None and handle.ended:
                    self._running[slot] = None
            running = self.slots - self._running.count(None)
            reads = min(self._running.count(None), len(self._waiting) + (self._reading is not None))
        for _ in range(max(reads // max(running, 1), min(reads, 1))):
            self._read()
        parts: list[tuple[Handle, Part]] = []
        masks = self._follow_constraints(parts)
        active = np.array([handle is not None and not handle.ended for handle in self._running])
        if not active.any():
            return parts
        self._compile_decoding(active)
        busy = self._reading is not None or (bool(self._waiting) and not active.all())
        limit = 1 if busy or masks else most or max(1, min(CHUNK, int(SECONDS / self._step_seconds)))
        began = time.perf_counter()
        self._state, decoded = self._decode(limit, active, masks)
        self._distribute(decoded, active, began, parts)
        return parts

    def _decode(self, most: int, active: np.ndarray, masks: Masks | None = None) -> tuple:
        if self._asked is None:
            requests = [None if handle is None else handle.request for handle in self._running]
            self._asked = jax.device_put(ask(requests, self.length))
        masks, until_free = masks or self._no_masks, np.bool_(bool(self._waiting))
        most = np.int32(min(most, CHUNK))
        return self._programs.decode(self.params, self._state, self._asked, active, most, until_free, masks)

    def _compile_decoding(self, active: np.ndarray) -> None:
        """Compiles decoding by a call that decodes nothing, so that the time of compilation is not that of a step."""
        if not self._ready:
            self._state, decoded = self._decode(0, active)
            jax.block_until_ready((self._state, decoded))
            self._ready = True

    def _follow_constraints(self, parts: list[tuple[Handle, Part]]) -> Masks | None:
        """Appends what constraints force; gives the masks of the next token, None if no running request has any."""
        words = self._no_masks.words.shape[1]
        masks: np.ndarray | None = None
        for slot, handle in enumerate(self._running):
            if handle is None or handle.ended or handle.matcher is None:
                continue
            try:
                if handle.request.logprobs is None:
                    self._append_forced(slot, handle, parts)
                if handle.ended:
                    continue
                allowed = handle.matcher.allowed(words)
            except RequestError as error:
                with self._lock:
                    handle.fail(error)
                continue
            if masks is None:
                masks = np.full((self.slots, words), 2**32 - 1, np.uint32)
            masks[slot] = allowed
        return None if masks is None else Masks(np.True_, masks)

    def _append_forced(self, slot: int, handle: Handle, parts: list[tuple[Handle, Part]]) -> None:
        forced = handle.matcher.forced()[: handle.room]
        if len(forced) < FEWEST_FORCED:
            return
        handle.matcher.take(forced)
        for start in range(0, len(forced), FORCED):
            new = forced[start : start + FORCED]
            tokens = np.zeros(FORCED, np.int32)
            tokens[: len(new)] = new
            count = np.int32(len(new))
            self._state = self._programs.append(self.params, self._state, np.int32(slot), tokens, count)
        self._give(handle, lambda: handle.receive_forced(forced), slot, parts)

    def _distribute(self, decoded: Decoded, active: np.ndarray, began: float, parts: list[tuple[Handle, Part]]) -> None:
        wanted = any(handle is not None and handle.request.logprobs is not None for handle in self._running)
        decoded = jax.device_get(decoded if wanted else decoded[:2])
        steps, seconds = int(decoded[0]), time.perf_counter() - began
        self._step_seconds = seconds / max(steps, 1)
        self._counts["steps"] += steps
        for slot in np.flatnonzero(active):
            handle, tokens = self._running[slot], decoded[1][slot, :steps].tolist()
            scores = [] if handle.request.logprobs is None else _scores(decoded, slot, handle.request.logprobs)
            before = handle.room
            self._give(handle, lambda h=handle, t=tokens, s=scores: h.receive(t, s), slot, parts)
            handle.decoded += before - handle.room
            handle.seconds += seconds

    def _give(
        self, handle: Handle, receive: Callable[[], Part | None], slot: int, parts: list[tuple[Handle, Part]]
    ) -> None:
        """Gives a request its tokens, unless it was cancelled meanwhile."""
        with self._lock:
            if handle.ended:
                return
            before = handle.room
            try:
                part = receive()
            except PolygptError as error:
                handle.fail(error)
                if not isinstance(error, RequestError):
                    self._empty_slot(slot)
                return
            self._counts["tokens"] += before - handle.room
        if part is not None:
            parts.append((handle, part))

    def _read(self) -> None:
        """Reads one chunk of the prompt whose turn it is, and gives it a slot if that was the last."""
        if self._reading is None or self._reading.ended:
            self._reading = None
            with self._lock:
                if not self._waiting:
                    return
                self._reading = self._waiting.popleft()
            self._reader.begin(self._reading.request.prompt[:-1])
            self._reading.cached_tokens = self._reader.cached
        if self._reader.read():
            self._admit(self._reading)
            self._reading = None

    def _admit(self, handle: Handle) -> None:
        prompt = handle.request.prompt
        tokens = np.zeros(self.length, np.int32)
        tokens[: len(prompt)] = prompt
        slot, bias = self._running.index(None), self._bias_of(handle.request)
        count, place = np.int32(len(prompt)), np.int32(slot)
        self._state = self._programs.insert(self._state, self._reader.row, tokens, count, place, bias)
        self._running[slot], self._asked = handle, None
        self._counts["prompt_tokens"] += len(prompt)
        self._counts["cached_tokens"] += handle.cached_tokens

    def _bias_of(self, request: Request | None) -> np.ndarray:
        bias = np.zeros(self.model.config.vocab_size, np.float32)
        for token, value in ({} if request is None else request.sampler.logit_bias).items():
            bias[token] = value
        return bias

    def _empty_slot(self, slot: int) -> None:
        """Clears numbers that are not finite, which a mask does not keep from the next sequence in a slot."""
        self._reader.forget()
        tokens, place = np.zeros(self.length, np.int32), np.int32(slot)
        count = np.int32(self.length)
        self._state = self._programs.insert(self._state, self._reader.row, tokens, count, place, self._bias_of(None))
        if self._reading is not None:
            self._reader.begin(self._reading.request.prompt[:-1])

    # --- The whole ------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        """Free slots and an empty row."""
        self._state = empty_slots(self.model.config, self.slots, self.length)
        self._asked: Asked | None = None
        self._reading: Handle | None = None
        self._reader.reset()

    def _fail(self, error: BaseException) -> None:
        """Ends all that were running: a program that was interrupted has given up the memory of its arguments."""
        failed = error if isinstance(error, Exception) else PolygptError("interrupted")
        with self._lock:
            for handle in [*self._running, self._reading]:
                if handle is not None and not handle.ended:
                    handle.fail(failed)
            self._running = [None] * self.slots
        self._reset()


def _scores(decoded: Decoded, slot: int, count: int) -> list[Logprob]:
    steps = int(decoded.steps)
    tops = zip(decoded.top_tokens[slot, :steps, :count], decoded.top_logprobs[slot, :steps, :count], strict=True)
    return [
        Logprob(float(own), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
        for own, (tokens, values) in zip(decoded.logprobs[slot, :steps], tops, strict=True)
    ]
