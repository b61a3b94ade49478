"""The stages of a run (config.distill.stages): which weights learn in which steps.

A run with stages is one run: one workdir, one count of steps, data in one order that follows from the step.
What learns changes from one stage to the next, and so do the layout of the state, the step that is compiled
and the optimizer. Each stage has a schedule over its own steps, warmup and decay among them, and begins with
fresh moments: those of weights that have just begun to learn would need a correction of their own, and a
schedule that had decayed would leave them next to no learning rate. PyTorch users make a new optimizer at
this place, too.

The checkpoint at the end of a stage belongs to that stage, and the next one begins by reading it, in the
same process as after a kill: there is one way over a boundary. Checkpoints keep the stages so far, as they
were given; a later start may change those to come.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from flax import nnx

from deepseek_jax.cli.texts import human, table
from deepseek_jax.config import stages as given
from deepseek_jax.config.options import Config, replaced
from deepseek_jax.config.rules import optimizer
from deepseek_jax.config.stages import OPTION, StageOptions
from deepseek_jax.data.contents import Contents
from deepseek_jax.errors import UserError
from deepseek_jax.run import passes
from deepseek_jax.train import trainable
from deepseek_jax.train.history import History
from deepseek_jax.train.trainable import Multipliers


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
      number: from 1. count: how many there are.
      given: as it was written.
      first_step: steps that are done before it. last_step: those that are done after it.
      options: of the run, with what is the stage's own: weights, learning rate, steps of the schedule.
    """

    number: int
    count: int
    given: StageOptions
    first_step: int
    last_step: int
    options: Config

    @property
    def name(self) -> str:
        return self.given.name

    @property
    def title(self) -> str:
        """ "2 of 2, all"."""
        return f"{self.number} of {self.count}, {self.name}"

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step

    def multipliers(self, params: nnx.State) -> Multipliers:
        """Which weights learn, and how fast.

        Args:
          params: all parameters of the model, arrays or shapes.

        Raises:
          UserError: as trainable.multipliers, with the name of the stage.
        """
        with self.naming():
            return trainable.multipliers(self.options, params)

    def naming(self) -> AbstractContextManager[None]:
        """Mistakes inside are those of this stage."""
        return given.naming(given.title(self.number, self.given))

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return self.given.to_json() | {"last_step": self.last_step}


Stages = tuple[Stage, ...]


def resolved(
    config: Config, step: int, extra: Mapping[str, Any], rows: int, contents: Contents
) -> Stages:
    """The stages of a run with the steps that they come to; () of a run without.

    Those that are finished ended where the checkpoint says. The epochs of the others count from where they
    begin, in batches of the sizes that each start of the run had, as those of config.train.epochs.

    Args:
      config: of this start.
      step, extra: of the newest checkpoint, 0 and {} without one.
      rows: of one pass over the training data.
      contents: of the data.

    Raises:
      UserError: stages that have begun are others than those of the checkpoint; the data are others; the
        profile begins after the end; or a stage is shorter than config.optimizer.hold_steps.
    """
    wanted = given.of_config(config)
    done = extra.get("stages", [])
    check(wanted, done, step)
    if not wanted:
        return ()
    history = History.of_json(extra.get("data", ())).resumed(step, config, contents)
    ends = [0]
    for i, one in enumerate(wanted):
        begin = ends[-1]
        if i < len(done) and done[i]["last_step"] <= step:
            end = done[i]["last_step"]
        elif one.steps:
            end = begin + one.steps
        else:
            end = passes.first_step_after(history, passes.rows_of(one.epochs, rows), begin)
        if i < len(done) and begin < step < done[i]["last_step"] and end <= step:
            raise UserError(
                f"{given.title(i + 1, one)}: {one.length} end after step {end}, and the run is at step "
                f"{step}, inside this stage. Make it longer, or set it as it was."
            )
        ends.append(end)
    if config.profile.start > ends[-1]:
        raise UserError(
            f"config.profile.start={config.profile.start} is after the last step, {ends[-1]}, which the "
            f"stages of {OPTION} come to. Lower it."
        )
    found = with_steps(config, wanted, ends)
    for stage in found:
        optimizer.check_length(stage.options)
    return found


