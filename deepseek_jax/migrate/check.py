"""Whether the new config can run on so many devices, as far as that is known without model and data."""

import dataclasses
import os

from deepseek_jax.config.options import Config
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.migrate.arithmetic import devices
from deepseek_jax.migrate.config_file import as_config
from deepseek_jax.migrate.migration import Migration


def check(m: Migration) -> Config:
    """The options, validated.

    Raises:
      UserError: the first mistake.
    """
    config = as_config(m)
    count = m.devices or devices.world(m)
    if config.init_from and not os.path.isdir(os.path.expanduser(config.init_from)):
        validate(_without_model(config))
        return config
    known = _with_model(config) if config.init_from else config
    validate(known)
    if count:
        _check_mesh(known, count)
    return config


def _with_model(config: Config) -> Config:
    from deepseek_jax.run import init_from  # imports JAX, which takes seconds

    return init_from.with_what_is_known(config, None)


def _without_model(config: Config) -> Config:
    """Of a checkpoint that is not here yet: what depends on its model is asked when the run starts."""
    length = max(config.train.sequence_length, config.model.max_position_embeddings)
    model = dataclasses.replace(config.model, max_position_embeddings=length)
    lora = config.lora
    if lora.r:
        lora = dataclasses.replace(lora, target_modules="all-linear", base_dtype="bfloat16")
    return dataclasses.replace(config, model=model, lora=lora)


def _check_mesh(config: Config, count: int) -> None:
    """What parallel/mesh.py checks when a run starts."""
    from deepseek_jax.parallel import mesh  # imports JAX, which takes seconds

    x = config.mesh
    sizes = {axis: getattr(x, axis) for axis in mesh.AXES}
    fixed = 1
    for size in sizes.values():
        fixed *= max(size, 1)
    if count % fixed or (count != fixed and -1 not in sizes.values()):
        raise UserError(
            f"config.mesh has {fixed} devices in its axes, and --devices={count}. Give a multiple of {fixed}."
        )
    shape = {axis: count // fixed if size == -1 else size for axis, size in sizes.items()}
    mesh.check_model(config, shape)
