"""Writes a model as a Hugging Face checkpoint: config.json, safetensors files with an index, tokenizer files.

Files are laid out before anything is written, so that every process writes the regions of its own shards into them, one array after
another. All of it happens in a temporary folder beside the target, which gets its name at the end.
"""

import concurrent.futures
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.config import paths
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf import (
    configuration,
    names,
    numpy_copy,
    provenance,
    reader,
    rotation,
    tokenizer_files,
)
from deepseek_jax.hf.families import FAMILIES
from deepseek_jax.hf.names import Leaf
from deepseek_jax.hf.reader import Part
from deepseek_jax.hf.tensors import BUFFER, INDEX, SINGLE, Source, dump, finite, read_config
from deepseek_jax.hf.tokenizer_files import Companions
from deepseek_jax.hf.writer import Flusher, Place, ahead, copy_tensors, fsync, pwrite
from deepseek_jax.tensorfile.arrays import Shape
from deepseek_jax.tensorfile.header import write_header

FILE_BYTES = 5_000_000_000  # of one file, at most, as transformers writes them; a larger tensor has one of its own


def export(
    target: str,
    model: ModelConfig,
    family: str,
    leaves: Iterable[Leaf],
    get: Callable[[Leaf], jax.Array | Iterable[Part]],
    dtypes: dict[str, str],
    default_dtype: str,
    companions: Companions,
    before: ModelConfig | None,
    file_bytes: int = FILE_BYTES,
    source: Source | None = None,
) -> None:
    """Writes a checkpoint. In a job of several processes all call it, with a target that all see.

    Args:
      target: a folder that does not exist yet, or is empty.
      leaves: the arrays, one at a time. get: an array by its leaf, or in one process parts of it that are made as they are asked for.
      dtypes: as start.Notes. default_dtype: of tensors that it does not name.
      companions: files that go with it. before: the model of their config.json. file_bytes: of one file, at
        most.
      source: a checkpoint with the same numbers: what it holds under the same name and dtype is copied, and its arrays are not asked for.

    Raises:
      UserError: the target is in use or cannot be written, the tokenizer is missing, or numbers are not
        finite in the dtype they are written in.
    """
    target = os.path.abspath(os.path.expanduser(target))
    leaves, temporary = list(leaves), paths.scratch(target)
    if os.path.exists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise UserError(f"{target} exists already. Name a new folder.")
    shapes = tensors_of(leaves, model, dtypes, default_dtype)
    try:
        if jax.process_index() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)
            _write_side_files(temporary, model, family, companions, before, shapes)
        places = lay_out(temporary, shapes, file_bytes, jax.process_index() == 0)
        _wait("laid out")
        if source is not None:
            held = source.tensors
            same = {
                n: p
                for n, p in places.items()
                if n in held and (held[n].shape, held[n].dtype) == (p.shape, p.dtype)
            }
            copy_tensors(source, same if jax.process_index() == 0 else {}, temporary)
            leaves = [
                leaf
                for leaf in leaves
                if not all({n, *copies_of(n, model)} <= same.keys() for n in names.tensors(leaf))
            ]
        with Flusher() as flusher:
            for leaf in leaves:
                flusher.flush(write_leaf(temporary, leaf, get(leaf), places, model))
        _wait("written")
        if jax.process_index() == 0:
            _finish(temporary, target, {p.file for p in places.values()})
        _wait("renamed")
    except OSError as e:
        raise UserError(
            f"{target} cannot be written ({e.strerror or e}). Name a folder that you may write to, with room for the model."
        ) from e
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def tensors_of(
    leaves: list[Leaf], model: ModelConfig, dtypes: dict[str, str], default_dtype: str
) -> dict[str, Shape]:
    """{name: shape and dtype} of all tensors, layer by layer."""
    out = {}
    for leaf in leaves:
        for name, shape in names.tensors(leaf).items():
            for n in (name, *copies_of(name, model)):
                out[n] = Shape(shape, provenance.dtype_of(n, dtypes, default_dtype))
    return {name: out[name] for name in sorted(out, key=order)}


def order(name: str) -> tuple:
    """The key that sorts names as checkpoints have them: embedding, layers by number, the rest."""
    first = (
        -1 if name.startswith("model.embed") else 1 if not name.startswith("model.layers.") else 0
    )
    return first, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def copies_of(name: str, model: ModelConfig) -> list[str]:
    """The names under which multi-token prediction layers have a copy of it, as in DeepSeek-V3's release."""
    layers = range(
        model.num_hidden_layers, model.num_hidden_layers + model.num_nextn_predict_layers
    )
    original = {"lm_head.weight": "model.embed_tokens.weight"} if model.tie_word_embeddings else {}
    return [
        f"model.layers.{i}.{copy}"
        for i in layers
        for copy, of in names.MTP_COPIES.items()
        if original.get(of, of) == name
    ]


def lay_out(
    folder: str, shapes: dict[str, Shape], file_bytes: int, writer: bool
) -> dict[str, Place]:
    """Assigns every tensor its place, and writes heads and index."""
    files: list[dict[str, Shape]] = [{}]
    size = 0  # of the last one
    for name, what in shapes.items():
        if files[-1] and size + what.nbytes > file_bytes:
            files.append({})
            size = 0
        files[-1][name] = what
        size += what.nbytes
    places: dict[str, Place] = {}
    for i, held in enumerate(files):
        file = SINGLE if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        with open(os.path.join(folder, file) if writer else os.devnull, "wb") as f:
            at = _head(f, held)
            for name, what in held.items():
                places[name] = Place(file, at, what.shape, what.dtype)
                at += what.nbytes
            if writer:
                f.truncate(at)
    if writer and len(files) > 1:
        index = {
            "metadata": {"total_size": sum(w.nbytes for w in shapes.values())},
            "weight_map": {n: p.file for n, p in places.items()},
        }
        with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as f:
            f.write(dump(index))
    return places


