"""Calibration text: files of texts, token files or chats, as packed batches for a model on any mesh."""

import argparse
import hashlib
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.cli import arguments
from deepseek_jax.cli.progress import Bar
from deepseek_jax.config.options import DTYPES
from deepseek_jax.data import tokenizer_folder
from deepseek_jax.data.documents import find_files, split_paths
from deepseek_jax.data.fields import Rows
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.esft import scores as packing
from deepseek_jax.inference.loaded import LoadedModel
from deepseek_jax.inference.opener import Opened, open_model, parse_mesh
from deepseek_jax.parallel.mesh import BATCH_AXES

OPTION = "--text"
SEQUENCE = 4096  # tokens, where the model takes as many
BATCH_TOKENS = 4096  # of a batch per device, unless the user says how many sequences there are
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


class Calibration(NamedTuple):
    """Batches of packed sequences.

    Attributes:
      batches: fields [B, S] each (data/fields.py), the same B, which the mesh divides.
      tokens: that they hold, without padding.
      files: {"name", "sha256"} of each file.
      seed, sequence_length: how they were drawn and packed.
    """

    batches: list[Rows]
    tokens: int
    files: list[dict[str, str]]
    seed: int
    sequence_length: int

    def progress(self, title: str) -> Iterator[Rows]:
        """The batches, with a bar."""
        with Bar(title, len(self.batches), True, "items") as bar:
            for batch in self.batches:
                yield batch
                bar.advance(1)

    def notes(self) -> dict[str, Any]:
        """What compression.json says of them."""
        return {
            "files": self.files,
            "tokens": self.tokens,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
        }


def tokens(text: str) -> int:
    """The type of an option that counts tokens: 131072, 128k, 1M."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("k", "M", "B") else (text, "")
    try:
        count = round(float(number) * _UNITS[unit])
    except (ValueError, OverflowError):
        count = -1
    if count < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens. Write it as 1M")
    return count


def add_options(parser: arguments.Parser) -> None:
    """The options of a command that reads calibration text."""
    parser.add_argument(
        OPTION,
        type=arguments.path_list,
        metavar="FILE",
        help="calibration text: documents, token files or chats, as config.data.path takes them",
    )
    parser.add_argument(
        "--tokens",
        type=tokens,
        default=1 << 18,
        help="that are read, drawn at random; 0: all (default %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=arguments.whole(0),
        default=0,
        help="of what is random (default %(default)s)",
    )
    parser.add_argument(
        "--sequence-length",
        type=arguments.whole(2),
        help=f"tokens of a sequence (default: {SEQUENCE})",
    )
    parser.add_argument(
        "--batch-size", type=arguments.whole(1), help="sequences of a batch, over the whole mesh"
    )
    parser.add_argument("--mesh", help="devices, as fsdp=2,expert=4 (default: one)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=DTYPES, help="of computation (default %(default)s)"
    )


def find(text: str) -> list[str]:
    """The files of --text.

    Raises:
      UserError: there are none.
    """
    return [f.path for spec in split_paths(text, OPTION) for f in find_files(spec, OPTION)]


def open_for(args: argparse.Namespace) -> Opened:
    """The model of a command, on its mesh, to be run on calibration text.

    Raises:
      UserError: as open_model, or --mesh does not fit.
    """
    return open_model(args.model, args.step, args.dtype, parse_mesh(args.mesh))


def read(opened: Opened, args: argparse.Namespace) -> Calibration:
    """The batches that the options name.

    Args:
      opened: the model, whose tokenizer and chat template read the text.
      args: as `add_options`.

    Raises:
      UserError: there is no tokenizer, the text cannot be read or is empty, or an option does not fit.
    """
    model = opened.model
    longest = model.config.max_position_embeddings
    length = args.sequence_length or min(SEQUENCE, longest)
    if not 1 < length <= longest:
        raise UserError(
            f"--sequence-length={length} is not between 2 and the model's max_position_embeddings={longest}."
        )
    shards = math.prod(model.mesh.shape[axis] for axis in BATCH_AXES)
    wanted = args.batch_size or shards * max(1, BATCH_TOKENS // length)
    batch = max(1, -(-wanted // shards)) * shards
    path, special = _tokenizer(opened)
    tokenizer = load_tokenizer(path, special_tokens=special)
    config = packing.data_config(model, args.text, path, length, args.seed, OPTION)
    batches = list(packing.packed(config, tokenizer, args.tokens, batch, OPTION))
    count = sum(int(np.sum(rows["segment_ids"] > 0)) for rows in batches)
    if not count:
        raise UserError(f"{OPTION}={args.text} has no text. Name a file that has.")
    return Calibration(batches, count, _hashes(find(args.text)), args.seed, length)


def _tokenizer(opened: Opened) -> tuple[str, bool]:
    """(path, whether it reads special tokens) of a model's tokenizer."""
    if opened.folder is None:
        assert opened.run is not None
        return opened.tokenizer or opened.run.data.tokenizer, opened.run.data.special_tokens
    if not (path := tokenizer_folder.find(opened.folder)):
        raise UserError(
            f"{opened.folder} has no {tokenizer_folder.JSON}. Put the model's beside its config.json."
        )
    return path, False


def _hashes(paths: list[str]) -> list[dict[str, str]]:
    out = []
    for path in paths:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        out.append({"name": os.path.basename(path), "sha256": digest})
    return out


def on_mesh(model: LoadedModel, rows: Rows) -> dict[str, jax.Array]:
    """A batch on the model's devices. Under jax.set_mesh(model.mesh)."""
    return {name: jax.device_put(a, jax.P(BATCH_AXES)) for name, a in rows.items()}
