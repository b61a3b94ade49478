"""Facts become options: batch, mesh, steps, schedule, checkpoints. One arithmetic for all tools."""

from deepseek_jax.migrate.migration import Migration


def settle(m: Migration) -> None:
    """Sets the options that follow from the facts, and refuses facts that no options can express."""
