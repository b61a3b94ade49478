"""A model's weights as decoding reads them: layer by layer, so that no step copies them out of a stack.

On CPUs the arrays are views: nothing is copied, and the model that they come from stays usable.
Elsewhere a stack is freed when its owner gives it away.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.experts.cpu_unstacked import UnstackedExperts
from deepseek_jax.model.attention.interface import Attention
from deepseek_jax.model.decoder import DecoderLayer, MTPLayer
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.multiplied_out import multiply_out
from deepseek_jax.model.transformer import Transformer

GROUP = 8  # most layers of one program: compile time does not grow with depth, and a step stays a few calls


class Ends(NamedTuple):
    """A Transformer without layers: embedding, last norm, head."""

    graphdef: nnx.GraphDef
    treedef: Any
    leaves: list[jax.Array]

    def bare(self) -> "Ends":
        """Without arrays: how to put them together."""
        return self._replace(leaves=[])

    def net(self, leaves: list[jax.Array]) -> Transformer:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


class Group(NamedTuple):
    """Layers that one program runs. Groups with the same graphdef, treedef and length share it."""

    graphdef: nnx.GraphDef  # of a layer
    treedef: Any  # of a layer's (state, Attention.decoding_weights)
    leaves: list[list[jax.Array]]  # of each layer

    def bare(self) -> "Group":
        """Without arrays: how to put them together."""
        return self._replace(leaves=[])

    def layer(self, leaves: list[jax.Array]) -> tuple[Any, tuple[jax.Array, ...]]:
        """The module and its decoding weights, from leaves."""
        state, weights = jax.tree.unflatten(self.treedef, leaves)
        return nnx.merge(self.graphdef, state), weights


class LayerWeights(NamedTuple):
    """A whole model."""

    ends: Ends
    groups: list[Group]
    mtp: list[Group]  # one layer per depth of multi-token prediction


def unstack(net: Transformer, mesh: jax.sharding.Mesh, give: bool) -> LayerWeights:
    """The weights of a model with arrays in it, which must not be used afterwards. Under `jax.set_mesh`.

    Args:
      net: the model; it loses its layers.
      mesh: where the weights are.
      give: the stacks are nobody else's: they are freed.
    """
    stacks = [s for s in (net.dense_layers, net.layers) if s is not None]
    mtp = list(net.mtp)
    net.dense_layers = net.layers = None
    net.mtp = nnx.List([])
    for layer in [*stacks, *(m.layer for m in mtp)]:
        multiply_out(layer, net.config)  # once, and not in every step
    graphdef, state = nnx.split(net)
    leaves, treedef = jax.tree.flatten(state)
    return LayerWeights(
        Ends(graphdef, treedef, leaves),
        [g for stack in stacks for g in _groups(stack, net.config, mesh, give)],
        [_group([_with_unstacked_experts(m, mesh)], mesh) for m in mtp],
    )


def _groups(
    stack: DecoderLayer, config: ModelConfig, mesh: jax.sharding.Mesh, give: bool
) -> list[Group]:
    """The layers of a stack, in groups."""
    unstacks_experts = (
        isinstance(stack.mlp, MoE) and stack.mlp.experts.is_plain and _is_one_cpu(mesh)
    )
    graphdef, state = nnx.split(stack)
    variables, treedef = jax.tree.flatten(state, is_leaf=_is_variable)
    by_layer: list[list[nnx.Variable]] = [[] for _ in range(config.num_hidden_layers)]
    for v in variables:
        w = v.get_value()
        of_experts = v.get_metadata()["out_sharding"][1] == "experts"
        if unstacks_experts and of_experts:
            parts: list[Any] = list(_experts_of(w, mesh))
        else:  # one array, or several of a weight in few bits
            arrays, structure = jax.tree.flatten(w)
            by_array = [_layers_of(a, mesh) for a in arrays]
            parts = [structure.unflatten(of_one) for of_one in zip(*by_array, strict=True)]
        for i, part in enumerate(parts):
            by_layer[i].append(v.replace(part))
        if give and not _on_cpu(mesh):
            for a in jax.tree.leaves(w):
                a.delete()
    layers = [jax.tree.unflatten(treedef, layer) for layer in by_layer if layer]
    groups = -(-len(layers) // GROUP)
    size = 1 if unstacks_experts else -(-len(layers) // groups)
    return [
        _group([nnx.merge(graphdef, s) for s in layers[i : i + size]], mesh)
        for i in range(0, len(layers), size)
    ]


def _group(layers: list[nnx.Module], mesh: jax.sharding.Mesh) -> Group:
    leaves_by_layer = []
    for layer in layers:
        decoder_layer = layer if isinstance(layer, DecoderLayer) else layer.layer
        attention: Attention = decoder_layer.self_attn
        graphdef, state = nnx.split(layer)
        leaves, treedef = jax.tree.flatten((state, attention.decoding_weights(mesh)))
        leaves_by_layer.append(leaves)
    return Group(graphdef, treedef, leaves_by_layer)


def _with_unstacked_experts(mtp: MTPLayer, mesh: jax.sharding.Mesh) -> MTPLayer:
    """The layer with its experts one by one, where the mesh is one CPU."""
    if not _is_one_cpu(mesh) or not mtp.layer.mlp.experts.is_plain:
        return mtp
    graphdef, state = nnx.split(mtp)

    def unstacked(v):
        of_experts = v.get_metadata()["out_sharding"][0] == "experts"
        return v.replace(_experts_of(v.get_value()[None], mesh)[0]) if of_experts else v

    return nnx.merge(graphdef, jax.tree.map(unstacked, state, is_leaf=_is_variable))


def _experts_of(w: jax.Array, mesh: jax.sharding.Mesh) -> list[UnstackedExperts]:
    """[L, E, ...] as L layers of E matrices."""
    whole = NamedSharding(mesh, P())

    def matrix(a: np.ndarray) -> jax.Array:
        return jax.device_put(a.reshape(a.shape[0], -1) if a.ndim == 3 else a, whole)

    return [UnstackedExperts(tuple(matrix(e) for e in layer)) for layer in np.asarray(w)]


def _layers_of(w: jax.Array, mesh: jax.sharding.Mesh) -> list[jax.Array]:
    """[L, ...] as L arrays, each laid out as the stack."""
    sharding = NamedSharding(mesh, P(*w.sharding.spec[1:]))

    def layer(shard: Any, i: int) -> jax.Array:
        if shard.device.platform == "cpu":
            return jax.device_put(np.asarray(shard.data)[i], shard.device)
        return shard.data[i]

    out = []
    for i in range(w.shape[0]):
        shards = [layer(shard, i) for shard in w.addressable_shards]
        out.append(jax.make_array_from_single_device_arrays(w.shape[1:], sharding, shards))
    return out


def _is_variable(v: Any) -> bool:
    return isinstance(v, nnx.Variable)


def _on_cpu(mesh: jax.sharding.Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _is_one_cpu(mesh: jax.sharding.Mesh) -> bool:
    return mesh.size == 1 and _on_cpu(mesh)
