"""Whether a cached teacher is of the rows, teacher and options of a run: whatever is not is refused in one
line.
"""

import dataclasses
from typing import Any

import jax

from deepseek_jax.config.options import OPTIONS, Config, value_of
from deepseek_jax.data import contents as contents_
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.sources import split_paths
from deepseek_jax.distill import manifest as manifests
from deepseek_jax.distill import shards
from deepseek_jax.distill.manifest import Manifest
from deepseek_jax.distill.reader import CachedTeacher
from deepseek_jax.errors import UserError
from deepseek_jax.train.batch import rows_here

OPTION = "config.distill.cache"
# Other values make other rows of the same data; what contents.py knows of examples besides.
OF_ROWS = (
    "seed",
    "train.sequence_length",
    "data.eval_fraction",
    "data.split",
    "data.document_mask",
)
PACKED_APART = "sources_apart"  # of examples: by data.weights each source has rows of its own


def options_of_rows(config: Config, data: Loader | ExampleLoader) -> dict[str, Any]:
    """Options that make other rows, by name."""
    out = {name: value_of(config, name) for name in OF_ROWS}
    if isinstance(data, ExampleLoader):
        out[PACKED_APART] = bool(config.data.weights.strip())
    return out


def contents_of_rows(data: Loader | ExampleLoader) -> contents_.Contents:
    """The figures of the data, without their mixture: it orders rows, and changes none."""
    return {name: value for name, value in data.contents.items() if name != "weights"}


def temperatures_of(config: Config) -> tuple[float, float]:
    """That a step and a held-out measure need log-sum-exps at: fields.OF_TEACHER."""
    return 1.0, config.distill.temperature


def with_cache(config: Config) -> Config:
    """The options with config.distill.top_k of a cached teacher, where they name one.

    Raises:
      UserError: the cache has fewer words, or not these temperatures; or there is no cache.
    """
    d = config.distill
    if config.objective != "distill" or not d.cache:
        return config
    found = manifests.read(d.cache, OPTION)
    where = f"{OPTION}={d.cache}"
    if d.top_k > found.top:
        raise UserError(
            f"config.distill.top_k={d.top_k} is above the {found.top} words that {where} has of each token. "
            f"Set config.distill.top_k to {found.top} or less."
        )
    stored = ", ".join(f"{t:g}" for t in found.temperatures)
    if other := [t for t in temperatures_of(config) if t not in found.temperatures]:
        raise UserError(
            f"config.distill.temperature={d.temperature:g} needs log-sum-exps at {other[0]:g}, and {where} "
            f"has those at {stored}. Set config.distill.temperature to one of these, or make a cache with "
            f"--temperatures={','.join(f'{t:g}' for t in sorted({*found.temperatures, *other}))}."
        )
    return dataclasses.replace(config, distill=dataclasses.replace(d, top_k=d.top_k or found.top))


def open_cache(
    config: Config, data: Loader | ExampleLoader, mesh: jax.sharding.Mesh, teacher: str = ""
) -> CachedTeacher | None:
    """The cached teacher of a run; None where it names none.

    Args:
      config: as `with_cache` returned it.
      data: what the run reads. mesh: of the run.
      teacher: identity of config.distill.teacher, "" where none is named.

    Raises:
      UserError: it is of other rows, data or teacher, or it is not complete.
    """
    folder = config.distill.cache
    if config.objective != "distill" or not folder:
        return None
    found = manifests.read(folder, OPTION)
    check_rows(found, config, data)
    if teacher and teacher != found.teacher:
        raise UserError(
            f"config.distill.teacher={config.distill.teacher} is another model than the one that "
            f"{OPTION}={folder} was made of ({found.teacher[:19]}). Name that one, or none, or make a cache "
            "of this one."
        )
    if gone := shards.missing(folder, found):
        raise UserError(
            f"{OPTION}={folder} is not complete: {found.shards - len(gone)} of {found.shards} shards are "
            f"there. Go on with: {found.command}"
        )
    here = rows_here(config.micro_batch, mesh)
    return CachedTeacher(folder, found, config.distill.top_k, temperatures_of(config), here)


def check_rows(found: Manifest, config: Config, data: Loader | ExampleLoader) -> None:
    """Raises UserError: a cache is of other rows than a run's."""
    of_cache = f"of {OPTION}={config.distill.cache}"
    names = split_paths(config.data.path, "config.data.path")
    if (used := found.contents["tokenizer"]) != data.tokenizer.name:
        raise UserError(
            f"config.data.tokenizer={config.data.tokenizer} is {data.tokenizer.name[:19]}, and the rows "
            f"{of_cache} are of {used[:19]}: ids would mean other text. Name that tokenizer, or make a cache "
            "with this one."
        )
    for name, now in options_of_rows(config, data).items():
        # caches of earlier versions do not name all of these
        was = found.options.get(name, OPTIONS[name].default if name in OPTIONS else None)
        if was != now and name == PACKED_APART:
            raise UserError(
                f"config.data.weights={config.data.weights!r} packs the sources "
                f"{'apart' if now else 'together'}, and those {of_cache} are packed otherwise. Make a cache "
                "with it."
            )
        if was != now:
            raise UserError(
                f"config.{name}={now} differs from {was} {of_cache}: its rows are others. Set "
                f"config.{name}={was}, or make a cache with it."
            )
    if what := contents_.difference(found.contents, contents_of_rows(data), names):
        raise UserError(
            f"{what} {of_cache}: its rows are others. Set it as it was, or make a cache of these data."
        )
    if (found.train_rows, found.eval_rows) != (data.num_train_rows, data.num_eval_rows):
        raise UserError(
            f"config.data.path={config.data.path!r} makes {data.num_train_rows} rows and "
            f"{data.num_eval_rows} held-out ones, and not the {found.train_rows} and {found.eval_rows} "
            f"{of_cache}. Make a cache of these data."
        )
