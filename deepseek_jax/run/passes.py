"""From passes over the data to steps: where a run ends (config.train.epochs), and after which steps it saves
and evaluates (checkpoint.every_epochs, eval.every_epochs).
"""

import math
from fractions import Fraction

from deepseek_jax.config.options import Config, replaced
from deepseek_jax.config.rules import optimizer
from deepseek_jax.data.contents import Contents
from deepseek_jax.errors import UserError
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.history import History


def with_steps(config: Config, workdir: str, rows: int, contents: Contents) -> Config:
    """The options with config.train.steps, which stays as it is where it is above 0.

    Else it is the first step after which at least config.train.epochs x rows were read, in batches of the
    sizes that each start of the run had. The same options and data give the same number at every start.

    Args:
      config: of this start.
      workdir: of the run.
      rows: of one pass over the training data.
      contents: of the data.

    Raises:
      UserError: the data are others than those of the run's checkpoint, or the profile begins after the end,
        or the learning rate's last part is longer than the run.
    """
    if config.train.steps:
        return config
    wanted = rows_of(config.train.epochs, rows)
    steps = first_step_after(_history(config, workdir, contents), wanted)
    out = replaced(config, "train.steps", steps)
    optimizer.check_length(out)
    if config.profile.start > steps:
        raise UserError(
            f"config.profile.start={config.profile.start} is after the last step, {steps}, which "
            f"config.train.epochs={config.train.epochs} comes to. Lower it."
        )
    return out


def rows_of(passes: float, rows: int) -> int:
    """The least number of rows that are so many passes. 0.1 of them is a tenth."""
    return math.ceil(Fraction(repr(passes)) * rows)


def ends_pass(every: float, rows: int, history: History, step: int) -> bool:
    """Whether the last of `step` finished steps was the first to come to another multiple of `every` passes.

    A pure function of the options, the data and the step: a run that goes on has it where it would have been.

    Args:
      every: passes; 0: never.
      rows: of one pass over the training data.
      history: which rows each step reads.
    """
    if not every or not step:
        return False
    one, before = Fraction(repr(every)) * rows, history.first_row(step - 1)
    return (before + history.count(step - 1)) // one > before // one


def _history(config: Config, workdir: str, contents: Contents) -> History:
    """What steps read, this start's options included. By the newest checkpoint that can be read: which one is
    whole is known only when the state's shapes are.
    """
    step, extra = workdirs.newest(workdirs.checkpoints(workdir, config))
    history = History.of_json(extra.get("data", ()))
    return history.resumed(step, config, contents)


def first_step_after(history: History, rows: int, begin: int = 0) -> int:
    """The first step before which so many rows of the last order were read, after those of the first `begin`
    steps; at least one.
    """
    begun = max(begin, *(s.first_step for s in history.stretches if not s.first_row))
    rows += history.first_row(begun)
    low, high = begun, begun + 1
    while history.first_row(high) < rows:
        low, high = high, begun + 2 * (high - begun)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if history.first_row(middle) < rows else (low, middle)
    return high
