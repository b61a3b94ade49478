"""A model's weights as decoding reads them: layer by layer in place of stacked, so that no step copies them out of a stack.

On CPUs the arrays are views: nothing is copied, and the model that they come from may be used beside. Elsewhere a stack is freed where
its owner gives it away.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.experts.cpu_decode import Listed
from deepseek_jax.inference.generation.attention import Absorbed, absorbed
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.transformer import DecoderLayer, MTPLayer, Transformer
from deepseek_jax.parallel.mesh import BATCH_AXES

jit = jax.jit  # a name for tests, which compile quickly
GROUP = 8  # layers of one program at most: the time to compile does not grow with a model's depth, and a step is few calls


class Group(NamedTuple):
    """Layers that one program runs; groups with the same `graphdef`, treedef and length have it in common."""

    graphdef: nnx.GraphDef  # of a layer
    treedef: Any  # of a layer's (state, absorbed projections)
    leaves: list[list[jax.Array]]  # of each layer

    def layer(self, leaves: list[jax.Array]) -> tuple[Any, Absorbed | None]:
        """The module and its absorbed projections, from leaves."""
        state, weights = jax.tree.unflatten(self.treedef, leaves)
        return nnx.merge(self.graphdef, state), weights


class Weights(NamedTuple):
    """A whole model."""

    ends: tuple[
        nnx.GraphDef, Any, list[jax.Array]
    ]  # (graphdef, treedef, leaves) of a Transformer without layers: embedding, last norm, head
    groups: list[Group]
    mtp: list[Group]  # one a depth


def unstacked(net: Transformer, mesh: jax.sharding.Mesh, give: bool) -> Weights:
    """The weights of a model with arrays in it, which must not be used afterwards. Under `jax.set_mesh`.

    Args:
      give: the stacks are nobody else's: they are freed.
    """
    stacks = [s for s in (net.dense_layers, net.layers) if s is not None]
    mtp = list(net.mtp)
    net.dense_layers = net.layers = None
    net.mtp = nnx.List([])
    graphdef, state = nnx.split(net)
    leaves, treedef = jax.tree.flatten(state)
    groups = [g for stack in stacks for g in _groups(stack, net.model, mesh, give)]
    return Weights(
        (graphdef, treedef, leaves),
        groups,
        [_group([_listed(m, mesh)], net.model, mesh) for m in mtp],
    )


def _groups(
    stack: DecoderLayer, model: ModelConfig, mesh: jax.sharding.Mesh, give: bool
) -> list[Group]:
    """A stack of layers."""
    listed = isinstance(stack.mlp, MoE) and _alone_on_cpu(mesh)
    graphdef, state = nnx.split(stack)
    is_variable = lambda v: isinstance(v, nnx.Variable)
    variables, treedef = jax.tree.flatten(state, is_leaf=is_variable)
    by_layer: list[list[nnx.Variable]] = [[] for _ in range(model.num_hidden_layers)]
    for v in variables:
        w = v.get_value()
        axes = v.get_metadata()["out_sharding"]
        names = axes[1:]
        for i, part in enumerate(_parts(w, mesh, split=listed and names[0] == "experts")):
            by_layer[i].append(v.replace(part))
        if give and not _on_cpu(mesh):
            w.delete()
    layers = [jax.tree.unflatten(treedef, layer) for layer in by_layer if layer]
    size = 1 if listed else -(-len(layers) // -(-len(layers) // GROUP))
    return [
        _group([nnx.merge(graphdef, s) for s in layers[i : i + size]], model, mesh)
        for i in range(0, len(layers), size)
    ]


def _listed(mtp: MTPLayer, mesh: jax.sharding.Mesh) -> MTPLayer:
    if not _alone_on_cpu(mesh):
        return mtp
    graphdef, state = nnx.split(mtp)
    split = lambda v: (
        v.replace(_parts(v.get_value()[None], mesh, split=True)[0])
        if v.get_metadata()["out_sharding"][0] == "experts"
        else v
    )
    return nnx.merge(
        graphdef, jax.tree.map(split, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    )


def _group(layers: list[nnx.Module], model: ModelConfig, mesh: jax.sharding.Mesh) -> Group:
    out = []
    for layer in layers:
        attn = (layer if isinstance(layer, DecoderLayer) else layer.layer).self_attn
        weights = (
            _absorbed(attn.kv_b_proj.kernel.get_value(), model, mesh)
            if model.num_key_value_heads is None
            else None
        )
        graphdef, state = nnx.split(layer)
        leaves, treedef = jax.tree.flatten((state, weights))
        out.append(leaves)
    return Group(graphdef, treedef, out)


def _parts(w: jax.Array, mesh: jax.sharding.Mesh, split: bool) -> list[Any]:
    """[L, ...] as L arrays; [L, E, ...] as L times E matrices if `split`."""
    if split:
        whole = np.asarray(w)
        matrix = lambda a: jax.device_put(
            a.reshape(a.shape[0], -1) if a.ndim == 3 else a, NamedSharding(mesh, P())
        )
        return [Listed(tuple(matrix(expert) for expert in layer)) for layer in whole]
    sharding = NamedSharding(mesh, P(*w.sharding.spec[1:]))
    out = []
    for i in range(w.shape[0]):
        shards = [
            jax.device_put(np.asarray(s.data)[i], s.device)
            if s.device.platform == "cpu"
            else s.data[i]
            for s in w.addressable_shards
        ]
        out.append(jax.make_array_from_single_device_arrays(w.shape[1:], sharding, shards))
    return out


def _absorbed(kernel: jax.Array, model: ModelConfig, mesh: jax.sharding.Mesh) -> Absorbed:
    """Over the mesh: heads over tensor, the latent's width over the axes of the batch where they divide it."""
    ways = int(np.prod([mesh.shape[a] for a in BATCH_AXES]))
    width = BATCH_AXES if model.kv_lora_rank % ways == 0 else None
    specs = P("tensor", None, width), P("tensor", width, None)

    @jit
    def make(kernel):
        kernel = jax.sharding.reshard(kernel, P(None, "tensor"))
        return tuple(
            jax.sharding.reshard(a, s) for a, s in zip(absorbed(kernel, model), specs, strict=True)
        )

    return make(kernel)


def _on_cpu(mesh: jax.sharding.Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _alone_on_cpu(mesh: jax.sharding.Mesh) -> bool:
    return mesh.size == 1 and _on_cpu(mesh)
