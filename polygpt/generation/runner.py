"""The device's side of the engine: slots, what runs in them, and the programs. Knows requests; nothing of queues."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt32

from polygpt.generation.prefix_cache import PrefixCache
from polygpt.generation.programs import FORCED, slot_programs
from polygpt.generation.reader import PromptReader
from polygpt.generation.requests import Request
from polygpt.generation.slot_settings import SlotSettings, settings_of
from polygpt.generation.slots import CHUNK, Decoded, Masks, empty_slots
from polygpt.generation.speculation import DRAFTED, Draft, DraftTokens
from polygpt.generation.states import placed
from polygpt.model import Model, Params


class SlotRunner:
    """A model's slots, and a draft model's beside them.

    Attributes:
        reader: reads the next prompt.
        requests: what runs in each slot; None where nothing does.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        slots: int,
        length: int,
        prefixes: PrefixCache,
        vocab_size: int,
        speculates: bool = False,
        draft: Draft | None = None,
    ):
        self.model, self.params, self.slots, self.length = model, params, slots, length
        chunk = prefixes.chunk
        self._programs = slot_programs(model.config, length, chunk, vocab_size)
        self.reader = PromptReader(model, params, self._programs, length, chunk, prefixes)
        self._no_masks = jax.device_put(Masks.none(slots, model.config.vocab_size))
        self._speculates, self._draft = speculates, draft
        if draft is not None:
            self._draft_programs = slot_programs(draft.model.config, length, chunk, vocab_size)
            own = PrefixCache(prefixes.limit, chunk)
            self._draft_reader = PromptReader(draft.model, draft.params, self._draft_programs, length, chunk, own)
        self._compiled = False
        self.reset()

    def reset(self) -> None:
        """Free slots and empty readers."""
        self._state = placed(empty_slots(self.model.config, self.slots, self.length), self.params)
        self.requests: list[Request | None] = [None] * self.slots
        self._settings = None
        self.reader.reset()
        if self._draft is not None:
            empty = empty_slots(self._draft.model.config, self.slots, self.length).state
            self._draft_state = placed(empty, self._draft.params)
            self._draft_reader.reset()

    def all_allowed(self) -> UInt32[np.ndarray, "B W"]:
        """Masks that allow every id."""
        return Masks.none(self.slots, self.model.config.vocab_size).words

    def begin(self, prompt: Sequence[int]) -> None:
        """Prepares to read a prompt; its last token is left for decoding."""
        self.reader.begin(prompt[:-1])
        if self._draft is not None:
            self._draft_reader.begin(prompt[:-1])

    def read(self) -> bool:
        """Reads a chunk of the prompt; whether all of it has been read."""
        done = self.reader.read()
        return (self._draft is None or self._draft_reader.read()) and done

    def admit(self, request: Request, slot: int) -> None:
        """Puts the request whose prompt was read into a slot."""
        if not self._compiled:
            self._compile_decoding()
        prompt = request.prompt
        tokens = np.zeros(self.length, np.int32)
        tokens[: len(prompt)] = prompt
        self._insert(slot, tokens, len(prompt), request.sampler.logit_bias)
        self.requests[slot], self._settings = request, None

    def clear(self, slot: int) -> None:
        """Removes numbers that are not finite, which a mask does not keep from the next sequence in the slot."""
        self.reader.forget()
        if self._draft is not None:
            self._draft_reader.forget()
        self._insert(slot, np.zeros(self.length, np.int32), self.length, {})

    def append(self, slot: int, tokens: Sequence[int]) -> None:
        """Adds tokens to a slot's sequence that were not sampled."""
        for start in range(0, len(tokens), FORCED):
            new = tokens[start : start + FORCED]
            padded = np.zeros(FORCED, np.int32)
            padded[: len(new)] = new
            count = np.int32(len(new))
            self._state = self._programs.append(self.params, self._state, np.int32(slot), padded, count)

    def decode(
        self,
        active: Bool[np.ndarray, "B"],
        most: int,
        until_free: bool,
        masks: UInt32[np.ndarray, "B W"] | None = None,
    ) -> Decoded:
        """Up to `most` tokens more in every active slot; one if there are masks."""
        most = 1 if masks is not None else min(most, CHUNK)
        return self._decode(active, most, until_free, masks)

    def verify(
        self,
        active: Bool[np.ndarray, "B"],
        drafts: DraftTokens,
        masks: UInt32[np.ndarray, "B W"] | None = None,
    ) -> Decoded:
        """In every active slot as many of its drafts as are right, and a token more."""
        given = self._masks(masks)
        self._state, decoded = self._programs.verify(
            self.params, self._state, self._arrays(), active, drafts.tokens, drafts.counts, given
        )
        return decoded

    def draft(self, active: Bool[np.ndarray, "B"]) -> Int[np.ndarray, "B K"]:
        """What the draft model would sample in every active slot."""
        self._draft_state, drafts = self._draft_programs.draft(
            self._draft.params,
            self._draft_state,
            self._state._replace(state=None),
            self._arrays(),
            active,
            steps=DRAFTED,
        )
        return np.asarray(drafts)

    def compile(self) -> None:
        """Compiles every program; the slots must be free."""
        self.reader.compile()
        if self._draft is not None:
            self._draft_reader.compile()
        self._insert(0, np.zeros(self.length, np.int32), 1, {})
        self._state = self._programs.append(
            self.params, self._state, np.int32(0), np.zeros(FORCED, np.int32), np.int32(0)
        )
        self._compile_decoding()

    def _compile_decoding(self) -> None:
        """Compiles what decodes while the slots are free, so that the time of compilation is not that of a step."""
        nothing, none = np.zeros(self.slots, bool), np.zeros(self.slots, np.int32)
        self._decode(nothing, 0, until_free=False)
        if self._speculates:
            self.verify(nothing, DraftTokens(np.zeros((self.slots, DRAFTED), np.int32), none))
        if self._draft is not None:
            self.draft(nothing)
        jax.block_until_ready(self._state)
        self._compiled = True

    def _decode(self, active: np.ndarray, most: int, until_free: bool, masks: np.ndarray | None = None) -> Decoded:
        given = self._masks(masks)
        self._state, decoded = self._programs.decode(
            self.params, self._state, self._arrays(), active, np.int32(most), np.bool_(until_free), given
        )
        return decoded

    def _insert(self, slot: int, tokens: np.ndarray, count: int, logit_bias: dict[int, float]) -> None:
        bias = np.zeros(self.model.config.vocab_size, np.float32)
        for token, value in logit_bias.items():
            bias[token] = value
        place, count = np.int32(slot), np.int32(count)
        self._state = self._programs.insert(self._state, self.reader.row, tokens, count, place, bias)
        if self._draft is not None:
            row = self._draft_reader.row
            self._draft_state = self._draft_programs.insert_state(self._draft_state, row, count, place)

    def _arrays(self) -> SlotSettings:
        if self._settings is None:
            self._settings = jax.device_put(settings_of(self.requests, self.length))
        return self._settings

    def _masks(self, masks: np.ndarray | None) -> Masks:
        return self._no_masks if masks is None else Masks(np.True_, masks)
