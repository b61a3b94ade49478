"""Train on a Ray cluster, by Ray Train's JaxTrainer: one worker a host, train.py in each.

  python -m deepseek_jax.launch ray --num_workers=2 --gpus_per_worker=8 --storage_path=/shared/runs \\
    train.py --config=configs/base.py --config.mesh.fsdp=-1
  python -m deepseek_jax.launch ray --num_workers=8 --min_workers=4 --gpus_per_worker=8 --max_failures=3 \\
    --storage_path=s3://bucket/runs --name=base train.py --config=configs/base.py

The run is in STORAGE_PATH/NAME/run, which is what --workdir is elsewhere; the same command goes on with it.
Ray places the workers, starts all of them again when one fails (--max_failures), with fewer hosts where
--min_workers allows it, and knows of the checkpoints, which stay where train.py writes them. A mistake
(exit code 2), bad numbers (3) and a stop by a signal are not tried again. When Ray takes a host away
(preemption), the run is saved and started again on others, as often as it happens.

SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGUSR1 and SIGUSR2 are passed on to train.py, which stops with a
checkpoint; a second SIGTERM or SIGINT ends it at once. The exit code is train.py's. The output of process
0 is left alone, lines of the others begin with their number; --ray_logs shows Ray's lines, too.

Variables whose names begin with JAX_, XLA_ and NCCL_ go to all processes with the values that they have
here; --env adds others. The project must be in the same folder on every host, or come with `ray job submit
--working-dir=.`. With s3:// the hosts need their own credentials (AWS_*, an instance's role) and the
extra `s3`. docs/ray.md has more.
"""

from deepseek_jax.launch.ray import driver, job, options


def main(argv: list[str]) -> int:
    """`python -m deepseek_jax.launch ray ARGV`."""
    given = options.parse(argv, __doc__)
    outcome = driver.run(given)
    how = job.explained(outcome.code, "")  # why, train.py has said itself
    newest = f"; the newest checkpoint is {outcome.checkpoint}" if outcome.checkpoint else ""
    driver.say(f"{how}{newest}.")
    return outcome.code
