"""Taps: named arrays that layers hand out besides their output, for objectives and tools that ask for them by
name.

A layer calls `tap(name, value)` for what it can hand out, and `wanted(name)` before it computes what only a
tap needs. Nobody asking, both do nothing, and the program is the one without taps. The model asks with
`collect(names)` around each layer, inside what is scanned and rematerialised, and returns what it found as
ordinary outputs: [L, ...] over the layers that have the tap, in order.

Inside `per_device` (a shard_map) `tap` must not be called: its arrays must leave through the outputs.
model/moe.py shows how.

    hidden           [B, S, D] compute dtype: output of the layer, all layers
    layer_cosines    [B, S] float32: cosine of the angle between the layer's input and output, all layers
    router_scores    [B, S, E] float32: scores without the selection bias, MoE layers and MTP layers
    router_choices   [B, S, K] int32: chosen experts, E for padding
    router_weights   [B, S, K] float32: their weights, normalised and scaled as applied
    expert_norms     [B, S, K] float32: L2 norm of each chosen expert's output before its weight,
                     without gradient, at the cost of running the experts once more
    expert_peaks     [B, S, K] float32: largest absolute value of that output, likewise
    expert_units     [E, F] float32: sum of |silu(gate) * up| of each expert's inner units over all tokens
                     of the batch that chose it, likewise
    shared_units     [F] float32: the same of the shared experts, over all tokens but padding
"""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp

Taps = dict[str, jax.Array]

# Of routed experts: for each token, and for the whole batch.
PER_TOKEN = ("router_scores", "router_choices", "router_weights", "expert_norms", "expert_peaks")
ROUTED = (*PER_TOKEN, "expert_units")
NAMES = ("hidden", "layer_cosines", *ROUTED, "shared_units")

_asked: contextvars.ContextVar[tuple[tuple[str, ...], Taps]] = contextvars.ContextVar("taps")


@contextlib.contextmanager
def collect(names: Iterable[str]) -> Iterator[Taps]:
    """The dict that `tap` calls inside fill, with the names asked for.

    Raises:
      ValueError: no layer has a tap of that name.
    """
    names = tuple(names)
    for name in names:
        if name not in NAMES:
            raise ValueError(f"no layer has a tap {name!r}: the names are {', '.join(NAMES)}")
    found: Taps = {}
    before = _asked.set((names, found))
    try:
        yield found
    finally:
        _asked.reset(before)


def wanted(name: str) -> bool:
    """Whether somebody asks for this tap, while the model is traced."""
    return name in _asked.get(((), {}))[0]


def tap(name: str, value: jax.Array) -> None:
    """Hands out an array under a name, if somebody asks for it. Once per layer."""
    names, found = _asked.get(((), {}))
    if name in names:
        assert name not in found, f"two taps {name!r} in one layer"
        found[name] = value


def join(*parts: Taps) -> Taps:
    """Taps [L, ...] of some layers and of those after them."""
    names = dict.fromkeys(name for taps in parts for name in taps)
    return {n: jnp.concatenate([taps[n] for taps in parts if n in taps]) for n in names}


def cosines(a_BSD: jax.Array, b_BSD: jax.Array) -> jax.Array:
    """float32 [B, S]: the cosine of the angle between two vectors of each token."""
    a_BSD, b_BSD = a_BSD.astype(jnp.float32), b_BSD.astype(jnp.float32)
    norms_BS = jnp.linalg.norm(a_BSD, axis=-1) * jnp.linalg.norm(b_BSD, axis=-1)
    return jnp.sum(a_BSD * b_BSD, axis=-1) / (norms_BS + 1e-30)