def planned(config: Config) -> Stages:
    """The stages without data: of epochs it is not known how many steps they are; 1 stands for these."""
    wanted = given.of_config(config)
    ends = [0]
    for one in wanted:
        ends.append(ends[-1] + (one.steps or 1))
    return with_steps(config, wanted, ends)


def with_steps(config: Config, wanted: Sequence[StageOptions], ends: Sequence[int]) -> Stages:
    """The stages with the steps after which they end; 0 comes first."""
    config = replaced(config, "train.steps", ends[-1])
    return tuple(
        Stage(
            i, len(wanted), one, ends[i - 1], ends[i], _options(config, one, ends[i] - ends[i - 1])
        )
        for i, one in enumerate(wanted, 1)
    )


def _options(config: Config, one: StageOptions, steps: int) -> Config:
    o = config.optimizer
    own = dataclasses.replace(
        o,
        lr_multipliers=one.lr_multipliers,
        learning_rate=one.learning_rate or o.learning_rate,
        schedule_steps=steps,
    )
    return dataclasses.replace(config, optimizer=own)


def check(wanted: Sequence[StageOptions], done: Sequence[Mapping[str, Any]], step: int) -> None:
    """Compares the stages that have begun with those of the checkpoint of a step.

    Of the one that the run is inside, the length and the learning rate may change, as a run's may.

    Raises:
      UserError: they differ.
    """
    if not step:
        return
    if wanted and not done:
        raise UserError(
            f"{OPTION} names stages, and the {step} steps of the run of --workdir had none. Name another "
            "--workdir, and begin with this run's weights (config.init_from)."
        )
    for number, before in enumerate(done, 1):
        finished = before["last_step"] <= step
        keys = StageOptions._fields if finished else ("name", "lr_multipliers")
        was = StageOptions(**{k: v for k, v in before.items() if k in StageOptions._fields})
        if number > len(wanted):
            raise UserError(
                f"{OPTION} has {len(wanted)} stages, and stage {number} ({was.name}) of the run of --workdir "
                f"has begun before step {step}. Set the stages up to it as they were: {_said(was)}."
            )
        now = wanted[number - 1]
        for key in keys:
            if getattr(was, key) != getattr(now, key):
                what = "is finished" if finished else "has begun"
                raise UserError(
                    f"{given.title(number, now)}: {key}={getattr(now, key)!r} differs from "
                    f"{getattr(was, key)!r} of the run of --workdir, in which this stage {what} (step "
                    f"{step}). Set it as it was: {_said(was)}. Stages after it may be changed."
                )


def _said(stage: StageOptions) -> str:
    return json.dumps(stage.to_json())


def at(stages: Stages, step: int) -> Stage:
    """The stage of the step after `step` finished ones; the last one of a run that is done."""
    return next((s for s in stages if step < s.last_step), stages[-1])


def lines(stages: Stages, params: nnx.State) -> list[str]:
    """The stages as a table, with the parameters that learn in each.

    Args:
      params: all parameters of the model, arrays or shapes.

    Raises:
      UserError: as Stage.multipliers.
    """
    rows = [
        ["stage", "steps", "length", "learning rate", "parameters that learn", "lr_multipliers"]
    ]
    for s in stages:
        learn, total = learning(s.multipliers(params), params)
        rows.append(
            [
                f"{s.number} {s.name}",
                f"{s.first_step + 1} to {s.last_step}",
                s.given.length,
                f"{s.options.optimizer.learning_rate:g}",
                f"{human(learn)} of {human(total)} ({learn / total:.1%})",
                s.given.lr_multipliers or "(all alike)",
            ]
        )
    return table(rows, right=False).splitlines()


def learning(multipliers: Multipliers, params: nnx.State) -> tuple[int, int]:
    """(parameters that learn, all of them)."""
    if multipliers.groups:
        total = sum(g.parameters for g in multipliers.groups)
        return sum(g.parameters for g in multipliers.groups if g.factor), total
    total = sum(v.get_value().size for _, v in nnx.to_flat_state(params))
    return total, total
