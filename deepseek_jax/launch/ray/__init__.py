"""`python -m deepseek_jax.launch ray`: a run on a Ray cluster, one worker a host. Needs the extra `ray`.

In: options and the command of train.py. Out: its exit code, or the `Outcome` of `fit`. Read worker.py
first, which starts train.py on a host and tells Ray what it does. options.py reads the command line,
job.py says what a worker runs and when it is started again, process.py is train.py on a host, link.py its
way to the command, storage.py knows the folder of the run; driver.py and cluster.py talk to Ray from
outside. Ray is imported inside functions of worker.py, driver.py and cluster.py only.
"""

from deepseek_jax.launch.ray.driver import RunFailed, fit
from deepseek_jax.launch.ray.job import Outcome

__all__ = ["Outcome", "RunFailed", "fit"]
