"""What is fitted of shared cores so far: a folder with a file for each layer and projection, so that a fit
that was stopped goes on with the next one, and several workers share one.

A file is written under another name and renamed; one that is damaged is fitted again. `fit.json` says what
the files are of.
"""

import contextlib
import json
import os
import shutil
from typing import Any

import numpy as np
from etils import epath

from deepseek_jax.compress.shared_core_fit import Losses
from deepseek_jax.compress.shared_core_start import Factors
from deepseek_jax.config import paths
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile import bounded_json, files, regions
from deepseek_jax.tensorfile.arrays import TensorSpec
from deepseek_jax.tensorfile.bounded_json import BadFile
from deepseek_jax.tensorfile.header import StoredTensor

NOTES = "fit.json"
LOSSES = "losses"
MOST_BYTES = 1 << 16


class Fitted:
    """The folder of a fit.

    Args:
      out: where the model will be written; the folder stands beside it.
      of: what is fitted, of JSON's types: model, rank, steps.

    Raises:
      UserError: the folder is of another fit, or cannot be made.
    """

    def __init__(self, out: str, of: dict[str, Any]):
        self.folder = f"{os.path.abspath(out)}.fit"
        path = os.path.join(self.folder, NOTES)
        try:
            os.makedirs(self.folder, exist_ok=True)
            if not os.path.exists(path):
                temporary = paths.temporary(path)
                with open(temporary, "w", encoding="utf-8") as f:
                    json.dump(of, f)
                files.fsync(temporary)
                os.replace(temporary, path)
            before = bounded_json.read(path, NOTES, MOST_BYTES)
        except (OSError, BadFile) as e:
            raise UserError(
                f"{self.folder} cannot hold the fit ({e}). Remove it, or name another OUT."
            ) from e
        if before != of:
            before = before if isinstance(before, dict) else {}
            name = next(name for name in (*of, *before) if of.get(name) != before.get(name))
            raise UserError(
                f"{self.folder} holds the fit of another model or other options: {name}={before.get(name)} "
                f"there, {of.get(name)} here. Remove it, or name another OUT."
            )

    def _file(self, layer: int, projection: str) -> str:
        return f"layer-{layer:05d}-{projection}.safetensors"

    def has(self, layer: int, projection: str) -> bool:
        """Whether a layer's projection is there, whole."""
        try:
            return set(self._tensors(layer, projection)) == {*Factors._fields, LOSSES}
        except (BadFile, OSError):
            return False

    def _tensors(self, layer: int, projection: str) -> dict[str, StoredTensor]:
        return files.find(self.folder, [self._file(layer, projection)])

    def write(self, layer: int, projection: str, factors: Factors, losses: Losses) -> None:
        """Keeps what was fitted.

        Raises:
          UserError: it cannot be written.
        """
        arrays = {name: np.asarray(a) for name, a in factors._asdict().items()}
        arrays[LOSSES] = np.array(losses, np.float64)
        path = os.path.join(self.folder, self._file(layer, projection))
        temporary = paths.temporary(path)
        specs = {name: TensorSpec(a.shape, a.dtype) for name, a in arrays.items()}
        try:
            division = {os.path.basename(temporary): specs}
            files.write(self.folder, division, lambda name: [arrays[name]])
            files.fsync(temporary)
            os.replace(temporary, path)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise UserError(f"{path} cannot be written ({e.strerror}). Make room for it.") from e

    def read(self, layer: int, projection: str, name: str) -> np.ndarray:
        """One array: a field of Factors, or LOSSES."""
        tensor = self._tensors(layer, projection)[name]
        whole = regions.whole(tensor.spec.shape)
        return files.read_region(epath.Path(self.folder), tensor, whole)

    def losses(self, layer: int, projection: str) -> Losses:
        """Of the fit."""
        return Losses(*map(float, self.read(layer, projection, LOSSES)))

    def remove(self) -> None:
        """When the model is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
