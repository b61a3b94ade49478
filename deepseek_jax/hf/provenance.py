"""What belongs to a model besides its weights, and what a later export needs to know of where it came from.

WORKDIR/hf/ holds the checkpoint's config.json, tokenizer and chat template, and `source.json`: the options of
its model, its family and the dtypes of its tensors. In a workdir that `import` made it holds the weights too.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Sequence

import numpy as np

from deepseek_jax.checkpoint.finder import has_steps
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf.tensors import FP8, INDEX, MAX_CONFIG, SCALE, SINGLE, HfTensors, dump
from deepseek_jax.tensorfile import bounded_json
from deepseek_jax.tensorfile.bounded_json import BadFile

FOLDER = "hf"  # in WORKDIR
NOTES = "source.json"
# What belongs to a model besides its weights. Code (modeling_*.py) is left out: nothing here runs it, and
# exports need none.
FILES = (
    "config.json",
    "generation_config.json",
    "compression.json",  # hf/compression_map.py: it stays true of what is trained from a compressed model
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "LICENSE-MODEL",
    "LICENSE-CODE",
    "NOTICE",
    "USE_POLICY.md",
)
TEMPLATES = "additional_chat_templates"


@dataclasses.dataclass(frozen=True)
class SourceNotes:
    """What is known of the checkpoint that a model came from.

    Attributes:
      family: its family.
      model: the options of its model.
      dtypes: NumPy's names of what tensors are stored as, by name with * for numbers, or by name where they
        differ. FP8 weights are bfloat16.
    """

    family: str
    model: ModelConfig
    dtypes: dict[str, str]


def notes_of(source: HfTensors, model: ModelConfig, family: str) -> SourceNotes:
    """What an export needs to know of a checkpoint."""
    dtypes: dict[str, str] = {}
    for name in sorted(source.tensors):
        if name.endswith(SCALE):
            continue
        stored = source.stored_dtype(name)
        dtype = "bfloat16" if stored == FP8 else stored.name
        if dtypes.setdefault(pattern(name), dtype) != dtype:
            dtypes[name] = dtype
    return SourceNotes(family, model, dtypes)


def pattern(name: str) -> str:
    """ "model.layers.*.mlp.experts.*.up_proj.weight"."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def write_notes(source: HfTensors, model: ModelConfig, family: str, folder: str) -> None:
    """Writes what is known of a checkpoint, its tokenizer and chat template into a folder."""
    copy_files(source.folder, folder)
    notes = notes_of(source, model, family)
    value = {
        "family": notes.family,
        "model": dataclasses.asdict(notes.model),
        "dtypes": notes.dtypes,
    }
    with open(os.path.join(folder, NOTES), "w", encoding="utf-8") as f:
        f.write(dump(value))


def copy_files(source: str, target: str, files: Sequence[str] = FILES) -> None:
    """Copies config.json, tokenizer and chat templates, as far as they are there.

    Args:
      source, target: folders.
      files: names of what is copied beside the templates.
    """
    for name in files:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    templates = os.path.join(source, TEMPLATES)
    if os.path.isdir(templates):
        os.makedirs(os.path.join(target, TEMPLATES), exist_ok=True)
        for name in sorted(os.listdir(templates)):
            if name.endswith(".jinja"):
                copy = os.path.join(target, TEMPLATES, name)
                shutil.copyfile(os.path.join(templates, name), copy)


def model_files(folder: str) -> Iterator[str]:
    """The files that a checkpoint or a run's folder is made of, which no output may replace.

    Of a run they are all below its own folders.
    """
    folder = os.path.expanduser(folder)
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        if (
            name in FILES
            or name in ("metrics.jsonl", "lock")
            or name.endswith((".safetensors", ".safetensors.index.json"))
        ):
            yield path
        elif name in (
            *("checkpoints", FOLDER, TEMPLATES, "profile"),
            *("tensorboard", "trackers", "wandb"),
        ):
            yield from (
                os.path.join(here, file) for here, _, files in os.walk(path) for file in files
            )


def read_notes(workdir: str) -> SourceNotes | None:
    """What is known of the checkpoint that a run began with, by WORKDIR/hf; None without one.

    Raises:
      UserError: it is damaged.
    """
    path = os.path.join(workdir, FOLDER, NOTES)
    if not os.path.exists(path):
        return None
    try:
        value = bounded_json.read(path, NOTES, MAX_CONFIG)
        model = from_config_dict({"model": value["model"]}).model
        dtypes = {str(k): str(v) for k, v in value["dtypes"].items()}
        return SourceNotes(str(value["family"]), model, dtypes)
    except (BadFile, UserError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path} cannot be read ({e}). Import the checkpoint again into another folder."
        ) from e


def has_weights(workdir: str) -> bool:
    """Whether `import` made this workdir."""
    return any(os.path.exists(os.path.join(workdir, FOLDER, name)) for name in (SINGLE, INDEX))


def is_untrained(workdir: str, checkpoints: str, local_dir: str = "") -> bool:
    """Whether `import` made this workdir and its run has no checkpoint yet.

    Args:
      workdir: of the run.
      checkpoints: its folder of checkpoints.
      local_dir: config.checkpoint.local_dir.
    """
    return has_weights(workdir) and not has_steps(checkpoints, local_dir)


def dtype_of(name: str, dtypes: dict[str, str], default: str) -> np.dtype:
    """What a tensor is stored as. The selection bias is float32 in every release.

    Args:
      name: of the tensor.
      dtypes: as SourceNotes.
      default: of those that are not named.
    """
    if name.endswith("e_score_correction_bias"):
        default = "float32"
    return np.dtype(dtypes.get(name) or dtypes.get(pattern(name)) or default)
