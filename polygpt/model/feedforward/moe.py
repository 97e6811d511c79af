"""`moe`: a router sends each token to `top_k` of many experts (Shazeer et al. 2017; Fedus et al. 2021)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int
from pydantic import Field, PositiveInt

from polygpt.kernels import first_own_expert, from_peers, mean_over_devices, take_rows, to_peers
from polygpt.model.feedforward.experts import Experts, ExpertsConfig
from polygpt.model.feedforward.glu import GLUConfig
from polygpt.model.feedforward.mlp import MLPConfig
from polygpt.model.parts import NO_EFFECTS, Context, Effects, FeedForwardConfig, Initializer, Scope
from polygpt.model.row_shards import sharded_over_rows

if TYPE_CHECKING:
    from polygpt.model.config import ModelConfig

Weight = Annotated[float, Field(ge=0)]
# With more experts than this, ranks are found by sorting: counting takes P·E (8,192 pairs, 64 experts: 14 ms, not 3).
SORTED_FROM = 32


class MoEConfig(ExpertsConfig):
    """y_t = Σ_{e in top-k of p_t} p_te · expert_e(x_t) [+ shared(x_t)], p_t = softmax(x_t·W_router) in float32.

    The probabilities are used as they are, unless `normalize_weights`. In training with `dispatch: capacity` an expert
    serves at most C = max(int(capacity_factor · top_k · T / E), 1) tokens of a sequence (Lepikhin et al. 2020), shared
    by the documents packed into it; a token that finds no slot gets nothing from that expert. In evaluation and
    generation nothing is dropped.

    Attributes:
        top_k: experts a token.
        dispatch: `capacity`, or `dropless`, which does not drop tokens in training either (Gale et al. 2022).
        capacity_factor: see above.
        claim_order: the order in which tokens claim the slots of a sequence. `choice`: all first choices by position,
            then all second ones. `weight`: the same, but tokens by their largest probability (Riquelme et al. 2021,
            "batch prioritized routing"). `token`: each token makes all its choices before the next token; the only
            causal one.
        normalize_weights: the chosen probabilities are divided by their sum.
        load_balance_loss: weight of E·Σ_e f_e·P_e, f_e the share of (token, choice) pairs that went to expert e before
            any was dropped, P_e the mean probability, both over the batch (Fedus et al. 2021, eq. 4-6).
        z_loss: weight of mean(logsumexp(router logits)²) (Zoph et al. 2022, eq. 5).
        router_noise: in training the router's input is multiplied by uniform numbers in 1 ± router_noise (Fedus et al.
            2021, "jitter").
        shared_experts: one more gated (or plain) feed-forward, this many times `mlp_dim` wide, which serves every
            token with weight 1 (Dai et al. 2024).
        balance_rate: a bias is added to each expert's probability when experts are chosen (not to the weights). After
            each step it moves by this much towards underused experts: rate · sign(mean load - load) (Wang et al. 2024).
            It makes the loss unnecessary (set `load_balance_loss: 0`). 0 means no bias.
    """

    kind: Literal["moe"] = "moe"
    top_k: PositiveInt = 2
    dispatch: Annotated[Literal["capacity", "dropless"], Scope.TRAINING] = "capacity"
    capacity_factor: Annotated[float, Field(gt=0), Scope.TRAINING] = 1.25
    claim_order: Annotated[Literal["choice", "weight", "token"], Scope.TRAINING] = "choice"
    normalize_weights: bool = False
    load_balance_loss: Annotated[Weight, Scope.TRAINING] = 1e-2
    z_loss: Annotated[Weight, Scope.TRAINING] = 1e-3
    router_noise: Annotated[float, Field(ge=0, lt=1), Scope.TRAINING] = 0.0
    shared_experts: Annotated[int, Field(ge=0)] = 0
    balance_rate: Weight = 0.0

    def capacity(self, length: int) -> int:
        """C, the slots of one expert in a sequence of `length` tokens: at least one, and no more than tokens."""
        return min(max(self._share(length), 1), length)

    def _share(self, length: int) -> int:
        return int(self.capacity_factor * self.top_k * length / self.num_experts)

    def check(self, model: ModelConfig) -> None:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}: a token chooses among them")
        if self.dispatch == "capacity" and self._share(model.context_length) < 1:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} leaves num_experts={self.num_experts} experts no slot in a "
                f"sequence of context_length={model.context_length} (int(capacity_factor·top_k·T/E) = 0): every token "
                "would be dropped; raise it, or set dispatch=dropless"
            )

    def causal_in_training(self, model: ModelConfig) -> bool:
        return self.dispatch == "dropless" or self.claim_order == "token"

    def loss_needs_loads(self) -> bool:
        return self.load_balance_loss > 0

    def updates(self, loads: dict[str, Array]) -> dict[str, Array]:
        if not self.balance_rate:
            return {}
        return {"balance": self.balance_rate * jnp.sign(1 / self.num_experts - loads["load"])}

    def build(self, model: ModelConfig, init: Initializer) -> MoE:
        return MoE(self, model, init)


def _shared(config: MoEConfig) -> FeedForwardConfig:
    """The feed-forward that serves every token."""
    kind = GLUConfig if config.gated else MLPConfig
    return kind(mlp_dim=config.shared_experts * config.mlp_dim, activation=config.activation, bias=config.bias)


class MoE(Experts):
    def __init__(self, config: MoEConfig, model: ModelConfig, init: Initializer):
        super().__init__(config, model.width, init, active=Fraction(config.top_k, config.num_experts))
        self.config = config
        self.router = init.weight((model.width, config.num_experts), ("embed", "expert"))
        # Not trained: moved by `updates`, in steps that 16 bits would lose.
        shape = (config.num_experts,), ("expert",)
        self.balance = init.constant(0.0, *shape, dtype=jnp.float32, trained=False) if config.balance_rate else None
        self.shared = _shared(config).build(model, init) if config.shared_experts else None

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, state: None = None
    ) -> tuple[Float[Array, "B T D"], None, Effects]:
        y, effects = sharded_over_rows(MoE._routed, self, x, context, self._noise(x, context))
        if self.shared is not None:
            y = y + self.shared(x, context)[0]
        return y, None, effects

    def _routed(
        self, x: Float[Array, "B T D"], context: Context, noise: Float[Array, "B T D"] | None
    ) -> tuple[Float[Array, "B T D"], Effects]:
        """The outputs of the routed experts."""
        config = self.config
        logits, choices, weights = self._route(x, noise)
        context.record("experts", lambda: _shares(choices, weights, config.num_experts))
        flat, weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1, config.top_k)
        if context.training and config.dispatch == "capacity":
            confidence = jax.nn.softmax(logits).max(-1)
            routing = _with_capacity(choices, confidence, config, config.capacity(x.shape[1]))
            y = self._serve(flat, weights, routing)
        else:
            y, routing = self._serve_all(flat, weights, choices.reshape(-1, config.top_k))
        return y.reshape(x.shape), self._effects(logits, choices, routing, context) if context.training else NO_EFFECTS

    def _noise(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"] | None:
        """What the router's input is multiplied by."""
        noise = self.config.router_noise
        if not (context.training and noise) or context.key is None:
            return None
        return jax.random.uniform(context.key, x.shape, minval=1 - noise, maxval=1 + noise)

    def _route(
        self, x: Float[Array, "B T D"], noise: Float[Array, "B T D"] | None
    ) -> tuple[Float[Array, "B T E"], Int[Array, "B T k"], Float[Array, "B T k"]]:
        """The router's logits, each token's experts from its first choice on, and their weights; all float32."""
        seen = x.astype(jnp.float32)
        seen = seen if noise is None else seen * noise
        # At full precision: a GPU would multiply float32 in TF32, and prefill and decoding might choose differently.
        logits = jnp.einsum("btd,de->bte", seen, self.router[...].astype(jnp.float32), precision=lax.Precision.HIGHEST)
        probabilities = jax.nn.softmax(logits)
        preference = probabilities
        if self.balance is not None:
            preference = lax.stop_gradient(probabilities + self.balance[...])
        _, choices = lax.top_k(preference, self.config.top_k)
        weights = jnp.take_along_axis(probabilities, choices, -1)
        if self.config.normalize_weights:
            weights = weights / weights.sum(-1, keepdims=True)
        return logits, choices, weights

    def _serve(self, x: Float[Array, "M D"], weights: Float[Array, "M k"], routing: _Routing) -> Float[Array, "M D"]:
        """Σ over each token's choices of weight · expert(x); dropped choices add nothing."""
        top_k, width = weights.shape[1], x.shape[1]
        rows = take_rows(x, routing.pair_of // top_k, routing.slot_of)
        served = self.transform(rows.reshape(*routing.blocks, width), routing.expert_of).reshape(-1, width)
        picked = take_rows(served, routing.slot_of.reshape(-1), routing.pair_of[:, None])
        return (picked.reshape(*weights.shape, width) * weights[..., None].astype(x.dtype)).sum(1)

    def _serve_all(
        self, x: Float[Array, "M D"], weights: Float[Array, "M k"], choices: Int[Array, "M k"]
    ) -> tuple[Float[Array, "M D"], _Routing | None]:
        """`_serve` without dropping any. Devices that share the experts serve all of their tokens, each by its own."""
        own = self.up[...].shape[0]
        if own == self.config.num_experts:
            routing = _dropless(choices, own)
            return self._serve(x, weights, routing), routing
        x, weights, choices = from_peers((x, weights, choices))
        mine = choices - first_own_expert(own)
        mine = jnp.where((mine >= 0) & (mine < own), mine, own)
        return to_peers(self._serve(x, weights, _dropless_among(mine, own, self.config.num_experts // own))), None

    def _effects(
        self,
        logits: Float[Array, "B T E"],
        choices: Int[Array, "B T k"],
        routing: _Routing | None,
        context: Context,
    ) -> Effects:
        """`routing` says which choices were dropped; None: none were."""
        config = self.config
        own = mean_over_devices(jnp.bincount(choices.reshape(-1), length=config.num_experts) / choices.size)
        load = own if context.loads is None else context.loads["load"]  # f_e
        losses = {}
        if config.load_balance_loss:
            importance = mean_over_devices(jax.nn.softmax(logits).mean((0, 1)))  # P_e
            losses["load_balance"] = config.load_balance_loss * config.num_experts * (load * importance).sum()
        if config.z_loss:
            losses["z_loss"] = config.z_loss * mean_over_devices(jnp.square(jax.nn.logsumexp(logits, -1)).mean())
        dropped = jnp.zeros(1, bool) if routing is None else routing.slot_of >= routing.pair_of.size
        metrics = {
            "expert_load_max": load.max() * config.num_experts,  # 1 is even
            "dropped_share": mean_over_devices(dropped.mean()),
        }
        return Effects(losses, metrics, {"load": own})


def _shares(choices: Int[Array, "B T k"], weights: Float[Array, "B T k"], experts: int) -> Float[Array, "B T E"]:
    """The weight of each expert for each token, 0 where it was not chosen."""
    return (jax.nn.one_hot(choices, experts) * weights[..., None]).sum(-2)


class _Routing(NamedTuple):
    """Where each pair of (token, choice) is served: rows in blocks, each block of one expert.

    Attributes:
        slot_of: the row that serves each of a token's choices; the number of rows where it was dropped. [M, k]
        pair_of: the pair, token · k + choice, that each row serves; M·k where it serves none. [rows]
        expert_of: the expert of each block, ascending; None where block e is expert e's. [blocks]
        blocks: (number of blocks, rows a block).
    """

    slot_of: Int[Array, "M k"]
    pair_of: Int[Array, " rows"]
    expert_of: Int[Array, " blocks"] | None
    blocks: tuple[int, int]

    @classmethod
    def of(
        cls, slot_of: Int[Array, "M k"], expert_of: Int[Array, " blocks"] | None, blocks: tuple[int, int]
    ) -> _Routing:
        pairs = slot_of.size
        pair_of = jnp.full(math.prod(blocks), pairs, jnp.int32)
        pair_of = pair_of.at[slot_of.reshape(-1)].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
        return cls(slot_of, pair_of, expert_of, blocks)


def _with_capacity(
    choices: Int[Array, "B T k"], confidence: Float[Array, "B T"], config: MoEConfig, capacity: int
) -> _Routing:
    """At most `capacity` slots an expert and sequence, claimed in the configured order."""
    batch, length, top_k = choices.shape
    token, choice = jnp.arange(length)[:, None], jnp.arange(top_k)
    match config.claim_order:
        case "token":
            turn = jnp.broadcast_to(token * top_k + choice, choices.shape)
        case "choice":
            turn = jnp.broadcast_to(choice * length + token, choices.shape)
        case "weight":
            place = jnp.argsort(jnp.argsort(-confidence, axis=1), axis=1)
            turn = choice * length + place[:, :, None]
    turn = turn.reshape(batch, -1)  # each pair's place in the order of claims
    in_turn = jnp.take_along_axis(choices.reshape(batch, -1), jnp.argsort(turn, axis=1), axis=1)
    rank = jnp.take_along_axis(_rank(in_turn, config.num_experts), turn, axis=1).reshape(choices.shape)
    row = choices * (batch * capacity) + jnp.arange(batch)[:, None, None] * capacity + rank
    rows = config.num_experts * batch * capacity
    slot_of = jnp.where(rank < capacity, row, rows).reshape(-1, top_k)
    return _Routing.of(slot_of, None, (config.num_experts, batch * capacity))


def _dropless(choices: Int[Array, "M k"], num_experts: int) -> _Routing:
    """As many rows as each expert needs, in blocks; only an expert's last block may be partly empty."""
    pairs = choices.size
    if pairs <= num_experts:  # one block for each pair: only the weights that are needed are read
        order = jnp.argsort(choices.reshape(-1))
        slot_of = jnp.argsort(order).reshape(choices.shape)
        return _Routing.of(slot_of, choices.reshape(-1)[order], (pairs, 1))
    return _dropless_among(choices, num_experts)


def _dropless_among(choices: Int[Array, "M k"], num_experts: int, parts: int = 1) -> _Routing:
    """`_dropless` in blocks of several rows. Where experts are in `parts`, choice E is an expert of another part.

    Blocks that are left over are of expert E.
    """
    pairs = choices.size
    size = _block_rows(pairs // parts, num_experts)
    expert = choices.reshape(1, -1)
    count = jnp.bincount(expert[0], length=num_experts)
    last = jnp.cumsum(-(-count // size))  # the block after each expert's last one
    first = last - -(-count // size)
    slot_of = (first[expert] * size + _rank(expert, num_experts)).reshape(choices.shape)
    blocks = pairs // size + num_experts  # an upper bound: each expert has at most one block that is not full
    expert_of = jnp.searchsorted(last, jnp.arange(blocks), side="right")
    if parts == 1:
        return _Routing.of(slot_of, expert_of.clip(max=num_experts - 1), (blocks, size))
    slot_of = jnp.where(choices < num_experts, slot_of, blocks * size)
    return _Routing.of(slot_of, expert_of, (blocks, size))


def _block_rows(pairs: int, num_experts: int) -> int:
    """Rows a block: an expert's mean share, as a power of two between 8 and 256."""
    return min(max(2 ** round(math.log2(pairs / num_experts)), 8), 256)


def _rank(experts: Int[Array, "B P"], num_experts: int) -> Int[Array, "B P"]:
    """For each entry, how many earlier ones name the same expert."""
    if num_experts > SORTED_FROM:
        order = jnp.argsort(experts, axis=1)
        in_order = jnp.take_along_axis(experts, order, axis=1)
        first = jax.vmap(lambda row: jnp.searchsorted(row, jnp.arange(num_experts)))(in_order)
        rank = jnp.arange(experts.shape[1]) - jnp.take_along_axis(first, in_order, axis=1)
        return jnp.take_along_axis(rank, jnp.argsort(order, axis=1), axis=1)
    mine = experts[..., None] == jnp.arange(num_experts)
    return jnp.where(mine, jnp.cumsum(mine, axis=1) - 1, 0).sum(-1)
