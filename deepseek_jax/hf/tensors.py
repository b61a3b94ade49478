"""Reads a Hugging Face checkpoint: which tensors there are, and regions of them by their byte ranges.

Every file's head is parsed with bounds before anything is read (tensorfile/header.py). A region is read in blocks of
rows, so that no more than BUFFER bytes are held beside the array that it goes into.
"""

import json
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from deepseek_jax.data import hub_cache
from deepseek_jax.data.hub_cache import INDEX, SINGLE, some
from deepseek_jax.errors import UserError
from deepseek_jax.hf import numpy_copy
from deepseek_jax.tensorfile import bounded_json, header
from deepseek_jax.tensorfile.bounded_json import BadFile

SCALE = (
    "_scale_inv"  # suffix of the scales of a block-quantised weight, DeepSeek-V3's release format
)
BUFFER = 1 << 24  # bytes read at once
MAX_CONFIG = 1 << 22  # bytes of a config.json
FLOATS = tuple(np.dtype(d) for d in (np.float32, ml_dtypes.bfloat16, np.float16))
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_FP8_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
_GAP = (
    1 << 15
)  # bytes between the wanted parts of neighbouring rows that are read and thrown away: a disk reads as much anyway


class Tensor(NamedTuple):
    file: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source:
    """The tensors of a folder with `model.safetensors`, or with several files, or of a snapshot in the hub's
    cache.

    Attributes:
      folder: its path. config: its config.json. tensors: {name: Tensor}.
    """

    def __init__(self, folder: str):
        """Reads config.json and the heads of all files.

        Raises:
          UserError: a file is missing or is not what the format wants.
        """
        self.folder = hub_cache.folder_of(folder)
        self._files: dict[str, int] = {}
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
            self.tensors = self._read_heads()
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
                    f"{folder}/config.json: quantization_config.weight_block_size={block!r} is not two numbers. "
                    f"Take a checkpoint in bfloat16, or in DeepSeek-V3's FP8 format."
                )
            self._block = tuple(block)

    def _read_heads(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        path = lambda name: os.path.join(self.folder, name)
        index = None
        if os.path.exists(path(INDEX)):
            index = header.read_index(path(INDEX))
            files = sorted(set(index.values()))
            if missing := [f for f in files if not os.path.isfile(path(f))]:
                raise hub_cache.missing_files(self.folder, missing, len(files))
        elif os.path.exists(path(SINGLE)):
            files = [SINGLE]
        elif not (
            files := hub_cache.all_shards(self.folder)
        ):  # their heads say what an index would
            raise hub_cache.no_weights(self.folder)
        for file in files:
            hub_cache.check_downloaded(self.folder, file)
            for name, tensor in header.read(path(file), file).items():
                if index is not None and index.get(name) != file:
                    raise BadFile(
                        INDEX, f"{name[:80]!r} is in {file}, and the index says {index.get(name)}"
                    )
                out[name] = Tensor(file, tensor.what.shape, tensor.what.dtype, tensor.offset)
        if missing := sorted(set(index or ()) - set(out)):
            what = f"{len(missing)} tensors are not in the files that it names: {some(missing)}"
            raise BadFile(INDEX, what)
        return out

    def check(self, wanted: dict[str, tuple[int, ...]], ignored: set[str]) -> None:
        """Compares the tensors with those of a model.

        Args:
          wanted: {name: shape}. ignored: further names that may be there.

        Raises:
          UserError: what is missing, too much, of another shape or of a dtype that cannot be read.
        """
        if missing := [n for n in wanted if n not in self.tensors]:
            raise UserError(
                f"{self.folder}: {len(missing)} of {len(wanted)} tensors are missing: "
                f"{some(missing)}. Complete the checkpoint, or correct its config.json."
            )
        scales = {n + SCALE for n in wanted if self.tensors[n].dtype == FP8}
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
            t = self.tensors[name]
            if t.shape != shape:
                raise UserError(
                    f"{self.folder}: {name} has the shape {list(t.shape)} and not {list(shape)}, as config.json says. "
                    f"Correct one of them."
                )
            if t.dtype == FP8:
                blocks = tuple(-(-n // b) for n, b in zip(t.shape, self._block, strict=False))
                scale = self.tensors[name + SCALE]
                if len(t.shape) != 2 or scale.shape != blocks or scale.dtype not in FLOATS:
                    raise UserError(
                        f"{self.folder}: {name + SCALE} is {scale.dtype}{list(scale.shape)} and not a float for each of "
                        f"{list(blocks)} blocks of {self._block[0]}x{self._block[1]}. "
                        f"Take a checkpoint in DeepSeek-V3's FP8 format, or in bfloat16."
                    )
            elif t.dtype not in FLOATS:
                raise UserError(
                    f"{self.folder}: {name} is of the dtype {t.dtype}. Convert it to float32, bfloat16, float16 or block-quantised FP8."
                )

    def stored_dtype(self, name: str) -> np.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, region: tuple[slice, ...], out: np.ndarray) -> None:
        """Reads a region into `out`, a float array of its shape without leading axes of one, of any strides.

        Raises:
          UserError: numbers in it are not finite, or the file cannot be read.
        """
        t = self.tensors[name]
        shape, offset = t.shape, t.offset
        while len(shape) > 2:  # one expert of all in one tensor
            offset += region[0].start * math.prod(shape[1:]) * t.dtype.itemsize
            shape, region = shape[1:], region[1:]
        if len(shape) == 1:
            shape, region, out = (1, *shape), (slice(0, 1), *region), out[None]
        rows, columns = region
        scales = self._scales(name, rows, columns) if t.dtype == FP8 else None
        for start, block in self._blocks(t, offset, shape[1], rows, columns):
            if scales is not None:
                block = _FP8_VALUES[block.view(np.uint8)]
                block *= scales[
                    (rows.start + start + np.arange(len(block))) // self._block[0]
                    - rows.start // self._block[0]
                ]
            if not finite(block):
                raise UserError(
                    f"{self.folder}: {name} in {t.file} holds numbers that are not finite. Take an undamaged checkpoint."
                )
            numpy_copy.into(out[start : start + len(block)], block)

    def _scales(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        """float32 [blocks that the rows meet, columns]: the scale of each number of a row in these blocks."""
        s, (high, wide) = self.tensors[name + SCALE], self._block
        wanted = slice(rows.start // high, -(-rows.stop // high))
        out = np.empty((wanted.stop - wanted.start, s.shape[1]), np.float32)
        self.read(name + SCALE, (wanted, slice(0, s.shape[1])), out)
        return out[:, np.arange(columns.start, columns.stop) // wide]

    def _blocks(
        self, t: Tensor, offset: int, width: int, rows: slice, columns: slice
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of a region [rows, columns] of a matrix at `offset` with rows of `width` numbers."""
        item = t.dtype.itemsize
        wide, pitch, skipped = (
            (columns.stop - columns.start) * item,
            width * item,
            columns.start * item,
        )
        if not wide or rows.stop == rows.start:
            return
        whole = pitch - wide <= _GAP  # rows with what lies between them, at once
        step = max(1, BUFFER // (pitch if whole else wide))
        for row in range(rows.start, rows.stop, step):
            count = min(step, rows.stop - row)
            at = offset + row * pitch + skipped
            if whole:
                raw = np.empty(pitch * count, np.uint8)
                self._pread(t.file, raw[: pitch * (count - 1) + wide], at)
                block = raw.view(t.dtype).reshape(count, -1)[:, : columns.stop - columns.start]
            else:
                block = np.empty((count, columns.stop - columns.start), t.dtype)
                for i, line in enumerate(block.view(np.uint8)):
                    self._pread(t.file, line, at + i * pitch)
            yield row - rows.start, block

    def _pread(self, file: str, into: np.ndarray, at: int) -> None:
        if file not in self._files:
            try:
                self._files[file] = os.open(
                    os.path.join(self.folder, file), os.O_RDONLY | os.O_CLOEXEC
                )
            except OSError as e:
                raise UserError(
                    f"{self.folder}/{file} cannot be read ({e.strerror}). Make it readable."
                ) from e
        left = memoryview(into)
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
            f"{folder}: {e}. Name a folder with config.json and model.safetensors, as the hub has them."
        ) from e
    if not isinstance(out, dict):
        raise UserError(
            f"{path} is not a JSON object. Copy it again from where the checkpoint came from."
        )
    return out


def dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
