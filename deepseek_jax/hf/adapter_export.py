"""What a LoRA run has trained as a folder that PEFT loads, with the tokenizer that it was trained with."""

import os
import shutil

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config import paths
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.hf import base, peft, provenance

# Of the files of a model those that a reader of the adapter does not have from the base.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def export(
    workdir: str, target: str, config: Config, checkpoints: Checkpointer, step: int | None = None
) -> tuple[int, str]:
    """Writes the adapter of a run.

    Args:
      workdir: of the run.
      target: the folder to make.
      config: the options of the run.
      checkpoints: of the run.
      step: of the checkpoint; None: the newest.

    Returns:
      The bytes of its weights, and the family of its base.

    Raises:
      UserError: the run has none, its base is gone or another one, or the target cannot be written.
    """
    if not config.lora.r:
        raise UserError(
            f"--adapter: the run in {workdir} has trained all weights (config.lora.r=0). Leave --adapter out."
        )
    target = os.path.abspath(os.path.expanduser(target))
    if os.path.exists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise UserError(f"{target} exists already. Name a new folder.")
    opened = base.open_run(workdir, config, checkpoints, step)
    opened.source.close()
    temporary = paths.scratch(target)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        size = peft.write(temporary, opened.adapter, config.model)
        provenance.copy_files(os.path.join(workdir, provenance.FOLDER), temporary, TOKENIZER)
        if os.path.isdir(target):
            os.rmdir(target)
        os.rename(temporary, target)
    except OSError as e:
        raise UserError(
            f"{target} cannot be written ({e.strerror or e}). Name a folder that you may write to, with room "
            f"for the adapter."
        ) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size, opened.family
