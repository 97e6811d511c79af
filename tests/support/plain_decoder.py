"""The decoder once more, as plainly as it can be written: NumPy, float64, one sequence, loops over heads and layers.

Reads the same parameters (as NumPy arrays). It is the oracle of the model's tests: no scan, no flat tokens, no cache,
no fused form, and nothing to compile.
"""

import numpy as np
from scipy.special import erf

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "relu": lambda x: np.where(x > 0, x, 0),
    "relu2": lambda x: np.where(x > 0, x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": lambda x: np.tanh(x),
}


def logits(config, params, tokens):
    """[T] tokens of one sequence -> [T, V]."""
    x = params["embedding"][tokens] + _added_position(config, params, len(tokens))
    for i, layer in enumerate(config.layers):
        own = _of_layer(params["blocks"][i % len(config.pattern)], i // len(config.pattern))
        x = x + _attention(layer.attention, config.position, own["attention"], _norm(layer.norm, own, "attention", x))
        x = x + _feedforward(layer.feedforward, own["feedforward"], _norm(layer.norm, own, "feedforward", x))
    x = _norm(config.norm, {"final_norm": params.get("final_norm", {})}, "final", x)
    if config.head == "none":
        return x
    return x @ (params["embedding"].T if config.head == "tied" else params["head"])


def _of_layer(tree, index):
    return {k: _of_layer(v, index) if isinstance(v, dict) else v[index] for k, v in tree.items()}


def _added_position(config, params, length):
    if config.position.kind == "learned":
        return params["position"]["table"][:length]
    if config.position.kind == "sinusoidal":
        table = np.zeros((length, config.width))
        for p in range(length):
            for i in range(config.width // 2):
                angle = p / config.position.theta ** (2 * i / config.width)
                table[p, 2 * i], table[p, 2 * i + 1] = np.sin(angle), np.cos(angle)
        return table
    return 0


def _norm(config, params, name, x):
    p = params.get(f"{name}_norm", {})
    if config.kind == "layernorm":
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.eps) * p["gain"]
        return y + p["bias"] if config.bias else y
    if config.kind == "rmsnorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps) * p["gain"]
    if config.kind == "scalenorm":
        return p["gain"] * x / np.maximum(np.sqrt((x**2).sum(-1, keepdims=True)), config.eps)
    return x


def _rotate(position, x):
    """x [T, H], rotate-half: the pair (i, i + H/2) turns by p·theta^(-2i/H)."""
    if position.kind != "rope":
        return x
    half = x.shape[1] // 2
    angles = np.arange(x.shape[0])[:, None] * position.theta ** (-2 * np.arange(half)[None] / x.shape[1])
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], 1)


def _attention(config, position, p, x):
    def bias(name, head):
        return p[f"{name}_bias"][head] if config.bias else 0

    out = 0
    for head in range(config.num_heads):
        kv = head // (config.num_heads // config.kv_heads)
        q = _rotate(position, x @ p["query"][:, head] + bias("query", head))
        k = _rotate(position, x @ p["key"][:, kv] + bias("key", kv))
        v = x @ p["value"][:, kv] + bias("value", kv)
        scores = np.where(np.tri(len(x), dtype=bool), q @ k.T / np.sqrt(q.shape[1]), -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = out + (weights / weights.sum(-1, keepdims=True)) @ v @ p["out"][head]
    return out + p["out_bias"] if config.bias else out


def _feedforward(config, p, x):
    act = ACTIVATIONS[config.activation]

    def bias(name):
        return p[f"{name}_bias"] if config.bias else 0

    up = x @ p["up"] + bias("up")
    hidden = act(up) if config.kind == "mlp" else act(x @ p["gate"] + bias("gate")) * up
    return hidden @ p["down"] + bias("down")
