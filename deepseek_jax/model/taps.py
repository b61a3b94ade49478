"""Taps: named arrays that layers hand out besides their output, for objectives and tools that ask for them by
name.

A layer calls `tap(name, value)` for what it can hand out, and `wanted(name)` before it computes what only a
tap needs. Nobody asking, both do nothing, and the program is the one without taps. The model asks with
`collect(names)` around each layer, inside what is scanned and rematerialised, and returns what it found as
ordinary outputs: [L, ...] over the layers that have the tap, in order.

Inside `per_device` (a shard_map) `tap` must not be called: its arrays must leave through the outputs.
model/moe.py shows how.

    hidden           [B, S, D] compute dtype: output of the layer, all layers
    router_scores    [B, S, E] float32: scores without the selection bias, MoE layers and MTP layers
    router_choices   [B, S, K] int32: chosen experts, E for padding
    router_weights   [B, S, K] float32: their weights, normalised and scaled as applied
    expert_norms     [B, S, K] float32: L2 norm of each chosen expert's output before its weight,
                     without gradient, at the cost of running the experts once more
"""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp

Taps = dict[str, jax.Array]

ROUTER = ("router_scores", "router_choices", "router_weights", "expert_norms")
NAMES = ("hidden", *ROUTER)

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
