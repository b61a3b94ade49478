"""What a mesh and a strategy make of the weights, by arithmetic: bytes stored, gathered and summed.

Shapes and logical axes are read once from a layout over one device; parallel/sharding.py's rule table then
says for any mesh what each is divided by. `Layout.bytes_per_device` says the same of one mesh, in a second or
two: an advisor asks for thousands.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from deepseek_jax.config.options import Config
from deepseek_jax.parallel import sharding
from deepseek_jax.parallel.mesh import BATCH_AXES
from deepseek_jax.parallel.quantized import QuantizedWeight
from deepseek_jax.parallel.xla_options import ITEM_BYTES
from deepseek_jax.train.state import Layout

Shape = Mapping[str, int]  # of a mesh: devices by axis
# "latent" are the down-projections of MLA, "output" what follows attention: products that backward does not
# make again, the first if it is kept, the second ever.
PARTS = ("latent", "attention", "output", "mlp", "experts", "router", "head", "embed", "norm")


class Weight(NamedTuple):
    """One array of the model, all layers of a stack together.

    Attributes:
      part: one of PARTS.
      axes: logical, one for each dimension.
      layers: of the stack; 1 for what is in no stack.
      item: bytes of a number as it is stored.
      state: bytes of optimizer state for each number.
      learns: whether it has a gradient.
      is_matrix: whether a token is multiplied by it.
    """

    path: str
    part: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    layers: int
    item: int
    state: float
    learns: bool
    is_matrix: bool


class Divided(NamedTuple):
    """Bytes of one device, on a mesh under a strategy.

    Attributes:
      stored: by kind, as Layout.bytes_per_device has it.
      layer: of one layer's weights as it uses them.
      used: numbers as they are used, all layers together, by part; of weights that tokens are multiplied by.
      gathered: numbers that a device receives when layers gather their weights in one pass, by axes.
      gathered_once: those of embedding and head, which backward does not gather again.
      reduced: numbers that a device receives when gradients are reduced, by (kind, axes): of the compute
        dtype, those of the embedding, which are reduced in float32, counted as so many more.
      updated: numbers that a device receives after the update, by axes.
      held: numbers that learn, stored on the device while the optimizer works.
    """

    stored: dict[str, int]
    layer: int
    used: dict[str, float]
    gathered: Mapping[tuple[str, ...], float]
    gathered_once: Mapping[tuple[str, ...], float]
    reduced: Mapping[tuple[str, tuple[str, ...]], float]
    updated: Mapping[tuple[str, ...], float]
    held: float


class Weights:
    """The weights of a config.

    Args:
      config: whose mesh and strategy do not matter.
      layout: of the same model over any mesh.
    """

    def __init__(self, config: Config, layout: Layout) -> None:
        self._min_size = config.sharding.min_weight_size
        self._item = ITEM_BYTES[config.train.dtype]
        self._as_held = bool(config.lora.r)
        state = _state_bytes(layout)
        trees = [(layout.abstract.params, True), (layout.abstract.frozen, False)]
        self.own = [w for tree, learns in trees for w in _weights(tree, learns, state)]
        self.scalars = state.get("", 0)  # bytes of counters
        frozen = () if layout.frozen is None else layout.frozen.model.abstract.params
        self.teacher = list(_weights(frozen, False, {}))

    def divided(self, config: Config, mesh: Shape) -> Divided:
        """Of the strategy of a config, on a mesh of this shape."""
        rules = sharding.storage_rules(config)
        stored: dict[str, float] = defaultdict(float, optimizer=self.scalars)
        used: dict[str, float] = defaultdict(float)
        gathered: dict[tuple[str, ...], float] = defaultdict(float)
        gathered_once: dict[tuple[str, ...], float] = defaultdict(float)
        reduced: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        updated: dict[tuple[str, ...], float] = defaultdict(float)
        layers: dict[str, int] = defaultdict(int)
        held = 0.0
        for w in self.own:
            size = math.prod(w.shape)
            use = _ways(w, sharding.COMPUTE_RULES, mesh, self._min_size)
            param, grad, opt = (_ways(w, r, mesh, self._min_size) for r in rules)
            in_use = size // use.ways
            item = w.item if w.item < 2 else self._item  # a base in 8 bits travels as it is held
            wide = 4 / self._item if w.part == "embed" else 1
            if w.is_matrix:
                used[w.part] += in_use
            if w.layers > 1 or w.path.startswith(("layers/", "dense_layers/")):
                bytes_used = in_use * (w.item if self._as_held else self._item)
                layers[w.path.partition("/")[0]] += bytes_used // w.layers
            axes = tuple(a for a in param.axes if a not in use.axes)
            if axes:
                whole = gathered_once if w.part in ("embed", "head") else gathered
                whole[axes] += (in_use - size // param.ways) * item / self._item
            if not w.learns:
                stored["frozen_parameters"] += size // param.ways * w.item
                continue
            stored["parameters"] += size // param.ways * w.item
            stored["gradients"] += size // grad.ways * w.item
            stored["optimizer"] += round(size // opt.ways * w.state)
            held += size / opt.ways
            apart = tuple(a for a in grad.axes if a not in use.axes)
            ways = use_ways = math.prod(mesh[a] for a in apart)
            if ways > 1:
                reduced["reduce-scatter", apart] += wide * in_use * (1 - 1 / ways)
            others = tuple(
                a for a in BATCH_AXES if a not in apart and a not in use.axes and mesh[a] > 1
            )
            if others:
                n = math.prod(mesh[a] for a in others)
                reduced["all-reduce", others] += wide * 2 * in_use / use_ways * (1 - 1 / n)
            after = tuple(a for a in opt.axes if a not in param.axes)
            if after:
                n = math.prod(mesh[a] for a in after)
                updated[after] += size / param.ways * (1 - 1 / n)
        for w in self.teacher:
            ways = _ways(w, rules[0], mesh, self._min_size).ways
            stored["frozen"] += math.prod(w.shape) // ways * w.item
        if config.sharding.gradient_compression != "none":
            stored["residual"] = stored["gradients"]  # of a replica (parallel/compression.py)
        kinds = {k: int(n) for k, n in stored.items()}
        layer = max(layers.values(), default=0)
        return Divided(kinds, layer, dict(used), gathered, gathered_once, reduced, updated, held)


class _Ways(NamedTuple):
    ways: int
    axes: tuple[str, ...]  # of the mesh, those longer than 1


def _ways(w: Weight, rules: sharding.Rules, mesh: Shape, min_size: int) -> _Ways:
    """Over how many devices a weight is divided, and along which axes."""
    chosen = sharding.rules_for(w.axes, w.shape, rules, min_size, mesh)
    axes: list[str] = []
    for name in w.axes:
        over = None if name is None else chosen[name]
        axes += [over] if isinstance(over, str) else list(over or ())
    long = tuple(a for a in axes if mesh[a] > 1)
    return _Ways(math.prod(mesh[a] for a in long), long)


def _weights(tree: Any, learns: bool, state: dict[str, float]) -> Iterator[Weight]:
    for path, variable in nnx.to_flat_state(tree) if tree else ():
        name = "/".join(map(str, path))
        axes, value = sharding.logical_axes(variable), variable.get_value()
        if isinstance(value, QuantizedWeight):
            pairs = zip(jax.tree.leaves(value), value.axes(axes), strict=True)
            arrays = [(a.shape, tuple(x), a.dtype) for a, x in pairs]
        else:
            arrays = [(value.shape, axes, value.dtype)]
        for i, (shape, of_array, dtype) in enumerate(arrays):
            layers = shape[0] if of_array[0] == "layers" else 1
            is_matrix = i == 0 and not (
                "norm" in name.rsplit("/", 2)[-2]
                or name.endswith("/bias")
                or "embed_tokens" in name
            )
            yield Weight(
                name,
                _part(name),
                shape,
                of_array,
                layers,
                dtype.itemsize,
                state.get(name, 0),
                learns,
                is_matrix,
            )


def _part(name: str) -> str:
    if name.startswith("embed_tokens"):
        return "embed"
    if name.startswith("lm_head"):
        return "head"
    if "norm" in name.rsplit("/", 2)[-2]:
        return "norm"
    for word, part in (
        ("q_a_proj", "latent"),
        ("kv_a_proj", "latent"),
        ("o_proj", "output"),
        ("self_attn", "attention"),
        ("experts/", "experts"),
        ("/gate/", "router"),
    ):
        if word in name and "shared_experts" not in name:
            return part
    return "mlp"


def _state_bytes(layout: Layout) -> dict[str, float]:
    """Bytes of optimizer state for each number of a parameter, by its path; "": of all else.

    Exact where moments have the shape of their parameter. Row and column means are divided as their
    parameter is here, and less in truth.
    """
    sizes = {
        "/".join(map(str, path)): math.prod(v.get_value().shape)
        for path, v in nnx.to_flat_state(layout.abstract.params)
    }
    found: dict[str, float] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(layout.abstract.opt_state):
        keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path]
        names = ("/".join(keys[i:j]) for i in range(len(keys)) for j in (len(keys), len(keys) - 1))
        name = next((n for n in names if n in sizes), "")
        found[name] = found.get(name, 0) + math.prod(leaf.shape) * leaf.dtype.itemsize
    return {name: n / sizes[name] if name else n for name, n in found.items()}
