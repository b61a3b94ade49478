"""Taps: named arrays that layers hand out besides their output, for objectives and tools that ask for them by
name.

A layer calls `tap(name, value)` for what it can hand out, and `wanted(name)` before it computes what only a
tap needs. Nobody asking, both do nothing, and the program is the one without taps. The model asks with
`collect(names)` around each layer, inside what is scanned and rematerialised, and returns what it found as
ordinary outputs: [L, ...] over the layers that have the tap, in order.

Inside `per_device` (a shard_map) `tap` must not be called: its arrays must leave through the outputs.
model/moe.py shows how.

`Tap("hidden", layers)` in place of a name asks for these layers alone: no more than their arrays is held.

    hidden           [B, S, D] compute dtype: output of the layer, all layers
    layer_cosines    [B, S] float32: cosine of the angle between the layer's input and output, all layers
    router_scores    [B, S, E] float32: scores without the selection bias, MoE layers and MTP layers
    router_logits    [B, S, E] float32: what the scores are made of, MoE layers and MTP layers
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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Taps = dict[str, jax.Array]

# Of routed experts: for each token, and for the whole batch.
PER_TOKEN = (
    "router_scores",
    "router_logits",
    "router_choices",
    "router_weights",
    "expert_norms",
    "expert_peaks",
)
ROUTED = (*PER_TOKEN, "expert_units")
NAMES = ("hidden", "layer_cosines", *ROUTED, "shared_units")


class Tap(NamedTuple):
    """A tap of some layers: [N, ...] over them in ascending order."""

    name: str  # "hidden", which is as large as a layer's input; the others come of all layers
    layers: tuple[int, ...]  # ascending, counted from 0 as in model.layers.N; no MTP layers


Asked = tuple[str | Tap, ...]

_asked: contextvars.ContextVar[tuple[tuple[str, ...], Taps]] = contextvars.ContextVar("taps")


@contextlib.contextmanager
def collect(asked: Iterable[str | Tap]) -> Iterator[Taps]:
    """The dict that `tap` calls inside fill, with the names asked for.

    Raises:
      ValueError: no layer has a tap of that name.
    """
    names = tuple(tap.name if isinstance(tap, Tap) else tap for tap in asked)
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


def of_layers(asked: Asked, start: int, stop: int) -> Asked:
    """What is asked of the layers from `start` to `stop`, which are counted from 0 in it."""
    out: list[str | Tap] = []
    for one in asked:
        if not isinstance(one, Tap):
            out.append(one)
        elif chosen := tuple(i - start for i in one.layers if start <= i < stop):
            out.append(Tap(one.name, chosen))
    return tuple(out)


def chosen(asked: Asked, found: Taps, axis: int = 0) -> Taps:
    """Of taps of all layers of a stack, along `axis`, those of the layers asked for."""
    some = {tap.name: tap.layers for tap in asked if isinstance(tap, Tap)}

    def take(a: jax.Array, layers: tuple[int, ...]) -> jax.Array:
        return jnp.concatenate([lax.slice_in_dim(a, i, i + 1, axis=axis) for i in layers], axis)

    return {name: take(a, some[name]) if name in some else a for name, a in found.items()}


class Held:
    """Taps of some layers while a scan goes through all of a stack: each is written into its place as it
    arises, so that the others are never held.

    Args:
      asked: counted from the stack's first layer.
      layers: of the stack.
    """

    def __init__(self, asked: Asked, layers: int):
        some = [tap for tap in asked if isinstance(tap, Tap)]
        assert all(tap.name == "hidden" for tap in some), f"{some}: only hidden is of some layers"
        self.chosen = some[0].layers if some else ()
        place = {layer: i for i, layer in enumerate(self.chosen)}
        # Those of other layers are written to one place more, which nobody reads.
        places = [place.get(i, len(place)) for i in range(layers)]
        self.places = jnp.asarray(places, jnp.int32) if some else None  # [layers]

    def start(self, x_BSD: jax.Array) -> jax.Array | None:
        """What the scan carries: [N + 1, B, S, D]; None where nothing is asked of some layers."""
        if not self.chosen:
            return None
        shape = (len(self.chosen) + 1, *x_BSD.shape)
        spec = jax.P(None, *jax.typeof(x_BSD).sharding.spec)
        return lax.broadcast_in_dim(jnp.zeros_like(x_BSD), shape, (1, 2, 3), out_sharding=spec)

    def put(self, held: jax.Array | None, found: Taps, place: jax.Array | None) -> jax.Array | None:
        """What is held after a layer, whose tap leaves `found`."""
        if held is None:
            return None
        return lax.dynamic_update_index_in_dim(held, found.pop("hidden"), place, 0)

    def taps(self, held: jax.Array | None) -> Taps:
        """At the end of the scan."""
        return {} if held is None else {"hidden": held[: len(self.chosen)]}
