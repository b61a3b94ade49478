"""The base of a LoRA run: weights of a checkpoint that nothing changes, in config.lora.base_dtype.

A checkpoint of the run holds the adapter alone, and what identifies the base: `identity`. The weights come
from config.init_from at every start, and one line says so if it is gone or another one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from deepseek_jax.config.options import Config
from deepseek_jax.hf import adapter, names, peft, reader
from deepseek_jax.hf.names import Leaf
from deepseek_jax.hf.tensors import HfTensors
from deepseek_jax.model import lora, transformer
from deepseek_jax.model.layout import ModelWeights, PlacedModel
from deepseek_jax.parallel.mesh import per_device
from deepseek_jax.parallel.quantized import QuantizedWeight, inputs_of, quantize
from deepseek_jax.parallel.sharding import COMPUTE_RULES, spec


def read(
    source: HfTensors,
    config: Config,
    family: str,
    model: PlacedModel,
    everything: bool,
    words: int | None = None,
    done: Callable[[int], None] | None = None,
) -> ModelWeights:
    """The base in its shards, without factors; or a frozen model, held as one.

    Args:
      source: the checkpoint, whose names and shapes are checked.
      config: the options.
      family: of the checkpoint.
      model: the model, laid out over the mesh.
      everything: with what modules_to_save names, which a checkpoint of the run has too.
      words: of the checkpoint's embedding and head, where the model has another number.
      done: is told of the bytes of each array that is there.
    """
    shardings = dict(nnx.to_flat_state(model.shardings.params))
    out = []
    for path, variable in nnx.to_flat_state(model.abstract.params):
        if lora.is_factor(path) or (not everything and lora.learns(path, config.lora)):
            continue
        w, where = variable.get_value(), shardings[path].get_value()
        name = "/".join(map(str, path))
        leaf = names.leaf_of(name, tuple(w.shape), family, config.model)
        if isinstance(w, QuantizedWeight):
            axes = tuple(variable.get_metadata()["out_sharding"])
            held = _quantized(source, leaf, config.lora.base_dtype, axes, w, where)
        else:
            other = words if "vocab" in variable.get_metadata()["out_sharding"] else None
            held = reader.read_leaf(source, leaf, where, np.dtype(w.dtype), words=other)
        out.append((path, variable.replace(held)))
        if done is not None:
            done(sum(a.nbytes for a in jax.tree.leaves(held)))
    bias = reader.read_state(
        source, config.model, family, model.abstract.bias, model.shardings.bias
    )
    return ModelWeights(nnx.from_flat_state(out), bias)


def _quantized(
    source: HfTensors, leaf: Leaf, kind: str, axes: tuple, shapes: QuantizedWeight, where: Any
) -> QuantizedWeight:
    """A weight in few bits, layer by layer: no more than one of them is there in float32."""
    layer_axes = axes[1:] if leaf.stacked else axes
    inputs = inputs_of(layer_axes)
    undivided = list(layer_axes)
    undivided[inputs] = None  # what belongs to a scale is on one device
    target = spec(tuple(undivided), COMPUTE_RULES)
    mesh = jax.tree.leaves(where)[0].mesh
    parts = [spec(a, COMPUTE_RULES) for a in shapes.axes(tuple(undivided))]

    def of_one(prefix: str) -> list[jax.Array]:
        shape = leaf.shape[1:] if leaf.stacked else leaf.shape
        one = leaf._replace(shape=shape, prefixes=(prefix,), stacked=False)
        w = reader.read_leaf(source, one, jax.NamedSharding(mesh, target), np.dtype(np.float32))
        return _quantize(w, kind, inputs, target, tuple(parts))

    _, structure = jax.tree.flatten(shapes)
    if not leaf.stacked:
        pairs = zip(of_one(leaf.prefixes[0]), jax.tree.leaves(where), strict=True)
        return structure.unflatten([jax.device_put(a, sharding) for a, sharding in pairs])
    stacks = [
        jax.jit(functools.partial(jnp.zeros, s.shape, s.dtype), out_shardings=sharding)()
        for s, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(where), strict=True)
    ]
    for i, prefix in enumerate(leaf.prefixes):
        for k, a in enumerate(of_one(prefix)):
            sharding = jax.NamedSharding(mesh, P(*stacks[k].sharding.spec[1:]))
            stacks[k] = _write(stacks[k], jax.device_put(a, sharding), i)
    return structure.unflatten(stacks)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(w: jax.Array, kind: str, inputs: int, target: P, parts: tuple[P, ...]) -> list[Any]:
    def one_device(w: jax.Array) -> list[Any]:
        return jax.tree.leaves(quantize(kind, w, inputs))

    return per_device(one_device, (target,), list(parts))(w)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def _write(stack: jax.Array, layer: jax.Array, i: int) -> jax.Array:
    return stack.at[i].set(layer)


def factors(config: Config, model: PlacedModel, family: str) -> nnx.State:
    """The factors that a run begins with: those of config.lora.adapter, with what it replaces, else random A
    and B of zeros.

    Raises:
      UserError: the adapter cannot be read or is not of this model, or its layers differ.
    """
    abstract, where = (
        dict(nnx.to_flat_state(tree)) for tree in (model.abstract.params, model.shardings.params)
    )
    if not config.lora.adapter:

        def create() -> nnx.State:
            net = transformer.Transformer(config, nnx.Rngs(config.seed))
            return lora.factors_of(nnx.state(net, nnx.Param))

        shardings = nnx.from_flat_state([(p, s) for p, s in where.items() if lora.is_factor(p)])
        return jax.jit(create, out_shardings=shardings)()
    given = config.lora.adapter
    read_adapter = peft.read(given, config.model, family)
    arrays = adapter.for_run(read_adapter, config.model, family, f"config.lora.adapter={given}")
    out = []
    for path, variable in abstract.items():
        name = "/".join(map(str, path))
        if not lora.learns(path, config.lora):
            continue
        if name in arrays:
            a = np.asarray(arrays[name], np.float32)
            out.append((path, variable.replace(jax.device_put(a, where[path].get_value()))))
    return nnx.from_flat_state(out)
