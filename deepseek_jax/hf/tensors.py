"""Reads a Hugging Face checkpoint: which tensors there are, and regions of them by their byte ranges.

Every file's head is checked before anything is read (tensorfile/header.py). A region is read in blocks, so
that no more than BUFFER bytes are held beside the array that it goes into.
"""

import json
import os
import threading
from typing import Any

import chex
import ml_dtypes
import numpy as np

from deepseek_jax.data import hub_cache
from deepseek_jax.data.hub_cache import INDEX, SINGLE, some
from deepseek_jax.errors import UserError
from deepseek_jax.hf import numpy_copy
from deepseek_jax.tensorfile import bounded_json, files, header, regions
from deepseek_jax.tensorfile.bounded_json import BadFile
from deepseek_jax.tensorfile.header import StoredTensor

SCALE = (
    "_scale_inv"  # suffix of the scales of a weight with FP8 blocks, DeepSeek-V3's release format
)
BUFFER = 1 << 24  # bytes read at once
MAX_CONFIG = 1 << 22  # bytes of a config.json
FLOATS = tuple(np.dtype(d) for d in (np.float32, ml_dtypes.bfloat16, np.float16))
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FP8_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


class HfTensors:
    """The tensors of a checkpoint's folder, with one file or several, or of a snapshot in the hub's cache.

    Attributes:
      folder: its path.
      config: its config.json.
      tensors: {name: StoredTensor}.
    """

    def __init__(self, folder: str):
        """Reads config.json and the heads of all files.

        Raises:
          UserError: a file is missing or is not what the format wants.
        """
        self.folder = hub_cache.folder_of(folder)
        self._files: dict[str, int] = {}
        self._opening = threading.Lock()
        self._block = (128, 128)
        self.config = read_config(self.folder)
        if isinstance(self.config.get("model"), dict) and "model_type" not in self.config:
            raise UserError(
                f"{folder} is the folder of a run of train.py and not a checkpoint. Make one of "
                f"it: python -m deepseek_jax.hf export {folder} DST."
            )
        if "quantization_config" not in self.config and (
            method := hub_cache.quantised(self.folder)
        ):
            raise UserError(
                f"{folder}/hf_quant_config.json: quant_algo={method!r} is not in this version, "
                f"which reads fp8 with scales of blocks. Take the checkpoint in bfloat16."
            )
        try:
            self.tensors = self._find_tensors()
        except BadFile as e:
            raise UserError(
                f"{folder}: {e}. Copy that file again from where the checkpoint came from."
            ) from e
        if quantised := self.config.get("quantization_config"):
            block = quantised.get("weight_block_size") if isinstance(quantised, dict) else None
            if not (
                isinstance(block, list)
                and len(block) == 2
                and all(type(n) is int and n > 0 for n in block)
            ):
                raise UserError(
                    f"{folder}/config.json: quantization_config.weight_block_size={block!r} is not two "
                    f"numbers. Take a checkpoint in bfloat16, or in DeepSeek-V3's FP8 format."
                )
            self._block = tuple(block)

    def _find_tensors(self) -> dict[str, StoredTensor]:
        index = None
        if os.path.exists(path := os.path.join(self.folder, INDEX)):
            index = header.read_index(path)
            names = sorted(set(index.values()))
            if missing := [f for f in names if not os.path.isfile(os.path.join(self.folder, f))]:
                raise hub_cache.missing_files(self.folder, missing, len(names))
        elif os.path.exists(os.path.join(self.folder, SINGLE)):
            names = [SINGLE]
        elif not (
            names := hub_cache.all_shards(self.folder)
        ):  # their heads say what an index would
            raise hub_cache.no_weights(self.folder)
        for file in names:
            hub_cache.check_downloaded(self.folder, file)
        return files.find(self.folder, names, index, INDEX)

    def check(self, wanted: dict[str, tuple[int, ...]], ignored: set[str]) -> None:
        """Compares the tensors with those of a model.

        Args:
          wanted: {name: shape}.
          ignored: further names that may be there.

        Raises:
          UserError: what is missing, too much, of another shape or of a dtype that cannot be read.
        """
        if missing := [n for n in wanted if n not in self.tensors]:
            raise UserError(
                f"{self.folder}: {len(missing)} of {len(wanted)} tensors are missing: "
                f"{some(missing)}. Complete the checkpoint, or correct its config.json."
            )
        scales = {n + SCALE for n in wanted if self.stored_dtype(n) == FP8}
        if missing := sorted(scales - self.tensors.keys()):
            raise UserError(
                f"{self.folder}: {len(missing)} scales of FP8 weights are missing: "
                f"{some(missing)}. Complete the checkpoint."
            )
        if extra := sorted(self.tensors.keys() - wanted.keys() - scales - ignored):
            raise UserError(
                f"{self.folder}: {len(extra)} tensors are not of a model with this config.json: "
                f"{some(extra)}. Remove them, or correct config.json."
            )
        for name, shape in wanted.items():
            self._check_tensor(name, shape)

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        spec = self.tensors[name].spec
        if spec.shape != shape:
            raise UserError(
                f"{self.folder}: {name} has the shape {list(spec.shape)} and not {list(shape)}, as "
                f"config.json says. Correct one of them."
            )
        if spec.dtype == FP8:
            blocks = tuple(-(-n // b) for n, b in zip(shape, self._block, strict=False))
            scale = self.tensors[name + SCALE].spec
            if len(shape) != 2 or scale.shape != blocks or scale.dtype not in FLOATS:
                raise UserError(
                    f"{self.folder}: {name + SCALE} is {scale} and not a float for each of "
                    f"{list(blocks)} blocks of {self._block[0]}x{self._block[1]}. "
                    f"Take a checkpoint in DeepSeek-V3's FP8 format, or in bfloat16."
                )
        elif spec.dtype not in FLOATS:
            raise UserError(
                f"{self.folder}: {name} is of the dtype {spec.dtype}. Convert it to float32, bfloat16, "
                f"float16 or block-quantised FP8."
            )

    def stored_dtype(self, name: str) -> np.dtype:
        """The dtype that a tensor has in its file."""
        return self.tensors[name].spec.dtype

    def read(self, name: str, region: regions.Index, out: np.ndarray) -> None:
        """Reads a region of a vector, a matrix, or one of several matrices. Several threads may call it.

        Args:
          name: of the tensor.
          region: a slice for each of its axes.
          out: float array of the region's shape without leading axes of one, of any strides. FP8 is
            multiplied by its scales.

        Raises:
          UserError: numbers in the region are not finite, or the file cannot be read.
        """
        file, spec, offset = self.tensors[name]
        leading = (0,) * (len(region) - out.ndim)
        chex.assert_shape(out, regions.size(region)[len(leading) :])
        scales = self._scales(name, *region) if spec.dtype == FP8 else None

        def read_at(buffer: memoryview, at: int) -> None:
            self._pread(file, buffer, at)

        for place, block in regions.read_blocks(read_at, offset, spec, region, BUFFER):
            place, block = place[len(leading) :], block[leading]
            if scales is not None:
                block = _FP8_VALUES[block.view(np.uint8)]
                high, begin = self._block[0], region[0].start
                rows = np.arange(begin + place[0].start, begin + place[0].stop)
                block *= scales[rows // high - begin // high][:, place[1]]
            if not finite(block):
                raise UserError(
                    f"{self.folder}: {name} in {file} holds numbers that are not finite. Take an undamaged "
                    f"checkpoint."
                )
            if block.ndim == 1:
                numpy_copy.into(out[place][None], block[None])
            else:
                numpy_copy.into(out[place], block)

    def _scales(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        """float32 [blocks that the rows meet, columns]: the scale of each number of a row in these blocks."""
        high, wide = self._block
        blocks = self.tensors[name + SCALE].spec.shape[1]
        wanted = slice(rows.start // high, -(-rows.stop // high))
        out = np.empty((wanted.stop - wanted.start, blocks), np.float32)
        self.read(name + SCALE, (wanted, slice(0, blocks)), out)
        return out[:, np.arange(columns.start, columns.stop) // wide]

    def _pread(self, file: str, left: memoryview, at: int) -> None:
        """Fills a buffer from byte `at` of a file. Files stay open; several threads read them at once."""
        with self._opening:
            if file not in self._files:
                path = os.path.join(self.folder, file)
                try:
                    self._files[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as e:
                    raise UserError(
                        f"{path} cannot be read ({e.strerror}). Make it readable."
                    ) from e
        while left:
            try:
                n = os.preadv(self._files[file], [left], at)
            except OSError as e:
                raise UserError(
                    f"{self.folder}/{file} cannot be read ({e.strerror}). Copy it again."
                ) from e
            if not n:
                raise UserError(
                    f"{self.folder}/{file} became shorter while it was read. Copy it again."
                )
            left, at = left[n:], at + n

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}


def finite(a: np.ndarray) -> bool:
    """Whether all numbers are finite."""
    if a.dtype.itemsize == 2:  # NumPy has no quick maximum of these
        bits = np.bitwise_and(a.view(np.uint16), 0x7FFF).max(initial=0)
        return bits < (0x7C00 if a.dtype == np.float16 else 0x7F80)
    return bool(np.isfinite(a.max(initial=0)) and np.isfinite(a.min(initial=0)))


def read_config(folder: str) -> dict[str, Any]:
    """The config.json of a checkpoint's folder.

    Raises:
      UserError: there is none, or it is not a JSON object.
    """
    path = os.path.join(hub_cache.folder_of(folder), "config.json")
    if not os.path.isfile(path):
        raise UserError(f"{folder}: {hub_cache.no_config(os.path.dirname(path))}")
    try:
        out = bounded_json.read(path, "config.json", MAX_CONFIG)
    except BadFile as e:
        raise UserError(
            f"{folder}: {e}. Name a folder with config.json and {SINGLE}, as the hub has them."
        ) from e
    if not isinstance(out, dict):
        raise UserError(
            f"{path} is not a JSON object. Copy it again from where the checkpoint came from."
        )
    return out


def dump(value: Any) -> str:
    """JSON as the files of a checkpoint have it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
