"""Facts become options: devices, batch, steps, schedule. One arithmetic for all tools."""

from deepseek_jax.migrate.arithmetic import batch, devices, length, model, schedule, together
from deepseek_jax.migrate.migration import Migration


def settle(m: Migration) -> None:
    """Sets the options that follow from the facts, and refuses facts that no options can express.

    Raises:
      UserError: devices, batch or steps cannot be known, or do not fit together.
    """
    layout = devices.settle(m)
    batch.settle(m, layout)
    length.settle(m)
    schedule.settle(m)
    model.settle(m)
    m.set_told_options()
    together.settle(m)
