"""Going through the stages of a run, each of which begins with the checkpoint of the one before."""

from typing import Any

import jax

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import Config, replaced
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.loader import Loader
from deepseek_jax.model.layout import abstract_model, place_model
from deepseek_jax.run import stages
from deepseek_jax.run.loop import Result
from deepseek_jax.train.state import to_tree


class StagedRun:
    """The stages of one start of a run, to be gone through in order.

    Attributes:
      config: the options of the run, with config.train.steps.
      lines: the stages as a table.
      stage: the one that is gone through.
      newest: step of the checkpoint that it goes on from; None without one.
    """

    stage: stages.Stage

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        checkpoints: Checkpointer,
        data: Loader | ExampleLoader,
    ):
        """Raises UserError: as stages.resolved, and where a stage names weights that are not there."""
        self._checkpoints = checkpoints
        # All that is wanted of a checkpoint for now: what the optimizer holds is another thing at the end
        # of a stage than at the beginning of the next.
        self._weights = to_tree(place_model(config, mesh).abstract_sharded())
        self.newest = checkpoints.newest_good(self._weights)
        extra = {} if self.newest is None else checkpoints.read_extra(self.newest)
        self._stages = stages.resolved(
            config, self.newest or 0, extra, data.num_train_rows, data.contents
        )
        self.config = replaced(config, "train.steps", self._stages[-1].last_step)
        self.lines = stages.lines(self._stages, abstract_model(config)[1])

    @property
    def begun(self) -> list[dict[str, Any]]:
        """What the checkpoints of the stage keep: it and those before it."""
        return [s.to_json() for s in self._stages[: self.stage.number]]

    def begin(self, before: Result | None) -> bool:
        """Goes on to the next stage, or to the first that is left. False: there is none, or a signal came.

        Args:
          before: of the stage before, in this process. The next one reads its own state: this one is
            given up, so that the devices hold one.
        """
        if before is not None:
            if before.stopped_by is not None or before.step >= self.config.train.steps:
                return False
            jax.tree.map(lambda a: a.delete(), before.state)
            self.newest = self._checkpoints.newest_good(self._weights)
        self.stage = stages.at(self._stages, self.newest or 0)
        return True
