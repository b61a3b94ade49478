"""Writes token files and what stands beside them (tokenfile.py says what)."""

import contextlib
import json
import os

import numpy as np

from deepseek_jax.config.paths import temporary
from deepseek_jax.data.tokenfile import FORMAT, sidecar_paths
from deepseek_jax.data.tokenizer import Tokenizer


class TokenWriter:
    """Writes a token file as it grows, holding none of it. A context manager; without `finish`
    nothing appears.

    Everything goes to temporary names first. `finish` renames the token file last, and takes an
    older one away before it touches that one's sidecar: a token file is there only with its own
    sidecar.

    Attributes:
      tokens: written so far.
      documents: ended so far.
    """

    def __init__(self, path: str, dtype: str, tokenizer: Tokenizer):
        """
        Args:
          path: NAME.npy or NAME.bin.
          dtype: uint16 or uint32.
          tokenizer: that the ids are of; the sidecar names it.

        Raises:
          OSError: the files cannot be made.
        """
        self._path = path
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._tokenizer = tokenizer
        self._temp = {p: temporary(p) for p in (*sidecar_paths(path), path)}
        self._npy = path.lower().endswith(".npy")
        self.tokens = 0
        self.documents = 0
        self._max = -1
        self._out = open(self._temp[path], "xb")
        try:
            self._offsets = open(self._temp[sidecar_paths(path)[1]], "xb")
        except OSError:
            self._out.close()
            os.unlink(self._temp[path])
            raise
        self._header_size = self._header()
        np.zeros(1, "<i8").tofile(self._offsets)

    def _header(self) -> int:
        """Writes the .npy header for the tokens so far; NumPy pads it so that its size does not
        depend on their number."""
        if self._npy:
            spec = {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self.tokens,),
            }
            np.lib.format.write_array_header_1_0(self._out, spec)
        return self._out.tell()

    def write(self, ids: np.ndarray, ends: np.ndarray) -> None:
        """Appends ids [n], in which documents end before the places `ends`."""
        if len(ids):
            self._max = max(self._max, int(ids.max()))
        self._out.write(ids.astype(self._dtype).tobytes())
        self._offsets.write((ends + self.tokens).astype("<i8").tobytes())
        self.tokens += len(ids)
        self.documents += len(ends)

    def finish(self, source: str) -> None:
        """Makes the file appear, with a sidecar that says what it was made of."""
        self._out.seek(0)
        if self._header() != self._header_size:
            raise RuntimeError("NumPy's .npy header changed its size with the number of tokens")
        side_path, offsets_path = sidecar_paths(self._path)
        side = {
            "format": FORMAT,
            "file": os.path.basename(self._path),
            "source": source,
            "dtype": self._dtype.name,
            "vocab_size": self._tokenizer.vocab_size,
            "eos_id": self._tokenizer.eos_id,
            "tokenizer": self._tokenizer.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "max_id": self._max,
        }
        with open(self._temp[side_path], "x", encoding="utf-8") as sidecar:
            json.dump(side, sidecar, indent=2)
            sidecar.write("\n")
            sidecar.flush()
            os.fsync(sidecar.fileno())
        for f in (self._out, self._offsets):
            f.flush()
            os.fsync(f.fileno())
            f.close()
        if os.path.exists(self._path):
            os.unlink(self._path)
        # The sidecar first: it tells whose the others are.
        for final in (side_path, offsets_path, self._path):
            os.replace(self._temp[final], final)

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *_) -> None:
        for f in (self._out, self._offsets):
            # On a full disk closing fails too, and the files still have to go.
            with contextlib.suppress(OSError):
                f.close()
        for temp in self._temp.values():
            if os.path.exists(temp):
                os.unlink(temp)
