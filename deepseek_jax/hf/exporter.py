"""Writes a model as a Hugging Face checkpoint: config.json, safetensors files with an index, tokenizer files.

Files are laid out before anything is written, so that every process writes the regions of its own shards into
them, one array after another. All of it happens in a temporary folder beside the target, which gets its name
at the end.
"""

import concurrent.futures
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence

import chex
import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.config import paths
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf import names, numpy_copy, provenance, reader, side_files
from deepseek_jax.hf.names import Leaf
from deepseek_jax.hf.provenance import SourceNotes
from deepseek_jax.hf.reader import Part
from deepseek_jax.hf.tensors import BUFFER, HfTensors, finite
from deepseek_jax.hf.tokenizer_files import Companions
from deepseek_jax.hf.writer import Flusher, ahead, copy_tensors, lay_out
from deepseek_jax.tensorfile import files, regions
from deepseek_jax.tensorfile.arrays import TensorSpec
from deepseek_jax.tensorfile.files import FILE_BYTES, fsync
from deepseek_jax.tensorfile.header import StoredTensor


@dataclasses.dataclass(frozen=True)
class Export:
    """What an export writes.

    Attributes:
      model: the options of the model.
      family: that it is saved as.
      leaves: its arrays.
      get: an array by its leaf, or in one process parts of it that are made as they are asked for.
      companions: files that go with it.
      notes: how the checkpoint stored its tensors that the model came from, and the model of the companions'
        config.json.
      dtype: of all tensors but the selection bias; None: as they were stored, else float32.
      file_bytes: of one file, at most.
      source: a checkpoint with the same numbers: what it holds under the same name and dtype is copied, and
        its arrays are not asked for.
      finish: called with the folder when all tensors are written and before it gets its name, by one process:
        it may look at them, and write further files.
    """

    model: ModelConfig
    family: str
    leaves: Sequence[Leaf]
    get: Callable[[Leaf], jax.Array | Iterable[Part]]
    companions: Companions
    notes: SourceNotes | None = None
    dtype: str | None = None
    file_bytes: int = FILE_BYTES
    source: HfTensors | None = None
    finish: Callable[[str], None] | None = None

    def specs(self) -> dict[str, TensorSpec]:
        """Of all tensors, layer by layer."""
        dtypes = self.notes.dtypes if self.notes and not self.dtype else {}
        out = {}
        for leaf in self.leaves:
            for name, shape in names.tensors(leaf).items():
                for n in (name, *names.copies_of(name, self.model)):
                    dtype = provenance.dtype_of(n, dtypes, self.dtype or "float32")
                    out[n] = TensorSpec(shape, dtype)
        return {name: out[name] for name in sorted(out, key=names.order)}


def export(target: str, what: Export) -> None:
    """Writes a checkpoint. In a job of several processes all call it, with a target that all see.

    Args:
      target: a folder that does not exist yet, or is empty.
      what: goes into it.

    Raises:
      UserError: the target is in use or cannot be written, the tokenizer is missing, or numbers are not
        finite in the dtype they are written in.
    """
    target = os.path.abspath(os.path.expanduser(target))
    temporary, chief = paths.scratch(target), jax.process_index() == 0
    if os.path.exists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise UserError(f"{target} exists already. Name a new folder.")
    specs = what.specs()
    try:
        if chief:
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)
            before = what.notes.model if what.notes else None
            largest = max(specs.values(), key=lambda spec: spec.nbytes).dtype.name
            side_files.write(
                temporary, what.model, what.family, what.companions, before, dtype=largest
            )
        places = lay_out(temporary, specs, what.file_bytes, chief)
        _wait("laid out")
        leaves = _copy_stored(what, places, temporary, chief)
        with Flusher() as flusher:
            for leaf in leaves:
                flusher.flush(write_leaf(temporary, leaf, what.get(leaf), places, what.model))
        _wait("written")
        if chief:
            if what.finish is not None:
                what.finish(temporary)
            _finish(temporary, target, {place.file for place in places.values()})
        _wait("renamed")
    except OSError as e:
        raise UserError(
            f"{target} cannot be written ({e.strerror or e}). Name a folder that you may write to, with room "
            f"for the model."
        ) from e
    finally:
        if chief:
            shutil.rmtree(temporary, ignore_errors=True)


