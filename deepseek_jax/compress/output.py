"""Writes what a compression made: a Hugging Face folder with compression.json, whole or not at all."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from deepseek_jax.cli.progress import Bar
from deepseek_jax.compress.source import Source, leaves_of
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf import compression_map, exporter
from deepseek_jax.hf.compression_map import CompressionMap
from deepseek_jax.hf.names import Leaf
from deepseek_jax.hf.reader import Part

Measure = Callable[[str], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A model that is to be written.

    Attributes:
      model: its options.
      parts: an array of it in parts, each made when it is asked for (parts.py).
      map: its layers and experts, of the first source: `source.document.map` after the operation.
      operation: what compression.json says of the operation: `kind` and more, of JSON's types.
      family: that it is saved as; "": the source's.
    """

    model: ModelConfig
    parts: Callable[[Leaf], Iterable[Part]]
    map: CompressionMap
    operation: Mapping[str, Any]
    family: str = ""


def check(out: str) -> None:
    """Refuses, before any work, a folder that is in use or cannot be made.

    Raises:
      UserError: says which.
    """
    out = os.path.abspath(out)
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"OUT={out} exists already. Name a new folder.")
    above = os.path.dirname(out)
    if not os.path.isdir(above):
        raise UserError(f"OUT={out}: there is no folder {above}. Create it with mkdir -p {above}.")
    if not os.access(above, os.W_OK):
        raise UserError(f"OUT={out}: {above} is read-only for you. Name another folder.")


def write(
    out: str,
    source: Source,
    made: Compressed,
    measure: Measure | None = None,
    pictures: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes a compressed model. In memory is a part of an array, and the one read ahead.

    Args:
      out: a folder that does not exist yet, or is empty.
      source: the model that it was made of; its tokenizer, chat template and licence go with it.
      made: what is written.
      measure: what else is to be said of the operation, found in the new folder before it gets its name:
        the errors of its layers.
      pictures: {name of a file: its text}, which go into the folder too.

    Returns:
      The operation as compression.json has it.

    Raises:
      UserError: the folder is in use or cannot be written, or numbers are not finite in the dtype in which
        they are written.
    """
    family = made.family or source.family
    operation = dict(made.operation)

    def finish(folder: str) -> None:
        if measure is not None:
            operation.update(measure(folder))
        document = source.document.then(operation, made.map)
        files = {compression_map.FILE: compression_map.dump(document)} | dict(pictures or {})
        for name, text in files.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())

    leaves = leaves_of(made.model, family)
    with Bar("Writing", sum(math.prod(leaf.shape) for leaf in leaves), True, "items") as bar:
        what = exporter.Export(
            model=made.model,
            family=family,
            leaves=leaves,
            get=lambda leaf: _counted(made.parts(leaf), bar),
            companions=source.companions,
            notes=source.notes,
            finish=finish,
        )
        exporter.export(out, what)
    return operation


def _counted(parts: Iterable[Part], bar: Bar) -> Iterator[Part]:
    for array, index in parts:
        yield array, index
        bar.advance(array.size)
