"""What compression wrote of the student of a distillation: which layers and experts of the teacher its own
stand for.
"""

import os

from deepseek_jax.config.options import Config
from deepseek_jax.data import hub_cache
from deepseek_jax.errors import UserError
from deepseek_jax.hf import compression_map, provenance
from deepseek_jax.hf.compression_map import CompressionMap

__all__ = ["CompressionMap", "map_of"]


def map_of(config: Config, workdir: str = "") -> CompressionMap | None:
    """What compression wrote of the student: config.distill.map, or in the folder of config.init_from, or in
    the notes that a run has of that one. None where nothing is compared that needs it.

    Raises:
      UserError: it cannot be read.
    """
    d = config.distill
    if not d.hidden_weight and not d.router_weight:
        return None
    if d.map:
        try:
            return compression_map.read(d.map)
        except UserError as e:
            raise UserError(f"config.distill.map={d.map}: {e}") from e
    source = os.path.expanduser(config.init_from)
    of_source = hub_cache.folder_of(source) if os.path.isdir(source) else ""
    of_run = os.path.join(workdir, provenance.FOLDER) if workdir else ""
    for folder in filter(None, (of_source, of_run)):
        path = os.path.join(folder, compression_map.FILE)
        if os.path.isfile(path):
            return compression_map.read(path)
    return None