def _copy_stored(
    what: Export, places: dict[str, StoredTensor], folder: str, chief: bool
) -> Sequence[Leaf]:
    """Copies what the source holds as it is; the leaves that are left."""
    if what.source is None:
        return what.leaves
    stored = what.source.tensors
    same = {
        name: place
        for name, place in places.items()
        if name in stored and stored[name].spec == place.spec
    }
    copy_tensors(what.source, same if chief else {}, folder)

    def is_copied(leaf: Leaf) -> bool:
        return all(
            {name, *names.copies_of(name, what.model)} <= same.keys()
            for name in names.tensors(leaf)
        )

    return [leaf for leaf in what.leaves if not is_copied(leaf)]


def write_leaf(
    folder: str,
    leaf: Leaf,
    array: jax.Array | Iterable[Part],
    places: dict[str, StoredTensor],
    model: ModelConfig,
) -> set[str]:
    """Writes this process's shards of an array, each region once in the whole job, by several threads.

    Args:
      folder: that the files are in.
      leaf: the array's tensors.
      array: its values.
      places: of all tensors.
      model: the options of the model.

    Returns:
      The files that it wrote to.
    """
    if isinstance(array, jax.Array):
        chex.assert_shape(array, leaf.shape)
        parts = _parts_of(leaf, array)
    else:
        parts = ahead(array)
    opened: dict[str, int] = {}
    pool = concurrent.futures.ThreadPoolExecutor(reader.THREADS)
    try:
        for part, index in parts:
            tasks = []
            for piece in names.tensor_regions(leaf, index):
                values = names.view(part, leaf, piece.at)
                for name in (piece.name, *names.copies_of(piece.name, model)):
                    file = places[name].file
                    if file not in opened:
                        path = os.path.join(folder, file)
                        opened[file] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
                    write_at = files.write_at(opened[file])
                    tasks.append(
                        pool.submit(
                            _write_region, write_at, name, places[name], piece.region, values
                        )
                    )
            for task in tasks:
                task.result()
    finally:
        pool.shutdown(cancel_futures=True)
        for descriptor in opened.values():
            os.close(descriptor)
    return {os.path.join(folder, file) for file in opened}


def _parts_of(leaf: Leaf, array: jax.Array) -> Iterator[Part]:
    """This process's shards on the host: by layers, or whole from a CPU, which need not copy them."""
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        data, index = shard.data, regions.of(shard.index, leaf.shape)
        if not leaf.stacked or next(iter(data.devices())).platform == "cpu":
            yield np.asarray(data), index
            continue
        for i in range(data.shape[0]):
            layer = index[0].start + i
            yield np.asarray(data[i : i + 1]), (slice(layer, layer + 1), *index[1:])


def _write_region(
    write_at: regions.WriteAt,
    name: str,
    place: StoredTensor,
    region: regions.Index,
    values: np.ndarray,
) -> None:
    """Writes numbers, a vector or [rows, columns], into a region of a tensor, converted block by block."""
    spec = place.spec
    if len(spec.shape) == 1:
        spec = TensorSpec((1, *spec.shape), spec.dtype)
        region, values = (slice(0, 1), *region), values[None]
    rows, columns = region
    width = (columns.stop - columns.start) * spec.dtype.itemsize
    step = max(1, BUFFER // max(1, width))
    for row in range(rows.start, rows.stop, step):
        stop = min(row + step, rows.stop)
        block = numpy_copy.out_of(values[row - rows.start : stop - rows.start], spec.dtype)
        if not finite(block):
            raise UserError(
                f"{name} holds numbers that are not finite, or too large for {spec.dtype}. Export an earlier "
                f"step, or with --dtype=float32."
            )
        regions.write(write_at, place.offset, spec, (slice(row, stop), columns), block)


def _finish(temporary: str, target: str, written: set[str]) -> None:
    for name in sorted(written):
        fsync(os.path.join(temporary, name))
    if os.path.isdir(target):
        os.rmdir(target)
    os.rename(temporary, target)


def _wait(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"deepseek_jax.hf export: {what}")
