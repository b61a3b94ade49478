"""Token files: memory-mapped ids on disk, what the `tokenize` command writes beside them, and how
both are checked.

`NAME.npy` (1-D integers) or `NAME.bin` (raw, little-endian) holds the ids, document after document,
each ended by eos. `NAME.json` is the sidecar and `NAME.offsets` the documents' starts and the end
(raw int64, documents + 1 of them). Files that other programs wrote have neither: their documents
are found by looking for eos, or in the index that Megatron-LM writes beside them. All their ids are
checked at every start: at 1 to 2 GB per second from memory, that costs less than a run that ends at
its first evaluation. token_writer.py writes both kinds of files.
"""

import json
import os
from collections.abc import Callable

import numpy as np

from deepseek_jax.config.options import Config
from deepseek_jax.data.documents import DataNotes
from deepseek_jax.data.megatron import read_index
from deepseek_jax.data.tokenizer import SPECIAL, Tokenizer
from deepseek_jax.errors import UserError

FORMAT = "deepseek_jax tokens 1"
CHUNK = 1 << 24  # tokens checked at a time
DTYPES = {"uint16": 1 << 16, "uint32": 1 << 32}  # name -> number of ids it can hold


def open_tokens(
    path: str,
    where: str,
    config: Config,
    tokenizer: Tokenizer,
    advance: Callable[[float], None] = lambda n: None,
    notes: DataNotes | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Memory-maps a token file and finds its documents.

    Args:
      path: a .npy or .bin file.
      where: `option=value`, for messages.
      advance: told the bytes that were checked.
      notes: told where the documents seem to end with another token than the tokenizer's.

    Returns:
      tokens: integer [n], a read-only memory map.
      offsets: int64 [documents + 1], the last is n. Without a sidecar the last document may lack its eos.

    Raises:
      UserError: not token ids, ids that `tokenizer` has not, or ids of another tokenizer.
    """
    notes = DataNotes() if notes is None else notes
    side = _read_sidecar(path, where)
    try:
        index = None if side else read_index(path, where)
        dtype = index.dtype.name if index else config.data.bin_dtype
        tokens = _map(path, where, side["dtype"] if side else dtype)
    except OSError as e:
        raise UserError(
            f"{where}: {path} cannot be read ({e.strerror or e}). Make it readable, or give another path."
        ) from None
    if not side and index is None and path.lower().endswith(".bin"):
        _check_width(path, where, tokens)
    if side:
        offsets = _check_sidecar(path, where, side, tokens, config, tokenizer)
        advance(os.path.getsize(path))
        return tokens, offsets
    eos = config.data.eos_token_id if config.data.eos_token_id >= 0 else tokenizer.eos_id
    ends = _scan(path, where, tokens, config, tokenizer, eos if index is None else None, advance)
    last = [] if len(ends) and ends[-1] == len(tokens) else [len(tokens)]
    offsets = index.offsets if index else np.concatenate([[0], ends, last]).astype(np.int64)
    _note_ends(path, tokens, offsets, eos, notes)
    return tokens, offsets


def _note_ends(
    path: str, tokens: np.ndarray, offsets: np.ndarray, eos: int, notes: DataNotes
) -> None:
    lasts = offsets[1:][np.diff(offsets) > 0]
    some = lasts[:: max(len(lasts) // 1000, 1)]
    if len(some) and not any(tokens[int(i) - 1] == eos for i in some):
        notes.others.append(
            f"{path}: no document ends with the token {eos}; if another one ends them, set "
            f"config.data.eos_token_id"
        )


def _map(path: str, where: str, dtype: str) -> np.ndarray:
    if path.lower().endswith(".bin"):
        width, size = np.dtype(dtype).itemsize, os.path.getsize(path)
        if size % width:
            raise UserError(
                f"{where}: {path} has {size} bytes, not a multiple of the {width} of {dtype}. Set "
                f"config.data.bin_dtype to what it was written with, or write it again."
            )
        return np.memmap(path, np.dtype(dtype).newbyteorder("<"), "r")
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        # NumPy's own message would mislead: it takes any other file for a pickle.
        raise UserError(
            f"{where}: {path} is not a .npy file of token ids: it is empty, damaged or holds "
            "Python objects. Save a 1-D integer array with np.save."
        ) from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        got = (
            f"{tokens.ndim}-D {tokens.dtype}"
            if isinstance(tokens, np.ndarray)
            else "an archive of arrays"
        )
        raise UserError(
            f"{where}: {path} holds {got}, not a 1-D array of integers. Save the token ids as one "
            "with np.save."
        )
    return tokens


def _check_width(path: str, where: str, tokens: np.ndarray) -> None:
    """Refuses ids of a wider type: read by halves, every second one is 0, which any tokenizer has."""
    some = np.asarray(tokens[:4096])
    if len(some) > 3 and some[::2].any() and not some[1::2].any():
        raise UserError(
            f"{where}: every second id of {path} is 0, as of ids that are wider than "
            f"{tokens.dtype.name}. Set config.data.bin_dtype to what it was written with; "
            f"one that this option does not have can be saved as .npy."
        )


def _outside(where: str, path: str, bad: int, config: Config, tokenizer: Tokenizer) -> UserError:
    fix = "Write the file again, or correct config.data.bin_dtype"
    if bad >= 0:
        fix = (
            "Set config.data.tokenizer to the tokenizer.json that the file was made with, "
            "or correct config.data.bin_dtype"
        )
    return UserError(
        f"{where}: {path} has the token id {bad}, but "
        f"config.data.tokenizer={config.data.tokenizer!r} has {tokenizer.vocab_size} ids "
        f"(0 to {tokenizer.vocab_size - 1}). {fix}."
    )


def _scan(
    path: str,
    where: str,
    tokens: np.ndarray,
    config: Config,
    tokenizer: Tokenizer,
    eos: int | None,
    advance: Callable[[float], None],
) -> np.ndarray:
    """Checks every id; returns the places after each `eos`, int64."""
    ends = [np.zeros(0, np.int64)]
    for start in range(0, len(tokens), CHUNK):
        chunk = np.asarray(tokens[start : start + CHUNK])
        low, high = int(chunk.min()) if chunk.dtype.kind == "i" else 0, int(chunk.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise _outside(where, path, low if low < 0 else high, config, tokenizer)
        if eos is not None:
            ends.append(np.flatnonzero(chunk == eos) + (start + 1))
        advance(chunk.nbytes)
    return np.concatenate(ends)


def sidecar_paths(path: str) -> tuple[str, str]:
    """-> (NAME.json, NAME.offsets) of NAME.npy or NAME.bin."""
    stem = os.path.splitext(path)[0]
    return stem + ".json", stem + ".offsets"


def is_sidecar_of(path: str) -> bool:
    """Whether the NAME.json beside NAME.npy or NAME.bin, if any, and so the NAME.offsets, is what `tokenize`
    wrote for this very file.

    Then both go with the file when it is written again.
    """
    try:
        with open(sidecar_paths(path)[0], encoding="utf-8") as f:
            return _is_ours(json.load(f), path)
    except (OSError, ValueError, RecursionError):
        return False


def _is_ours(side: object, path: str) -> bool:
    name = os.path.basename(path)
    return isinstance(side, dict) and side.get("format") == FORMAT and side.get("file") == name


def _read_sidecar(path: str, where: str) -> dict | None:
    """What `tokenize` wrote beside this file; None if it did not write the file."""
    side_path = sidecar_paths(path)[0]
    if not os.path.exists(side_path):
        return None
    try:
        with open(side_path, encoding="utf-8") as f:
            side = json.load(f)
    except (OSError, ValueError) as e:
        raise UserError(
            f"{where}: {side_path} beside {path} is not readable JSON ({e}). Tokenize again, or remove it."
        ) from None
    if not _is_ours(side, path):
        return None
    wanted = {
        "tokenizer": str,
        "dtype": str,
        "eos_id": int,
        "tokens": int,
        "documents": int,
        "max_id": int,
    }
    if wrong := [k for k, kind in wanted.items() if type(side.get(k)) is not kind] or ["dtype"] * (
        side["dtype"] not in DTYPES
    ):
        raise UserError(
            f"{where}: {side_path} beside {path} is damaged: {wrong[0]}={side.get(wrong[0])!r}. "
            f"Tokenize again."
        )
    return side


def _check_sidecar(
    path: str, where: str, side: dict, tokens: np.ndarray, config: Config, tokenizer: Tokenizer
) -> np.ndarray:
    side_path, offsets_path = sidecar_paths(path)
    again = f"Write {path} again with python -m deepseek_jax.data tokenize."
    if side["tokenizer"] != tokenizer.name or side["eos_id"] != tokenizer.eos_id:
        if side["tokenizer"].removesuffix(SPECIAL) == tokenizer.name.removesuffix(SPECIAL):
            was = side["tokenizer"].endswith(SPECIAL)
            raise UserError(
                f"{where}: {path} was written {'with' if was else 'without'} --special-tokens, "
                f"but config.data.special_tokens={not was}. "
                f"Set config.data.special_tokens={was}, or tokenize again."
            )
        raise UserError(
            f"{where}: {path} was written with the tokenizer {side['tokenizer']}, but "
            f"config.data.tokenizer={config.data.tokenizer!r} "
            f"is {tokenizer.name}. Set config.data.tokenizer to the first, or tokenize again."
        )
    if side["tokens"] != len(tokens) or side["dtype"] != tokens.dtype.name:
        raise UserError(
            f"{where}: {path} has {len(tokens)} tokens of {tokens.dtype.name}, but {side_path} says "
            f"{side['tokens']} of {side['dtype']}. {again}"
        )
    if side["max_id"] >= tokenizer.vocab_size:
        raise _outside(where, path, side["max_id"], config, tokenizer)
    try:
        offsets = np.fromfile(offsets_path, "<i8").astype(np.int64)
    except OSError as e:
        raise UserError(
            f"{where}: {offsets_path} cannot be read ({e.strerror or e}). {again}"
        ) from None
    if (
        len(offsets) != side["documents"] + 1
        or offsets[0]
        or offsets[-1] != len(tokens)
        or (np.diff(offsets) < 0).any()
    ):
        raise UserError(f"{where}: {offsets_path} does not fit {path}. {again}")
    return offsets