def _head(f: Any, tensors: dict[str, Shape]) -> int:
    """Writes a file's head; where the bytes after it begin."""
    count = 0

    class Counting:
        def write(self, data: bytes) -> None:
            nonlocal count
            count += f.write(data)

    write_header(Counting(), tensors, {"format": "pt"})
    return count


def write_leaf(
    folder: str,
    leaf: Leaf,
    array: jax.Array | Iterable[Part],
    places: dict[str, Place],
    model: ModelConfig,
) -> set[str]:
    """Writes this process's shards of an array, each region once in the whole job, by several threads. The files that it wrote to."""
    parts = _parts_of(leaf, array) if isinstance(array, jax.Array) else ahead(array)
    files: dict[str, int] = {}
    pool = concurrent.futures.ThreadPoolExecutor(reader.THREADS)
    try:
        for part, index in parts:
            tasks = []
            for piece in names.pieces(leaf, index):
                values = names.view(part, leaf, piece.at)
                for name in (piece.name, *copies_of(piece.name, model)):
                    place = places[name]
                    if place.file not in files:
                        files[place.file] = os.open(
                            os.path.join(folder, place.file), os.O_WRONLY | os.O_CLOEXEC
                        )
                    tasks.append(
                        pool.submit(
                            _write_region, files[place.file], name, place, piece.region, values
                        )
                    )
            for task in tasks:
                task.result()
    finally:
        pool.shutdown(cancel_futures=True)
        for descriptor in files.values():
            os.close(descriptor)
    return {os.path.join(folder, file) for file in files}


def _parts_of(leaf: Leaf, array: jax.Array) -> Iterator[Part]:
    """This process's shards on the host: whole from a CPU, which need not copy them, else one layer at a time."""
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        data, index = (
            shard.data,
            tuple(slice(*s.indices(n)[:2]) for s, n in zip(shard.index, leaf.shape, strict=True)),
        )
        if not leaf.stacked or next(iter(data.devices())).platform == "cpu":
            yield np.asarray(data), index
            continue
        for i in range(data.shape[0]):
            layer = index[0].start + i
            yield np.asarray(data[i : i + 1]), (slice(layer, layer + 1), *index[1:])


def _write_region(
    descriptor: int, name: str, place: Place, region: tuple[slice, ...], values: np.ndarray
) -> None:
    """Writes numbers, a vector or [rows, columns], into a region of a tensor."""
    if len(place.shape) == 1:
        region, shape, values = (slice(0, 1), *region), (1, *place.shape), values[None]
    else:
        shape = place.shape
    rows, columns = region
    item = place.dtype.itemsize
    pitch = shape[1] * item
    step = max(1, BUFFER // max(1, (columns.stop - columns.start) * item))
    for row in range(rows.start, rows.stop, step):
        block = numpy_copy.out_of(
            values[row - rows.start : min(row + step, rows.stop) - rows.start], place.dtype
        )
        if not finite(block):
            raise UserError(
                f"{name} holds numbers that are not finite, or too large for {place.dtype}. Export an earlier step, "
                f"or with --dtype=float32."
            )
        at = place.offset + row * pitch + columns.start * item
        if columns.stop - columns.start == shape[1]:
            pwrite(descriptor, block, at)
        else:
            for i, line in enumerate(block):
                pwrite(descriptor, line, at + i * pitch)


def _write_side_files(
    folder: str,
    model: ModelConfig,
    family: str,
    companions: Companions,
    before: ModelConfig | None,
    shapes: dict[str, Shape],
) -> None:
    config = configuration.from_model(model, family)
    if companions.files_from is not None:
        provenance.copy_files(companions.files_from, folder)
        config = merged(
            read_config(companions.files_from),
            config,
            configuration.from_model(before, family) if before else {},
        )
    most = max(shapes.values(), key=lambda what: what.nbytes).dtype.name
    config |= {
        "torch_dtype": most,
        "dtype": most,
        "num_nextn_predict_layers": model.num_nextn_predict_layers,
    }
    if "num_nextn_predict_layers" not in FAMILIES[family].options:
        del config["num_nextn_predict_layers"]
    config = tokenizer_files.write(folder, config, companions, model.max_position_embeddings)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        f.write(dump(config))


def merged(original: dict[str, Any], now: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """The config.json that a checkpoint came with, changed where the model's options changed since.

    A key that it has in one of several forms (rope_parameters, num_local_experts, mlp_layer_types of
    transformers 5; rope_theta, num_experts, first_k_dense_replace before) is written in all: a reader of
    another age would take its default for a form that is missing.
    """
    left_out = (
        "auto_map",
        "quantization_config",
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "num_mtp_layers",
        *rotation.KEYS,
    )
    family = FAMILIES[now["model_type"]]
    left_out += tuple(k for k in family.renamed if k not in now)
    out = {
        k: v
        for k, v in original.items()
        if k not in left_out and (v is not None or now.get(k) is None)
    }
    changed = {k for k in now.keys() | then.keys() if now.get(k) != then.get(k)}
    for key in changed | ({"layer_types"} if "num_hidden_layers" in changed else set()):
        out.pop(key, None)
    return (
        {k: v for k, v in now.items() if k not in out}
        | out
        | {"model_type": now["model_type"], "architectures": now["architectures"]}
    )


def _finish(temporary: str, target: str, files: set[str]) -> None:
    for name in sorted(files):
        fsync(os.path.join(temporary, name))
    if os.path.isdir(target):
        os.rmdir(target)
    os.rename(temporary, target)


def _wait(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"deepseek_jax.hf export: {what}")
