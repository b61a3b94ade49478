"""Rules between the options of checkpoints."""

from deepseek_jax.config import held_out
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError


def check(config: Config) -> None:
    """Raises UserError: the first options that do not go together."""
    c = config.checkpoint
    for name in ("keep_best", "keep_every"):
        if getattr(c, name) and not c.keep:
            raise UserError(
                f"config.checkpoint.{name}={getattr(c, name)} has no effect with "
                "config.checkpoint.keep=0, which keeps all. "
                f"Set config.checkpoint.keep to how many of the newest stay, or {name}=0."
            )
    if c.keep_best and not (held_out.is_any(config.data) and config.eval.batches):
        raise UserError(
            f"config.checkpoint.keep_best={c.keep_best} needs held-out text, but "
            f"{held_out.option(config.data)} and config.eval.batches={config.eval.batches}. "
            f"Set both above 0, or keep_best=0."
        )
    if c.kind == "local" and not c.local_dir:
        raise UserError(
            "config.checkpoint.kind=local and config.checkpoint.local_dir='': it needs a folder on each "
            "host's own disk. "
            "Set config.checkpoint.local_dir, or config.checkpoint.kind=sharded."
        )
    if c.take_over and not c.dir:
        raise UserError(
            "config.checkpoint.take_over=True has no effect without config.checkpoint.dir, the "
            "folder to take over. Set both, or neither."
        )
    if "://" in c.local_dir:
        raise UserError(
            f"config.checkpoint.local_dir={c.local_dir} is remote. Name a folder on each host's own "
            "disk, or set "
            f"checkpoint.dir instead."
        )
