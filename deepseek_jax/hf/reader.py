"""From a Hugging Face checkpoint into the arrays of a model, each process its own shards.

Shards are made one after another: beside the arrays themselves the host holds one device's shard of one
array, and the buffers of HfTensors.
"""

import concurrent.futures
import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from deepseek_jax.config.options import Config, ModelConfig
from deepseek_jax.hf import names, numpy_copy
from deepseek_jax.hf.adapter import Adapter
from deepseek_jax.hf.configuration import family_of, to_model
from deepseek_jax.hf.names import Leaf, TensorRegion
from deepseek_jax.hf.tensors import HfTensors
from deepseek_jax.tensorfile import regions

Part = tuple[np.ndarray, regions.Index]  # of an array, and where in it
THREADS = min(8, os.cpu_count() or 1)
# In old Llama files; a function of the config.
_ROTARY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def open_source(folder: str) -> tuple[HfTensors, ModelConfig, str]:
    """Opens the checkpoint in a folder.

    A checkpoint whose multi-token prediction layers were left out, as transformers saves it, is one of a
    model without them.

    Returns:
      Its tensors, the options of their model, and its family.

    Raises:
      UserError: it cannot be read, or is not of a model that this version has.
    """
    source = HfTensors(folder)
    model = to_model(source.config)
    present = {
        int(m[1]) for m in (re.match(r"model\.layers\.(\d+)\.", n) for n in source.tensors) if m
    }
    depth, first = model.num_nextn_predict_layers, model.num_hidden_layers
    if depth and not any(i >= first for i in present):
        model = dataclasses.replace(model, num_nextn_predict_layers=0)
    return source, model, family_of(source.config)


def check(source: HfTensors, model: ModelConfig, leaves: list[Leaf]) -> None:
    """Compares the tensors with those that the arrays need.

    Raises:
      UserError: as HfTensors.check.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for leaf in leaves:
        wanted |= names.tensors(leaf, source.tensors)
    first = model.num_hidden_layers
    ignored = {
        f"model.layers.{first + d}.{copy}"
        for d in range(model.num_nextn_predict_layers)
        for copy in names.MTP_COPIES
    }
    ignored |= {"lm_head.weight"} if model.tie_word_embeddings else set()
    ignored |= {n for n in source.tensors if _ROTARY.fullmatch(n)}
    source.check(wanted, ignored)


def read_state(
    source: HfTensors,
    model: ModelConfig,
    family: str,
    state: Any,
    shardings: Any,
    dtype: Any = None,
    adapter: Adapter | None = None,
) -> Any:
    """A state of Transformer, parameters or selection biases, in its shards.

    Args:
      source: the checkpoint.
      model: the options of its model.
      family: its family.
      state: shapes and dtypes.
      shardings: the same tree.
      dtype: of arrays that follow it (names.follows_dtype), in place of theirs.
      adapter: what changes the weights.

    Raises:
      UserError: a tensor cannot be read or holds numbers that are not finite.
    """
    leaves = iter(names.leaves(state, family, model))

    def one(shape: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        leaf = next(leaves)
        follows = names.follows_dtype(leaf.path, len(leaf.shape) - leaf.stacked)
        wanted = dtype if dtype is not None and follows else shape.dtype
        return read_leaf(source, leaf, sharding, np.dtype(wanted), adapter)

    return jax.tree.map(one, state, shardings)


def read_leaf(
    source: HfTensors,
    leaf: Leaf,
    sharding: jax.sharding.Sharding,
    dtype: np.dtype,
    adapter: Adapter | None = None,
    words: int | None = None,
) -> jax.Array:
    """One array, in the shards that this process has.

    Args:
      words: of an embedding or output head whose tensor has so many; those that the array has more are zeros.
    """
    shards: list[jax.Array] = []
    made: dict[Any, jax.Array] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        part = regions.of(index or (), leaf.shape)
        key = regions.key(part)
        if key in made:  # a copy of another device's shard
            host = np.asarray(made[key])
        elif words is not None:
            host = _read_words(source, leaf, part, dtype, words)
        else:
            host = read_part(source, leaf, part, dtype, adapter)
        target = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
        shards.append(jax.block_until_ready(jax.device_put(host, target)))
        made[key] = shards[-1]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _read_words(
    source: HfTensors, leaf: Leaf, index: regions.Index, dtype: np.dtype, words: int
) -> np.ndarray:
    """`read_part` of an embedding [V, D] or head [D, V] with other words than its tensor."""
    axis = 1 if leaf.kind == "matrix" else 0
    start, stop = (min(n, words) for n in (index[axis].start, index[axis].stop))
    out = np.zeros(regions.size(index), dtype)
    if start < stop:
        there = (*index[:axis], slice(start, stop), *index[axis + 1 :])
        inside = (slice(None),) * axis + (slice(0, stop - start),)
        out[inside] = read_part(source, leaf, there, dtype)
    return out


def read_part(
    source: HfTensors,
    leaf: Leaf,
    index: regions.Index,
    dtype: np.dtype,
    adapter: Adapter | None = None,
) -> np.ndarray:
    """A part of an array, by several threads. What an adapter adds is added in float32."""
    if adapter is not None and adapter.changes(leaf, index):
        exact = read_part(source, leaf, index, np.dtype(np.float32))
        adapter.change(leaf, index, exact)
        return exact.astype(dtype)
    out = numpy_copy.empty(regions.size(index), dtype)
    pieces = list(names.tensor_regions(leaf, index, source.tensors))

    def read_one(piece: TensorRegion) -> None:
        source.read(piece.name, piece.region, names.view(out, leaf, piece.at))

    if len(pieces) == 1:
        read_one(pieces[0])
        return out
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(read_one, pieces):
            pass
    return out


def parts_of(
    source: HfTensors, leaf: Leaf, dtype: np.dtype, adapter: Adapter | None = None
) -> Iterator[Part]:
    """An array in parts, a layer at a time where it holds several, each read when it is asked for."""
    whole = regions.whole(leaf.shape)
    parts = [whole]
    if leaf.stacked:
        parts = [(slice(i, i + 1), *whole[1:]) for i in range(leaf.shape[0])]
    for index in parts:
        yield read_part(source, leaf, index, dtype, adapter), index


def state_of(
    source: HfTensors,
    config: Config,
    family: str,
    layout: Any,
    dtype: Any = None,
    adapter: Adapter | None = None,
) -> tuple[Any, Any]:
    """(parameters, selection biases) from a checkpoint, after all its names and shapes were checked.

    Args:
      source: the checkpoint.
      config: of the model.
      family: of the checkpoint.
      layout: where the arrays go (model.layout.PlacedModel).
      dtype, adapter: as `read_state`.

    Raises:
      UserError: the checkpoint does not fit, or cannot be read.
    """
    abstract, shardings = layout.abstract, layout.shardings
    leaves = [
        leaf
        for state in (abstract.params, abstract.bias)
        for leaf in names.leaves(state, family, config.model)
    ]
    check(source, config.model, leaves)

    def read_one(state: Any, where: Any) -> Any:
        return read_state(source, config.model, family, state, where, dtype, adapter)

    return read_one(abstract.params, shardings.params), read_one(abstract.bias, shardings.bias)
