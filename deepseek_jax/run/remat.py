"""What train.remat=auto stands for on the devices of a run, which all its processes must agree on."""

import jax

from deepseek_jax.config.options import Config, replaced
from deepseek_jax.run.processes import Processes
from deepseek_jax.run.teacher import Teacher
from deepseek_jax.train import kept
from deepseek_jax.train.state import make_layout


def settled(
    config: Config, mesh: jax.sharding.Mesh, teacher: Teacher | None, processes: Processes
) -> Config:
    """The options with what backward keeps, by the memory of this process's devices; of CPUs, which do not
    say how much they have, `full`. Of GPUs a line says what was chosen.

    Raises:
      UserError: other processes came to something else.
    """
    if config.train.remat != "auto":
        return config
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return replaced(config, "train.remat", "full")
    room = limit // 10**9 * 10**9  # so that GPUs that differ by a little come to the same
    beside = teacher.place(mesh).bytes_per_device() if teacher else 0
    found, said = kept.chosen(config, mesh, make_layout(config, mesh), room, beside)
    if processes.index == 0:
        print(said)
    processes.agree("remat", {"config.train.remat": found.train.remat})
    return found
