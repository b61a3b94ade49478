"""What tells a teacher from others."""

import hashlib
import json
import os

from deepseek_jax.checkpoint import manifest
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.data import hub_cache
from deepseek_jax.errors import UserError
from deepseek_jax.hf import base, provenance, reader
from deepseek_jax.hf.tensors import read_config
from deepseek_jax.tensorfile.bounded_json import BadFile
from deepseek_jax.train import workdir as workdirs


def of_teacher(path: str) -> str:
    """Of a Hugging Face checkpoint `hf.base.identity`, of a run that of its newest checkpoint.

    Raises:
      UserError: it cannot be read.
    """
    folder = hub_cache.folder_of(path)
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise UserError(f"{path} holds no model: {hub_cache.no_config(folder)}")
    if not isinstance(read_config(folder).get("model"), dict):
        return _of_files(folder)
    saved = from_config_dict(workdirs.read_config(folder))
    checkpoints, local_dir = workdirs.checkpoints(folder, saved), saved.checkpoint.local_dir
    if provenance.is_untrained(folder, checkpoints, local_dir):
        return _of_files(os.path.join(folder, provenance.FOLDER))
    return _of_run(Checkpointer(checkpoints, read_only=True, options=saved.checkpoint))


def _of_files(folder: str) -> str:
    source, _, _ = reader.open_source(folder)
    found = base.identity(source)
    source.close()
    return found


def _of_run(checkpoints: Checkpointer) -> str:
    step, extra = checkpoints.latest_step(), checkpoints.read_extra()
    known = {name: extra.get(name) for name in ("run", "base")} | {"step": step}
    try:
        found = manifest.read(checkpoints.path(step or 0))
    except (BadFile, manifest.NewerFormat, OSError) as e:
        raise UserError(
            f"The checkpoint {checkpoints.path(step or 0)} cannot be read ({e})."
        ) from e
    files = found.files if found else {}
    text = json.dumps(known | {"files": files}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
