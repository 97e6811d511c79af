"""The engine: a fixed number of slots, through which requests come and go. Knows token ids and streams of text.

The same request gives the same tokens alone or among others, in any slot, with a cold or a warm prefix cache: each
row's arithmetic is that of the same programs, whatever the other rows hold.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from polygpt.errors import PolygptError, RequestError
from polygpt.generation.drafting import draft_next, learn
from polygpt.generation.handle import Handle, Listener, Part, forced_tokens, scores_of
from polygpt.generation.prefix_cache import PrefixCache
from polygpt.generation.prompts import as_whole
from polygpt.generation.requests import Request, check_requests
from polygpt.generation.runner import SlotRunner
from polygpt.generation.slots import CHUNK, Decoded
from polygpt.generation.speculation import Draft, DraftTokens, Lookup, Speculation, check_draft
from polygpt.generation.statistics import Statistics
from polygpt.generation.text import TextStream
from polygpt.model import Model, Params

# Decoding goes on without looking at arrivals for about this long, or for one step.
SECONDS = 0.01


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
        draft: Speculation | None = None,
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
            draft: draft tokens and check several in one pass, by `lookup` in the sequence itself or by a draft model;
                requests with constraints do without.

        Raises:
            RequestError: a number is out of its range, or speculation is not possible with one of the models.
        """
        longest = model.longest_sequence
        length = min(model.config.context_length, longest) if length is None else length
        as_whole(slots, "slots", 1)
        as_whole(length, "length", 2)
        as_whole(queue, "queue", 0)
        as_whole(chunk, "chunk", 1)
        as_whole(cache_bytes, "cache_bytes", 0)
        if vocab_size is not None:
            as_whole(vocab_size, "vocab_size", 1)
        if length > longest:
            raise RequestError(f"length={length} exceeds the model's longest sequence of {longest} tokens")
        vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        self.model, self.params = model, params
        self.slots, self.length, self.queue = slots, length, queue
        self.prefixes = PrefixCache(cache_bytes, min(chunk, length))
        if draft is not None:
            check_draft(model, draft, length, vocab_size)
        self._draft = draft
        self._runner = SlotRunner(
            model,
            params,
            slots=slots,
            length=length,
            prefixes=self.prefixes,
            vocab_size=vocab_size,
            speculates=draft is not None,
            draft=draft if isinstance(draft, Draft) else None,
        )
        self._lock, self._stepping = threading.RLock(), threading.RLock()
        self._work = threading.Condition(self._lock)
        self._closed = False
        self._waiting: deque[Handle] = deque()
        self._running: list[Handle | None] = [None] * slots
        self._reading: Handle | None = None
        self._step_seconds = SECONDS
        self._counts = dict.fromkeys(Statistics._fields[3:], 0)

    # --- What any thread may call -----------------------------------------------------------------------------

    def submit(self, request: Request, stream: TextStream | None = None, listener: Listener | None = None) -> Handle:
        """Queues a request; it runs as the engine is stepped.

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
        handle = Handle(self, request, stream, request.limit(self.length) - len(request.prompt), listener)
        with self._lock:
            if self._closed:
                raise RequestError("the engine is closed")
            free = sum(other is None or other.ended for other in self._running) - (self._reading is not None)
            if len(self._waiting) >= self.queue + free:
                raise RequestError(f"the queue is full: {len(self._waiting)} requests wait already; try again later")
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
            What was decoded, each part with its request; whoever iterates over a handle gets it, too.

        Raises:
            Exception: whatever went wrong in a program; all requests that were running fail with it.
        """
        with self._stepping:
            if waiting is not None and (waiting.has_new or waiting.ended):
                return []
            try:
                return self._step(most)
            except BaseException as error:
                self._fail(error)
                raise

    def compile(self) -> None:
        """Compiles every program now instead of at first use.

        Raises:
            RequestError: a request runs or waits.
        """
        with self._stepping:
            if not self.idle:
                raise RequestError("requests run or wait: compile the engine before the first, or once all have ended")
            self._running = [None] * self.slots
            self._runner.compile()

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
        began = time.perf_counter()
        drafts = None if self._draft is None else draft_next(self._draft, self._runner, self._running, active)
        if drafts is not None and drafts.counts.any():
            decoded = self._runner.verify(active, drafts, masks)
        else:
            decoded = self._runner.decode(active, self._limit(active, most), bool(self._waiting), masks)
        self._distribute(decoded, active, began, drafts, parts)
        return parts

    def _limit(self, active: np.ndarray, most: int | None) -> int:
        """Tokens that are decoded before the host looks at them."""
        if self._reading is not None or (self._waiting and not active.all()):
            return 1
        pauses = [handle.lookup.pause for handle in self._running if handle is not None and handle.lookup is not None]
        limit = most or int(SECONDS / self._step_seconds)
        return max(1, min(limit, CHUNK, *pauses))

    def _follow_constraints(self, parts: list[tuple[Handle, Part]]) -> np.ndarray | None:
        """Appends what constraints force; gives the masks of the next token, None if no running request has any."""
        masks: np.ndarray | None = None
        for slot, handle in enumerate(self._running):
            if handle is None or handle.ended or handle.matcher is None:
                continue
            try:
                forced = forced_tokens(handle)
                if forced:
                    self._runner.append(slot, forced)
                    self._give(handle, partial(handle.receive_forced, forced), slot, parts)
                if handle.ended:
                    continue
                masks = self._runner.all_allowed() if masks is None else masks
                masks[slot] = handle.matcher.allowed(masks.shape[1])
            except RequestError as error:
                with self._lock:
                    handle.fail(error)
        return masks

    def _distribute(
        self,
        decoded: Decoded,
        active: np.ndarray,
        began: float,
        drafts: DraftTokens | None,
        parts: list[tuple[Handle, Part]],
    ) -> None:
        wanted = any(handle is not None and handle.request.logprobs is not None for handle in self._running)
        decoded = jax.device_get(decoded if wanted else decoded[:3])
        steps, seconds = int(decoded[0]), time.perf_counter() - began
        self._step_seconds = seconds / max(steps, 1)
        verified = drafts is not None and bool(drafts.counts.any())
        self._counts["steps"] += 1 if verified else steps
        for slot in np.flatnonzero(active):
            handle, count = self._running[slot], decoded[1][slot]
            tokens = decoded[2][slot, :count].tolist()
            scores = [] if handle.request.logprobs is None else scores_of(decoded, slot, handle.request.logprobs)
            if drafts is not None:
                drafted, right = learn(handle, tokens, int(drafts.counts[slot]), steps)
                self._counts["drafted"] += drafted
                self._counts["accepted"] += right
            before = handle.room
            self._give(handle, partial(handle.receive, tokens, scores), slot, parts)
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
                    self._clear(slot)
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
            self._runner.begin(self._reading.request.prompt)
            self._reading.cached_tokens = self._runner.reader.cached
        if not self._runner.read():
            return
        handle, slot = self._reading, self._running.index(None)
        self._runner.admit(handle.request, slot)
        if self._draft == "lookup":
            handle.lookup = Lookup(handle.request.prompt, self.length)
        self._running[slot], self._reading = handle, None
        self._counts["prompt_tokens"] += len(handle.request.prompt)
        self._counts["cached_tokens"] += handle.cached_tokens

    def _clear(self, slot: int) -> None:
        self._runner.clear(slot)
        if self._reading is not None:
            self._runner.begin(self._reading.request.prompt)

    def _fail(self, error: BaseException) -> None:
        """Ends all that were running: a program that was interrupted has given up the memory of its arguments."""
        failed = error if isinstance(error, Exception) else PolygptError("interrupted")
        with self._lock:
            for handle in [*self._running, self._reading]:
                if handle is not None and not handle.ended:
                    handle.fail(failed)
            self._running, self._reading = [None] * self.slots, None
        self._runner.reset()
