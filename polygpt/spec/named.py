"""Arrays whose axes have names: the few words in which the rest is written.

An operation on named arrays works on the axes it names and is repeated over all others, which are matched by name. So
nothing here has a batch axis: give tokens one (or three), and every function carries it along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from penzai import pz

Named = pz.nx.NamedArray
Params = dict[str, Any]  # nested, of named arrays


def name_parameters(params: Any, axes: Any) -> Params:
    """A tree of arrays with the names of their axes, float32. `axes` is the same tree with tuples of names."""
    return jax.tree.map(lambda leaf, names: pz.nx.wrap(jnp.asarray(leaf, jnp.float32), *names), params, axes)


def elementwise(function: Callable) -> Callable[..., Named]:
    """`function` of plain arrays, for named ones: it is applied number by number."""
    return pz.nx.nmap(function)


def along(function: Callable, x: Named, *names: str) -> Named:
    """`function` over the axes `names`, which it removes: `along(jnp.mean, x, "embed")`."""
    return pz.nx.nmap(function)(x.untag(*names))


def contract(a: Named, b: Named, *names: str) -> Named:
    """Σ a·b over the axes `names`. An axis that both have and that is not named is kept, matched."""
    return pz.nx.nmap(lambda a, b: jnp.tensordot(a, b, axes=len(names)))(a.untag(*names), b.untag(*names))


def affine(x: Named, params: Params, name: str, *inputs: str) -> Named:
    """x·W + b: the weight `name` contracted over the axes `inputs`, and its bias where it has one."""
    return contract(x, params[name], *inputs) + params.get(f"{name}_bias", 0.0)


def softmax(x: Named, *names: str) -> Named:
    """exp(x) / Σ exp(x), the sum over the axes `names` together."""
    axes = tuple(range(len(names)))
    return pz.nx.nmap(lambda x: jax.nn.softmax(x, axes))(x.untag(*names)).tag(*names)


def where(condition: Named, a: Named | float, b: Named | float) -> Named:
    """`a` where the condition holds, `b` elsewhere."""
    return pz.nx.nmap(jnp.where)(condition, a, b)


def rename(x: Named, **names: str) -> Named:
    """`x` with axes renamed: `rename(x, sequence="key_sequence")`."""
    return x.untag(*names).tag(*names.values())


def as_keys(x: Named) -> Named:
    """Tokens as what is looked at: their axis `sequence` becomes `key_sequence`."""
    return rename(x, sequence="key_sequence")
