"""The engine: a fixed number of slots, through which requests come and go. Knows token ids and streams of text.

The same request gives the same tokens alone or among others, in any slot, with a cold or a warm prefix cache: each
row's arithmetic is that of the same programs, whatever the other rows hold.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np

from polygpt.errors import PolygptError, RequestError
from polygpt.generation.engine import STOP_TOKENS, Request, _power_of_two, check_requests
from polygpt.generation.handle import Handle, Logprob, Part
from polygpt.generation.penalties import stack_penalties
from polygpt.generation.prefix_cache import PrefixCache
from polygpt.generation.programs import CHUNK, Settings
from polygpt.generation.sampling import NOT_FINITE, Sampler, stack_samplers
from polygpt.generation.slots import Asked, Decoded, empty_slots, slot_programs
from polygpt.generation.text import TextStream
from polygpt.model import Model, Params

# Tokens of a prompt's last chunks, so that a short prompt is read about as fast as one step of decoding.
SMALL = 16
# Decoding goes on without looking at arrivals for about this long, or for one step.
SECONDS = 0.01
_IDLE = Request((0,), 1, Sampler(temperature=0.0))


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
        self.sizes = tuple(sorted({min(SMALL, chunk), chunk}))
        self.prefixes = PrefixCache(cache_bytes, chunk)
        self._programs = slot_programs(model.config, length, chunk, vocab_size or model.config.vocab_size)
        self._lock, self._stepping = threading.RLock(), threading.RLock()
        self._waiting: deque[Handle] = deque()
        self._running: list[Handle | None] = [None] * slots
        self._step_seconds = SECONDS
        self._reset()

    # --- What any thread may call -----------------------------------------------------------------------------

    def submit(self, request: Request, stream: TextStream | None = None) -> Handle:
        """Takes a request in; it runs as the engine is stepped.

        Raises:
            RequestError: the request is impossible, or the queue is full.
        """
        check_requests(self.model.config, [request])
        if len(request.prompt) > self.length:
            raise RequestError(f"the prompt has {len(request.prompt)} tokens, the engine's length is {self.length}")
        handle = Handle(self, request, stream, self._limit(request) - len(request.prompt))
        with self._lock:
            free = sum(other is None or other.ended for other in self._running) - (self._reading is not None)
            if len(self._waiting) >= self.queue + free:
                raise RequestError(f"the queue is full: {self.queue} requests wait already; try again later")
            if handle._budget:
                self._waiting.append(handle)
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

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        with self._lock:
            held = [*self._running, self._reading]
            return not self._waiting and all(handle is None or handle.ended for handle in held)

    @property
    def load(self) -> tuple[int, int]:
        """How many requests have a slot, the one whose prompt is being read included, and how many wait for one."""
        with self._lock:
            held = [*self._running, self._reading]
            return sum(handle is not None and not handle.ended for handle in held), len(self._waiting)

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
            for size in self.sizes:
                tokens = np.zeros((1, size), np.int32)
                self._row = self._programs.prefill(self.params, self._row, tokens, np.int32(0), np.int32(1))
            if self.prefixes.limit:
                block = self._programs.take(self._row, np.int32(0))
                self._row = self._programs.put(self._row, block, np.int32(0))
            self._row = self._programs.restart(self._row)
            bias, tokens = np.zeros(self.model.config.vocab_size, np.float32), np.zeros(self.length, np.int32)
            self._state = self._programs.insert(self._state, self._row, tokens, np.int32(1), np.int32(0), bias)
            self._state, decoded = self._decode(0, False)
            jax.block_until_ready((self._state, decoded))
            self._held = None

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
        active = np.array([handle is not None and not handle.ended for handle in self._running])
        if not active.any():
            return []
        busy = self._reading is not None or (bool(self._waiting) and not active.all())
        limit = 1 if busy else most or max(1, min(CHUNK, int(SECONDS / self._step_seconds)))
        began = time.perf_counter()
        self._state, decoded = self._decode(limit, bool(self._waiting), active)
        return self._distribute(decoded, active, began)

    def _decode(self, most: int, until_free: bool, active: np.ndarray | None = None) -> tuple:
        if self._asked is None:
            self._asked = jax.device_put(self._ask())
        active = np.zeros(self.slots, bool) if active is None else active
        return self._programs.decode(
            self.params, self._state, self._asked, active, np.int32(min(most, CHUNK)), np.bool_(until_free)
        )

    def _distribute(self, decoded: Decoded, active: np.ndarray, began: float) -> list[tuple[Handle, Part]]:
        wanted = any(handle is not None and handle.request.logprobs is not None for handle in self._running)
        decoded = jax.device_get(decoded if wanted else decoded[:2])
        steps, parts = int(decoded[0]), []
        self._step_seconds = (time.perf_counter() - began) / max(steps, 1)
        with self._lock:
            for slot in np.flatnonzero(active):
                handle = self._running[slot]
                if handle.ended:  # cancelled meanwhile
                    continue
                scores = [] if handle.request.logprobs is None else _scores(decoded, slot, handle.request.logprobs)
                try:
                    part = handle.receive(decoded[1][slot, :steps].tolist(), scores)
                except PolygptError as error:
                    handle.fail(error)
                    self._empty_slot(slot)
                    continue
                if part is not None:
                    parts.append((handle, part))
        return parts

    def _read(self) -> None:
        """Reads one chunk of the prompt whose turn it is, and gives it a slot if that was the last."""
        if self._reading is None or self._reading.ended:
            self._reading = None
            with self._lock:
                if not self._waiting:
                    return
                self._reading = self._waiting.popleft()
            self._begin(tuple(self._reading.request.prompt[:-1]))
            self._reading.cached_tokens = self._position
        prompt = self._reading.request.prompt
        left = len(prompt) - 1 - self._position
        if left > 0:
            self._read_chunk(prompt, left)
        if self._position >= len(prompt) - 1:
            self._admit(self._reading)
            self._reading = None

    def _begin(self, prompt: tuple[int, ...]) -> None:
        """Makes the row ready for a prompt: as it is if it holds this very prompt, or from the prefix cache."""
        if self._held == prompt:
            self._position = len(prompt)
            return
        self._held, self._position = None, 0
        self._row = self._programs.restart(self._row)
        self._keys = self.prefixes.keys(prompt)
        chunk = self.prefixes.chunk
        for block in self.prefixes.find(self._keys):
            self._row = self._programs.put(self._row, block, np.int32(self._position))
            self._position += chunk

    def _read_chunk(self, prompt: tuple[int, ...], left: int) -> None:
        """The size of a chunk follows from the position alone, so that a state does not depend on the cache."""
        small, chunk = self.sizes[0], self.sizes[-1]
        size = chunk if left > chunk - small else small
        count = min(left, size)
        tokens = np.zeros((1, size), np.int32)
        tokens[0, :count] = prompt[self._position : self._position + count]
        start = np.int32(self._position)
        self._row = self._programs.prefill(self.params, self._row, tokens, start, np.int32(count))
        self._position += count
        done, rest = divmod(self._position, chunk)
        if not rest and size == chunk and self.prefixes.wants(self._keys[done - 1]):
            self.prefixes.add(self._keys[:done], self._programs.take(self._row, start))

    def _admit(self, handle: Handle) -> None:
        prompt = handle.request.prompt
        self._held = tuple(prompt[:-1])
        tokens = np.zeros(self.length, np.int32)
        tokens[: len(prompt)] = prompt
        bias = np.zeros(self.model.config.vocab_size, np.float32)
        for token, value in handle.request.sampler.logit_bias.items():
            bias[token] = value
        slot = self._running.index(None)
        self._state = self._programs.insert(self._state, self._row, tokens, np.int32(len(prompt)), np.int32(slot), bias)
        self._running[slot], self._asked = handle, None

    def _empty_slot(self, slot: int) -> None:
        """Clears numbers that are not finite, which a mask does not keep from the next sequence in a slot."""
        self._row, self._held = jax.tree.map(jnp.copy, self.model.init_state(1, self.length)), None
        self.prefixes = PrefixCache(self.prefixes.limit, self.prefixes.chunk)
        tokens, bias = np.zeros(self.length, np.int32), np.zeros(self.model.config.vocab_size, np.float32)
        self._state = self._programs.insert(self._state, self._row, tokens, np.int32(self.length), np.int32(slot), bias)
        if self._reading is not None:
            self._begin(tuple(self._reading.request.prompt[:-1]))

    # --- The whole ------------------------------------------------------------------------------------------------

    def _limit(self, request: Request) -> int:
        return min(len(request.prompt) + request.max_new_tokens, self.length)

    def _ask(self) -> Asked:
        """What the running requests ask for, as arrays."""
        requests = [_IDLE if handle is None else handle.request for handle in self._running]
        samplers = [request.sampler for request in requests]
        width = _power_of_two(max(len(request.stops) for request in requests), STOP_TOKENS)
        stops = np.full((self.slots, width), NOT_FINITE, np.int32)
        for row, request in zip(stops, requests, strict=True):
            row[: len(request.stops)] = request.stops
        settings = Settings(
            stack_samplers(samplers),
            np.array([request.seed for request in requests], np.uint32),
            np.array([self._limit(request) for request in requests], np.int32),
            stops,
        )
        logprobs = [-1 if request.logprobs is None else request.logprobs for request in requests]
        return Asked(settings, stack_penalties(samplers), np.array(logprobs, np.int32))

    def _reset(self) -> None:
        """Free slots and an empty row."""
        self._state = empty_slots(self.model.config, self.slots, self.length)
        self._row = jax.tree.map(jnp.copy, self.model.init_state(1, self.length))
        self._asked: Asked | None = None
        self._reading: Handle | None = None
        self._held: tuple[int, ...] | None = None  # the prompt, without its last token, that the row holds
        self._position, self._keys = 0, []

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
