"""Logical axis names to mesh axes: the one rule table, by strategy.

Every parameter is declared with logical axes (NNX metadata `out_sharding`). A name that the table lacks is an
error. Parameters live in the layout of `storage_rules` and are used in the layout of `COMPUTE_RULES`:
parallel/weights.py goes from one to the other.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import Config
from deepseek_jax.parallel.quantized import QuantizedWeight

Rules = dict[str, tuple[str, ...] | str | None]

# Axes of parameters. `embed` is the axis of a dense weight that FULL_SHARD divides. An expert weight has
# `expert_embed` there, because its experts already lie on the expert axis; it is divided further by experts
# where their number allows it (`rules_for`), along that axis else. A stack of some experts
# (expert_rows.py) is divided as a dense weight. `lora_heads` is the output of a low-rank projection, which
# has no embed axis, and `lora_expert_mlp` the side of an expert's adapter that has none. Heads, feed-forward
# widths and the vocabulary lie on the
# tensor axis, in use as in storage.
COMPUTE_RULES: Rules = {
    "layers": None,
    "embed": None,
    "lora_heads": "tensor",
    "experts": "expert",
    "some_experts": None,
    "expert_embed": None,
    "expert_mlp": "tensor",
    "lora_expert_mlp": "tensor",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "lora": None,
    "norm": None,
    "router": None,
    "pair": None,
    "heads_bias": "tensor",
    "embed_bias": None,
}

BY_EXPERTS = "by experts"  # no axis: the mesh axes that may divide experts further

# strategy -> what is divided: over data x fsdp x expert, under hybrid_shard over fsdp x expert with replicas
# along data. ZeRO-1 is the last column alone, ZeRO-2 the last two, ZeRO-3 all three.
#                    parameters gradients optimizer state
DIVIDED_BY = {
    "full_shard": (True, True, True),
    "hybrid_shard": (True, True, True),
    "shard_grad_op": (False, True, True),
    "zero1": (False, False, True),
    "no_shard": (False, False, False),
}


def storage_rules(config: Config) -> tuple[Rules, Rules, Rules]:
    """The rules of parameters, gradients and optimizer state under `config.sharding.strategy`.

    A stage stores a slice of every weight, under every strategy, not its own blocks: so blocks need not
    divide by the stages, and all stages hold the same number of bytes. `parallel/pipeline.py` brings the
    blocks to their stages once a step.
    """
    axes = divided_axes(config)

    def rules(dense: tuple[str, ...], experts: tuple[str, ...]) -> Rules:
        # `stage` last, so that what a stage stores is one piece of what it gathers; `tensor` first, so that
        # it stays after the gather.
        return COMPUTE_RULES | {
            "embed": (*dense, "stage"),
            "lora_heads": ("tensor", *dense, "stage"),
            "expert_embed": (*experts, "stage"),
            "lora_expert_mlp": ("tensor", *experts, "stage"),
            # Experts of which some learn are found by the expert axis alone (expert_rows.py).
            BY_EXPERTS: () if config.esft.experts else experts,
        }

    divided, undivided = rules((*axes, "expert"), axes), rules((), ())
    params, gradients, optimizer = DIVIDED_BY[config.sharding.canonical]
    return (
        divided if params else undivided,
        divided if gradients else undivided,
        divided if optimizer else undivided,
    )


def divided_axes(config: Config) -> tuple[str, ...]:
    """The mesh axes that divide an expert's weights under the strategy; dense weights are divided over
    `expert` as well.
    """
    return {"hybrid_shard": ("fsdp",), "no_shard": ()}.get(
        config.sharding.canonical, ("data", "fsdp")
    )


def spec(axes: tuple[str | None, ...], rules: Rules) -> P:
    """The PartitionSpec of logical axes.

    Raises:
      KeyError: an axis name that the rule table lacks.
    """
    for name in axes:
        if name is not None and name not in rules:
            raise KeyError(
                f"logical axis {name!r} is not in the rule table of parallel/sharding.py, which has "
                f"{sorted(rules)}"
            )
    return P(*(None if name is None or not rules[name] else rules[name] for name in axes))


def logical_axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The logical axes of a variable; those of its last dimensions inside a scan over stacked layers."""
    axes = variable.get_metadata().get("out_sharding")
    if axes is None:
        raise ValueError(
            f"a {type(variable).__name__} of shape {variable.get_value().shape} was declared without "
            "logical axes (out_sharding)"
        )
    return tuple(axes)[len(axes) - variable.get_value().ndim :]


