"""The devices of this machine, to measure them or to run on them. Commands that only plan use none."""

import jax

from deepseek_jax.cluster import gpus
from deepseek_jax.errors import UserError
from deepseek_jax.plan import topology


def devices(count: int | None) -> list[jax.Device]:
    """The GPUs of this host, else CPU devices: as many as asked for, all by default.

    Raises:
      UserError: there are fewer.
    """
    gpus.take_memory(several=False)
    if not gpus.visible_gpus():
        return topology.cpu_devices(count or max(1, jax.config.jax_num_cpu_devices))
    found = jax.devices()
    if count is not None and len(found) < count:
        raise UserError(
            f"--devices={count} is more than the {len(found)} devices here. Set it to {len(found)} "
            "or less."
        )
    return found[:count]
