"""The base of an adapter that a run has trained: how it is known again, and both together.

A checkpoint of a LoRA run holds the adapter alone. The base is config.init_from, and the checkpoint says what
identifies it.
"""

import hashlib
import os
from typing import NamedTuple

import numpy as np

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import Config
from deepseek_jax.data import hub_cache
from deepseek_jax.errors import UserError
from deepseek_jax.hf import adapter, provenance, reader
from deepseek_jax.hf.adapter import Adapter
from deepseek_jax.hf.tensors import HfTensors
from deepseek_jax.tensorfile import regions

SAMPLE = 64  # numbers of every tensor that the identity of a checkpoint looks at


class AdaptedBase(NamedTuple):
    """What a LoRA run has trained, and on what."""

    adapter: Adapter
    source: HfTensors
    family: str


def identity(source: HfTensors) -> str:
    """What tells a checkpoint from others of the same model: a hash of the names, shapes and first numbers of
    all its tensors. All bytes of a base take longer to read than a step, and training changes all tensors.
    """
    out = hashlib.sha256()
    for name in sorted(source.tensors):
        spec = source.tensors[name].spec
        out.update(f"{name} {spec.dtype} {list(spec.shape)}".encode())
        if 0 < len(spec.shape) <= 3 and 0 not in spec.shape:
            shape = (*(1,) * (len(spec.shape) - 1), min(SAMPLE, spec.shape[-1]))
            values = np.zeros(shape[-2:], np.float32)
            source.read(name, regions.whole(shape), values)
            out.update(values.tobytes())
    return out.hexdigest()


def check(config: Config, source: HfTensors | None, before: str) -> str:
    """The identity of the base, compared with what the run's checkpoint says.

    Args:
      config: the options of the run.
      source: the checkpoint of config.init_from; None: it is gone.
      before: of the base that the run began with; "" where it begins.

    Raises:
      UserError: it is gone, or another one.
    """
    if source is None:
        raise UserError(
            f"config.init_from={config.init_from!r} is not there: it is the base of config.lora.r="
            f"{config.lora.r}, which checkpoints do not hold. Put it back, or go on with train.py and "
            f"config.init_from where it is now."
        )
    found = identity(source)
    if before and found != before:
        raise UserError(
            f"config.init_from={config.init_from} is another checkpoint than the one that this adapter was "
            f"trained on. Name that one, or another --workdir."
        )
    return found


def open_run(
    workdir: str, config: Config, checkpoints: Checkpointer, step: int | None = None
) -> AdaptedBase:
    """A LoRA run's adapter and its base: config.init_from, or what was imported into the workdir.

    Args:
      workdir: of the run, which may have been moved since.
      config: its options.
      checkpoints: of the run.
      step: of the checkpoint; None: the newest.

    Raises:
      UserError: there is no such checkpoint, or the base is gone or another one.
    """
    folder = hub_cache.folder_of(os.path.expanduser(config.init_from))
    if not os.path.isdir(folder) and provenance.has_weights(workdir):
        folder = os.path.join(workdir, provenance.FOLDER)
    if not os.path.isdir(folder):
        check(config, None, "")
    source, _, family = reader.open_source(folder)
    check(config, source, str(checkpoints.read_extra(step).get("base") or ""))
    stored, arrays = checkpoints.source(step), {}
    for name, spec in stored.shapes.items():
        if name.startswith("params/"):
            path = name.removeprefix("params/")
            arrays[path] = stored.read(name, regions.whole(spec.shape))
    given = adapter.of_run(arrays, config.lora, config.model, family, config.init_from)
    return AdaptedBase(given, source, family)
