"""A model with its weights and tokenizer: what a user holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from inspect import signature
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from polygpt.errors import PolygptError, RequestError
from polygpt.generation import (
    DAMAGED,
    BeamSettings,
    Constraint,
    Draft,
    Generation,
    Prompt,
    Request,
    ScoredGeneration,
    Speculation,
    TextStream,
    Vocabulary,
    as_grammar,
    as_ids,
    as_prompts,
    as_seeds,
    as_settings,
    as_stop_strings,
    as_whole,
    engine_for,
    refuse_with_beams,
    run_all,
    search_beams,
    windowed,
)
from polygpt.kernels import WeightType, check_weight_type
from polygpt.model import Model, ModelConfig, Params, model_of
from polygpt.origin import Origin
from polygpt.sharding import Scope, use_mesh
from polygpt.tokenizers import Messages, Tokenizer, Tools, chat_tokens

NO_TOKENIZER = "this model has no tokenizer: a preset has none, nor has a folder without tokenizer.json"


class LanguageModel:
    """A decoder's weights with the tokenizer they were trained with (None for a model of random weights)."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer | None = None,
        origin: Origin | None = None,
        packed: WeightType | None = None,
        scope: Scope | None = None,
    ):
        """`packed`: the type in which `params` are packed already (`Model.pack`); `scope`: the mesh they are on."""
        self.config, self.params, self._tokenizer = config, params, tokenizer
        self.origin = origin or Origin()
        self.model = model_of(config)
        self.packed, self.scope = packed, scope

    def pack(self, dtype: WeightType) -> None:
        """Converts the weights, for good, to the form and type that inference reads fastest.

        Decoding a few rows takes as long as the weights take to read: 16 bits are twice as fast as 32. int8 rounds each
        weight to one of 255 steps, chosen for each output; int4 to one of 16, chosen for each 16 weights of an input.
        Activations stay as they are.

        Raises:
            RequestError: they are packed already, or there is no such type.
        """
        self.check_unpacked()
        if self.scope is not None:
            raise RequestError("packed weights are on one device: load the model without a mesh")
        check_weight_type(dtype)
        self.params, self.packed = self.model.pack(self.params, dtype), dtype

    def check_unpacked(self) -> None:
        """Refuses where the parameters themselves are needed.

        Raises:
            RequestError: the weights are packed.
        """
        if self.packed is not None:
            raise RequestError(f"the weights are packed (as {self.packed}): load the model without that")

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            RequestError: the model has none.
        """
        if self._tokenizer is None:
            raise RequestError(NO_TOKENIZER)
        return self._tokenizer

    @property
    def num_parameters(self) -> int:
        return self.model.num_parameters

    @property
    def non_embedding_parameters(self) -> int:
        """Parameters without the tables of tokens and positions."""
        return self.model.num_non_embedding_parameters

    @property
    def training_bytes(self) -> dict[str, int]:
        """Bytes of `parameters`, `gradients` and `optimizer_state` (Adam's two moments) in training."""
        return self.model.training_bytes()

    @cached_property
    def _logits(self) -> Callable[[Params, Array], tuple[Array, Array]]:
        def compute(params: Params, tokens: Array) -> tuple[Array, Array]:
            logits = self.model.logits(params, tokens)
            return logits, jnp.isfinite(logits).all()

        return jax.jit(compute)

    def logits(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """float32 logits of the token after each position.

        Raises:
            RequestError: tokens are not [B, T] integers inside the vocabulary, or T exceeds the context.
            PolygptError: the logits are not finite numbers.
        """
        try:
            tokens = np.asarray(tokens)
        except ValueError:
            raise RequestError("tokens must be integers [B, T]: these rows differ in length") from None
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise RequestError(f"tokens must be integers [B, T], not {tokens.dtype}{list(tokens.shape)}")
        if not tokens.size:
            raise RequestError(f"tokens are empty: {list(tokens.shape)}")
        if tokens.shape[1] > self.config.context_length:
            raise RequestError(f"{tokens.shape[1]} tokens exceed the context_length of {self.config.context_length}")
        if not (tokens.min() >= 0 and tokens.max() < self.config.vocab_size):
            raise RequestError(f"token ids must lie in 0..{self.config.vocab_size - 1}")
        with use_mesh(self.scope):
            logits, finite = self._logits(self.params, jnp.asarray(tokens, jnp.int32))
        if not finite:
            raise PolygptError(DAMAGED)
        return logits

    def nll(self, text: str) -> Float[Array, "T-1"]:
        """Negative log likelihood, in nats, of each token of `text` after the first; float32 [T-1].

        Where the tokenizer puts a start token before a text, the model sees it.

        Raises:
            RequestError: it is not text, or has more tokens than the context.
            PolygptError: the logits are not finite numbers.
        """
        if not isinstance(text, str):
            raise RequestError(f"nll takes text, not {text!r:.40} ({type(text).__name__})")
        start = len(self.tokenizer.start)
        tokens = np.asarray([*self.tokenizer.start, *self.tokenizer.encode(text)], np.int32)
        logits, tokens = self.logits(tokens[None])[0, start:-1], tokens[start:]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=-1)[:, 0]

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a text."""
        end = self.tokenizer.end_of_text if self.has_tokenizer else None
        return tuple(dict.fromkeys([*self.origin.stop_tokens, *([] if end is None else [end])]))

    def prompt_tokens(self, prompt: str, chat: bool = False, most: int | None = None) -> list[int]:
        """The ids from which a prompt is continued: a start token, if the tokenizer has one, and the text's.

        Special tokens typed in a prompt are ordinary text. With `chat` the prompt is a user's message within the chat
        template, whose own special tokens count. A prompt that must have more than `most` tokens is not tokenized.

        Raises:
            RequestError: `chat` is asked for and there is no template, or the prompt is too long.
        """
        tokenizer = self.tokenizer
        if chat:
            return self.chat_tokens(prompt, most=most)
        tokenizer.check_length(prompt, most)
        ids = [*tokenizer.start, *tokenizer.encode(prompt)]
        return ids or ([] if tokenizer.end_of_text is None else [tokenizer.end_of_text])

    def chat_tokens(self, messages: str | Messages, tools: Tools = (), most: int | None = None) -> list[int]:
        """The ids from which the answer to a conversation, or to a single message of a user, is continued.

        `tools` are offered to the model, where its template knows tools. `most` is as in `prompt_tokens`.

        Raises:
            RequestError: the model has no chat template, it refuses the messages, or they are too long.
        """
        template = self.origin.chat_template
        if template is None:
            raise RequestError(
                "this model came without a chat template: generate without --chat (chat=True in Python) and write the "
                "prompt in full"
            )
        return chat_tokens(self.tokenizer, template, messages, tools, most)

    def chat(self, messages: Messages, *, tools: Tools = (), **settings: Any) -> Generation:
        """The model's answer to a conversation: messages with a `role` and `content`, the oldest first.

        Special tokens in a message are ordinary text. `tools` are as in `chat_tokens`, `settings` as in `generate`.

        Raises:
            RequestError: as `chat_tokens` and `generate`.
        """
        return self.generate(self.chat_tokens(messages, tools, most=self.config.context_length), **settings)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 100,
        seed: int | Sequence[int] = 0,
        n: int | None = None,
        logprobs: int | None = None,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        chat: bool = False,
        on_text: Callable[[str], None] | None = None,
        beams: int | None = None,
        draft: LanguageModel | Literal["lookup"] | None = None,
        past_context: bool = False,
        **settings: Any,
    ) -> Generation | list[Generation] | list[list[Generation]]:
        """Continues a prompt until end of text, a stop, `max_new_tokens`, or the end of the context.

        A prompt's text depends on the prompt, the settings and the seed alone, not on the prompts beside it.

        Args:
            prompt: text or a list of ids; a list of prompts gives a list of generations.
            max_new_tokens: how many tokens are added at most.
            seed: of the random numbers; for a list of prompts also a list of seeds, one each.
            n: this many samples of each prompt, with seeds seed, seed + 1, ...; a prompt then gives a list.
            logprobs: also the log probability of each token, and of this many of the likeliest (0 to 20).
            stop, stop_tokens: strings, and ids besides the model's own, that end the text and are not part of it.
            chat: the prompt is a user's message, laid out by the model's chat template.
            on_text: called with each new piece of text as soon as it can no longer change; for a single prompt.
            beams: search for the likeliest continuation, keeping so many at every step, instead of sampling. Gives
                `ScoredGeneration`s; with n, the n best of each prompt.
            draft: draft tokens, by `lookup` of what followed the last few earlier in the sequence or by a smaller model
                with the same tokenizer, and check several in one pass: the same text, sooner.
            past_context: go on past the context length: attention then sees a sliding window (`windowed`).
            settings: of a `Sampler`: temperature (0 is greedy), top_k, top_p, min_p, repetition_penalty,
                presence_penalty, frequency_penalty, no_repeat_ngram, min_new_tokens, logit_bias; with beams
                length_penalty, early_stopping, beam_groups, diversity_penalty (`BeamSettings`); and a constraint that
                the whole text must match: schema, regex, choices or grammar (`as_grammar`), which needs llguidance.

        Raises:
            RequestError: the prompt is no prompt or longer than the context, a number is out of its range, or text is
                asked of a model without tokenizer.
            PolygptError: the model's logits are not finite numbers.
        """
        prompts, single = as_prompts(prompt)
        seeds = as_seeds(seed, None if single else len(prompts))
        if on_text is not None and (not single or n is not None):
            raise RequestError("on_text goes with a single prompt, not with a list of prompts or with n")
        sampler, search, match = as_settings(settings, signature(self.generate).parameters.keys() - {"settings"})
        constraint = self.constraint(**match)
        samples = 1 if n is None else as_whole(n, "n", 1)
        stops = as_stop_strings(stop)
        if stops or chat or on_text is not None:
            _ = self.tokenizer  # refuses a model that has none
        ends = tuple(dict.fromkeys([*self.stop_tokens, *as_ids(stop_tokens, "stop_tokens")]))
        model = windowed(self.config) if past_context else self.model
        if beams is not None:
            given = {"stop": stops, "on_text": on_text, "seed": any(seeds), "constraint": constraint, "draft": draft}
            refuse_with_beams(given | {"logprobs": logprobs is not None}, sampler)
            requests = [Request(self._ids_of(each, chat), max_new_tokens, stop_tokens=ends) for each in prompts]
            found = self._search(model, requests, BeamSettings(beams, **search, n=samples))
            results = [best[0] for best in found] if n is None else found
            return results[0] if single else results
        if search:
            raise RequestError(f"beam search alone takes {', '.join(search)}: give beams as well")
        pairs = zip(prompts, seeds, strict=True)
        rows = [(self._ids_of(each, chat), own + sample) for each, own in pairs for sample in range(samples)]
        requests = [Request(row, max_new_tokens, sampler, own, ends, logprobs, constraint) for row, own in rows]
        decode = self.tokenizer.decode_after if self.has_tokenizer else None
        streams = [None if decode is None else TextStream(decode, row, stops) for row, _ in rows]
        with use_mesh(self.scope):
            shared = {"vocab_size": self._vocab_size, "draft": self.speculation(draft)}
            engine = engine_for(model, self.params, requests, **shared)
            found = list(map(Generation.of, run_all(engine, requests, streams, on_text)))
        results = found if n is None else [found[start : start + n] for start in range(0, len(found), n)]
        return results[0] if single else results

    def speculation(self, draft: LanguageModel | Literal["lookup"] | None) -> Speculation | None:
        """What an `Engine` takes as its `draft`.

        Raises:
            RequestError: it is no model with the tokenizer of this one.
        """
        if draft is None or draft == "lookup":
            return draft
        if not isinstance(draft, LanguageModel):
            raise RequestError(f"draft must be 'lookup' or a model, not {draft!r:.40}")
        own, other = (lm.tokenizer.fingerprint if lm.has_tokenizer else None for lm in (self, draft))
        if own != other:
            raise RequestError("the draft has another tokenizer: its tokens would mean other text")
        return Draft(draft.model, draft.params)

    def constraint(
        self,
        schema: Mapping[str, Any] | str | bool | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        grammar: str | None = None,
    ) -> Constraint | None:
        """What the whole of a continuation must match, for a `Request`; None if nothing is given.

        Raises:
            RequestError: as `as_grammar` and `Constraint`, or the model has no tokenizer.
        """
        made = as_grammar(schema, regex, choices, grammar)
        return None if made is None else Constraint(self._vocabulary, made)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        tokenizer = self.tokenizer
        special = tuple(tokenizer.special_tokens.values())
        return Vocabulary(tokenizer.vocabulary_bytes(), special, tokenizer.end_of_text, tokenizer.encode)

    @property
    def _vocab_size(self) -> int | None:
        """How many ids the tokenizer has; None without one."""
        return self.tokenizer.vocab_size if self.has_tokenizer else None

    def _search(self, model: Model, requests: Sequence[Request], settings: BeamSettings) -> list[list[Generation]]:
        with use_mesh(self.scope):
            found = search_beams(model, self.params, requests, settings, self._vocab_size)
        decode = self.tokenizer.decode_after if self.has_tokenizer else None
        pairs = zip(requests, found, strict=True)
        return [[ScoredGeneration.of_beam(request.prompt, beam, decode) for beam in best] for request, best in pairs]

    def _ids_of(self, prompt: Prompt, chat: bool) -> list[int]:
        if isinstance(prompt, str):
            return self.prompt_tokens(prompt, chat, most=self.config.context_length)
        if chat:
            raise RequestError("chat=True lays out a message, which is text; a prompt of ids is taken as it is")
        return list(prompt)
