"""The loop of a run around a compiled step, without what else a job has: text, evaluation."""

from collections.abc import Callable

import jax

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import Config
from deepseek_jax.model.count import Count
from deepseek_jax.run.batches import LoaderBatches
from deepseek_jax.run.loop import Loop
from deepseek_jax.run.progress import Progress
from deepseek_jax.run.report import Report
from deepseek_jax.run.trackers.every import Trackers
from deepseek_jax.train.state import TrainState


def no_evaluation(state, watchdog) -> dict:
    return {}


def make_loop(
    config: Config,
    workdir: str,
    mesh: jax.sharding.Mesh,
    step: Callable,
    source,
    checkpoints: Checkpointer,
    begins: tuple[TrainState, Progress],
    **more,
) -> Loop:
    """A loop over rows of `source.train_rows`, for `run(*begins)`."""
    state, progress = begins
    done = int(state.step)
    count = Count(total=1, active=1, mtp=0, flops_per_token=1.0)
    return Loop(
        config=config,
        workdir=workdir,
        step=step,
        batches=LoaderBatches(config, source, mesh),
        evaluate=no_evaluation,
        checkpointer=checkpoints,
        report=Report(config, Trackers(workdir, config, done), done, progress.tokens_seen, count),
        **more,
    )