def specs(state: nnx.State, rules: Rules, min_weight_size: int = 0) -> nnx.State:
    """The PartitionSpec of every variable of a state, as a tree of the state's structure with specs for
    leaves.

    Args:
      min_weight_size: weights with fewer elements per layer keep their compute layout: their messages would
        cost more than their bytes.
    """

    mesh = jax.sharding.get_abstract_mesh()
    shape = {} if mesh.empty else mesh.shape

    def of(v: nnx.Variable) -> nnx.Variable:
        axes, w = logical_axes(v), v.get_value()
        chosen = rules_for(axes, w.shape, rules, min_weight_size, shape)
        if isinstance(w, QuantizedWeight):
            _, structure = jax.tree.flatten(w)
            return v.replace(structure.unflatten([spec(a, chosen) for a in w.axes(axes)]))
        return v.replace(spec(axes, chosen))

    return jax.tree.map(of, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def rules_for(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    rules: Rules,
    min_weight_size: int,
    mesh_shape: Mapping[str, int],
) -> Rules:
    """The rules that hold for one weight: those of use where it is small, other ones for experts.

    What divides an expert's matrices takes whole experts instead, if it can. Their gather is one piece then;
    along the embed axis every expert comes in slices, and both passes copy all of them to where the products
    want them.

    Args:
      axes, shape: of the weight, of all its layers if it is a stack.
      mesh_shape: devices by axis; empty where there is no mesh.
    """
    size = math.prod(shape) // (shape[0] if axes[0] == "layers" else 1)
    if size < min_weight_size:
        rules = COMPUTE_RULES
    further = rules.get(BY_EXPERTS)
    if "experts" not in axes or not further or not mesh_shape:
        return rules
    ways = math.prod(mesh_shape[a] for a in further)
    if ways == 1 or shape[axes.index("experts")] % (mesh_shape["expert"] * ways):
        return rules
    moved: Rules = {"experts": ("expert", *further), "expert_embed": ("stage",)}
    return rules | moved | {"lora_expert_mlp": ("tensor", "stage")}


def shardings(spec_tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The same tree with NamedShardings for specs."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), spec_tree, is_leaf=lambda s: isinstance(s, P)
    )


def reshard(tree: Any, spec_tree: Any) -> Any:
    """Moves every array of `tree` to its spec. Slicing a whole array is free; making one whole is an
    all-gather.
    """

    def move(a: jax.Array, spec: P) -> jax.Array:
        return a if jax.typeof(a).sharding.spec == spec else jax.sharding.reshard(a, spec)

    return jax.tree.map(move, tree, spec_tree)


def without_stage(w: jax.Array) -> P:
    """The spec of an array with the stage axis left out."""

    def rest(axes):
        left = tuple(a for a in ((axes,) if isinstance(axes, str) else axes or ()) if a != "stage")
        return left or None

    return P(*map(rest, jax.typeof(w).sharding.spec))


def bytes_per_device(tree: Any, sharding_tree: Any, memory_kind: str = "device") -> int:
    """Bytes of a tree's arrays that one device holds, or that another memory holds for it."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(sharding_tree), strict=True)
    leaves = [(a, s) for a, s in pairs if (s.memory_kind or "device") == memory_kind]
    return sum(
        jax.ShapeDtypeStruct(s.shard_shape(a.shape), a.dtype).size * a.dtype.itemsize
        for a, s in leaves
    )
