"""A job written down for a cluster: files for SLURM, Kubernetes (JobSet), KubeRay (RayJob) and ssh.

In: a `Job`, from flags (command.py), from code, or from an sbatch file for another trainer
(`from_script`). Out: the text of a file that is ready to submit. Imports no JAX.

Read job.py first, then write.py with the *.jinja files beside it. sbatch.py reads the file of
another trainer; variables.py says what environment variables do here.
"""

from deepseek_jax.launch.template.job import KINDS, Job
from deepseek_jax.launch.template.sbatch import Script, from_script
from deepseek_jax.launch.template.write import write

__all__ = ["KINDS", "Job", "Script", "from_script", "write"]
