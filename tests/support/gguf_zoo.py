"""Tiny models and tokenizers that llama.cpp has counterparts of, for the tests of GGUF with and without it."""

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers as hf

from polygpt.config import merge, validate
from polygpt.model import Model, ModelConfig
from polygpt.tokenizers import PieceKind, Tokenizer, TokenizerConfig, score_bpe, train_tokenizer
from polygpt.tokenizers.pretokenizers import PRE_TOKENIZERS

LLAMA = {
    "vocab_size": 300,
    "context_length": 64,
    "embed_dim": 64,
    "num_layers": 2,
    "position": {"kind": "rope"},
    "norm": {"kind": "rmsnorm", "eps": 1e-5},
    "attention": {"kind": "softmax", "num_heads": 4, "num_kv_heads": 2},
    "feedforward": {"kind": "glu", "mlp_dim": 96, "activation": "silu"},
}
GPT2 = {
    "vocab_size": 300,
    "context_length": 64,
    "embed_dim": 64,
    "num_layers": 2,
    "position": {"kind": "learned"},
    "norm": {"kind": "layernorm"},
    "attention": {"kind": "softmax", "num_heads": 4, "bias": True},
    "feedforward": {"kind": "mlp", "mlp_dim": 128, "activation": "gelu"},
}
EXPERTS = {"kind": "moe", "mlp_dim": 64, "num_experts": 4, "top_k": 2, "activation": "silu", "normalize_weights": True}
EXPERTS |= {"dispatch": "dropless"}
YARN = {"kind": "yarn", "factor": 4.0, "original_context_length": 16}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_context_length": 32}
MODELS = {
    "llama": (LLAMA, {}),
    "llama, untied": (LLAMA, {"head": "untied"}),
    "llama, heads of another size": (LLAMA, {"attention.head_dim": 32}),
    "llama, biases": (LLAMA, {"attention.bias": True, "feedforward.bias": True}),
    "llama, biases of q, k and v": (LLAMA, {"attention.bias": "qkv"}),
    "llama, linear scaling": (LLAMA, {"position.scaling": {"kind": "linear", "factor": 2.0}}),
    "llama, yarn": (LLAMA, {"position.scaling": YARN}),
    "llama, Llama 3's scaling": (LLAMA, {"position.scaling": LLAMA3}),
    "llama, experts": (LLAMA, {"feedforward": EXPERTS}),
    "llama, padded": (LLAMA, {"vocab_size": 320, "vocab_padding": 20}),
    "gpt2": (GPT2, {}),
    "gpt2, untied": (GPT2, {"head": "untied"}),
    "gpt2, no biases": (GPT2, {"attention.bias": False, "feedforward.bias": False, "norm.bias": False}),
}
TEXT = "The cat sat on the mat, and then it ran to the café: 'don't!' 12345 naïve users — 日本.\n\n  so it goes.\n" * 8


def model(name: str) -> ModelConfig:
    base, changes = MODELS[name]
    for key, value in changes.items():
        *parents, last = key.split(".")
        part = {last: value}
        for parent in reversed(parents):
            part = {parent: part}
        replaced = isinstance(value, dict) and not parents
        base = base | part if replaced else merge(base, part)
    return validate(ModelConfig, base)


def lively(config: ModelConfig, seed: int = 0):
    """Parameters in which every gain, bias and table matters."""
    random = np.random.default_rng(seed)

    def parameter(info):
        centre, spread = (0.0, 0.3) if info.inputs is not None else (1.0, 0.1)
        values = (centre + spread * random.standard_normal(info.shape)).astype(np.float32)
        if config.vocab_padding and "vocab" in info.axes:
            rows = [slice(None)] * len(info.shape)
            rows[info.axes.index("vocab")] = slice(config.vocab_size - config.vocab_padding, None)
            values[tuple(rows)] = 0
        return jnp.asarray(values, info.dtype)

    return jax.tree.map(parameter, Model(config).parameters)


def tokenizer(kind: str) -> Tokenizer:
    """`char`, `byte`, `bpe`, `sentencepiece`, or byte-level BPE that cuts as a name of `tokenizer.ggml.pre` says."""
    end = ("<|endoftext|>",)
    if kind == "sentencepiece":
        return Tokenizer(_sentencepiece())
    if kind in ("char", "byte"):
        return train_tokenizer(TokenizerConfig(kind=kind, special_tokens=end), [TEXT])
    trained = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=290), [TEXT])
    return trained if kind == "bpe" else _cut_as(kind)


def _cut_as(name: str) -> Tokenizer:
    pre = PRE_TOKENIZERS[name]
    made = hf.Tokenizer(hf.models.BPE(ignore_merges=pre.ignore_merges))
    pre.apply(made)
    made.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], hf.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(made)


def _sentencepiece() -> hf.Tokenizer:
    merged = ["th", "▁th", "he", "▁the", "at", "▁c", "▁cat", "an", "▁an", "▁and", "in", "it", "▁s"]
    letters = ["▁", *sorted(set("".join(merged)) - {"▁"}), "é"]
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *merged, *letters]
    kinds = [PieceKind.UNKNOWN, PieceKind.CONTROL, PieceKind.CONTROL, *[PieceKind.BYTE] * 256]
    kinds += [PieceKind.NORMAL] * (len(pieces) - len(kinds))
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces) - 259)]
    return score_bpe(pieces, scores, kinds, start=1)
