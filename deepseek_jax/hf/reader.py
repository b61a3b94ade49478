"""From a Hugging Face checkpoint into the arrays of a model, each process its own shards.

Shards are made one after another: beside the arrays themselves the host holds one device's shard of one array, and Source's buffer.
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
from deepseek_jax.hf.configuration import family_of, to_model
from deepseek_jax.hf.names import Leaf
from deepseek_jax.hf.tensors import Source

Part = tuple[np.ndarray, tuple[slice, ...]]  # of an array, and where in it
THREADS = min(8, os.cpu_count() or 1)
_ROTARY = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)  # in old Llama files; a function of the config


def open_source(folder: str) -> tuple[Source, ModelConfig, str]:
    """(tensors, the options of their model, its family).

    A checkpoint whose multi-token prediction layers were left out, as transformers saves it, is one of a model without them.

    Raises:
      UserError: it cannot be read, or is not of a model that this version has.
    """
    source = Source(folder)
    model = to_model(source.config)
    present = {
        int(m[1]) for m in (re.match(r"model\.layers\.(\d+)\.", n) for n in source.tensors) if m
    }
    depth, first = model.num_nextn_predict_layers, model.num_hidden_layers
    if depth and not any(i >= first for i in present):
        model = dataclasses.replace(model, num_nextn_predict_layers=0)
    return source, model, family_of(source.config)


def check(source: Source, model: ModelConfig, family: str, leaves: list[Leaf]) -> None:
    """Compares the tensors with those that the arrays need.

    Raises:
      UserError: as Source.check.
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
    source: Source, model: ModelConfig, family: str, state: Any, shardings: Any, dtype: Any = None
) -> Any:
    """A state of Transformer, parameters or selection biases, in its shards.

    Args:
      state: shapes and dtypes. shardings: the same tree. dtype: of arrays that follow it (names.follows_dtype), in place of theirs.

    Raises:
      UserError: a tensor cannot be read or holds numbers that are not finite.
    """
    leaves = iter(names.leaves(state, family, model))

    def one(shape: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        leaf = next(leaves)
        follows = names.follows_dtype(leaf.path, len(leaf.shape) - leaf.stacked)
        return read_leaf(
            source,
            leaf,
            sharding,
            np.dtype(dtype if dtype is not None and follows else shape.dtype),
        )

    return jax.tree.map(one, state, shardings)


def read_leaf(
    source: Source, leaf: Leaf, sharding: jax.sharding.Sharding, dtype: np.dtype
) -> jax.Array:
    """One array, in the shards that this process has."""
    shards, made = [], {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape, strict=True))
        key = tuple((s.start, s.stop) for s in index)
        if key in made:  # a copy of another device's shard
            host = np.asarray(made[key])
        else:
            host = read_part(source, leaf, index, dtype)
        target = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
        shards.append(jax.block_until_ready(jax.device_put(host, target)))
        made[key] = shards[-1]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def read_part(source: Source, leaf: Leaf, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """A part of an array, by several threads."""
    out = numpy_copy.empty(tuple(s.stop - s.start for s in index), dtype)
    jobs = list(names.pieces(leaf, index, source.tensors))
    work = lambda p: source.read(p.name, p.region, names.view(out, leaf, p.at))
    if len(jobs) == 1:
        work(jobs[0])
        return out
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(work, jobs):
            pass
    return out


def parts_of(source: Source, leaf: Leaf, dtype: np.dtype) -> Iterator[Part]:
    """An array in parts, a layer at a time where it holds several, each read when it is asked for."""
    whole = tuple(slice(0, n) for n in leaf.shape)
    for index in (
        [(slice(i, i + 1), *whole[1:]) for i in range(leaf.shape[0])] if leaf.stacked else [whole]
    ):
        yield read_part(source, leaf, index, dtype), index


def state_of(
    source: Source, config: Config, family: str, layout: Any, dtype: Any = None
) -> tuple[Any, Any]:
    """(parameters, selection biases) of a layout (model/layout.py) from a checkpoint, after all its names and shapes were checked."""
    parts = (
        (layout.abstract.params, layout.shardings.params),
        (layout.abstract.bias, layout.shardings.bias),
    )
    check(
        source,
        config.model,
        family,
        [leaf for state, _ in parts for leaf in names.leaves(state, family, config.model)],
    )
    params, bias = (
        read_state(source, config.model, family, state, shardings, dtype)
        for state, shardings in parts
    )
    return params, bias


def read(folder: str, config: Config, layout: Any) -> tuple[Any, Any]:
    """(parameters, selection biases) of a layout from the checkpoint in a folder."""
    source, _, family = open_source(folder)
    try:
        return state_of(source, config, family, layout)
    finally:
        source.close()
