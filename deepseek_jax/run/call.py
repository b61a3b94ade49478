"""Training as a call from Python: for a notebook, a test, another launcher."""

from ml_collections import ConfigDict

from deepseek_jax import objectives
from deepseek_jax.cluster.signals import Stopper
from deepseek_jax.config import paths
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import Config
from deepseek_jax.config.validation import validate
from deepseek_jax.run import init_from
from deepseek_jax.run.job import Job
from deepseek_jax.run.loop import Result
from deepseek_jax.run.processes import Processes, ending_together, here
from deepseek_jax.train.state import make_layout
from deepseek_jax.train.step import make_train_step


def train(
    config: Config | ConfigDict,
    workdir: str,
    *,
    processes: Processes | None = None,
    stopper: Stopper | None = None,
) -> Result:
    """Trains, or goes on with the run in a folder. The same as train.py, without its command line.

    It may be called from any thread, and again in the same process. It reads no arguments of the
    program and takes over no signals. All processes that jax.distributed has joined call it.

    Args:
      config: the options, as `configs/tiny.py` makes them.
      workdir: the folder of the run.
      processes: that take part; without, those that JAX knows of.
      stopper: says after which step to stop early; in the main thread `Stopper().install()` listens
        to signals. Several processes must stop after the same step.

    Returns:
      How the run ended. Its `state` stays on the devices as long as the result is kept.

    Raises:
      UserError: a mistake in options, data or workdir, before anything is compiled.
      BadNumbers: too many updates in a row were not finite.
      SaveFailed: the last checkpoint could not be written.
    """
    if isinstance(config, ConfigDict):
        config = from_config_dict(config)
    workdir = paths.expanded(workdir, "workdir")
    processes = processes or here()
    with ending_together(processes):
        config = init_from.with_what_is_known(paths.absolute_config(config), workdir)
        validate(config)
        with Job(config, workdir, processes, stopper) as job:
            mesh, config = job.open()
            objective = objectives.make(config, job.teacher)
            frozen = objective.frozen(mesh)
            for stage_config in job.stages():
                model = make_layout(stage_config, mesh, frozen)
                start = job.find_start(model, objective)
                step = job.compile(make_train_step(stage_config, model, objective), start)
                result = job.loop(step, start)
    return result
