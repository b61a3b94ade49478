"""Start a program in several processes on this host, as torchrun does.

  python -m deepseek_jax.launch --nproc_per_node=2 train.py --config=configs/tiny.py --workdir=runs/two
  python -m deepseek_jax.launch --nproc_per_node=2 -m some.module ARGUMENTS
  python -m deepseek_jax.launch --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=host0 train.py ...
  python -m deepseek_jax.launch --nproc_per_node=4 --max_restarts=10 --min_processes=2 train.py ...
  python -m deepseek_jax.launch template slurm|jobset|rayjob|ssh ...     # a file that starts it on a cluster
  python -m deepseek_jax.launch ray --num_workers=2 --gpus_per_worker=8 --storage_path=... train.py ...

One process drives all GPUs of its host, so one per host is the usual number; several are for hosts
whose GPUs belong to different sockets, and for trying several hosts out on one. Each process gets
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which train.py understands (another
program passes them to jax.distributed.initialize), and its own part of the visible GPUs. Without
GPUs each has JAX_NUM_CPU_DEVICES devices.

The output of process 0 is left alone; lines of the others begin with their number. SIGTERM, SIGINT (Ctrl-C),
SIGHUP, SIGUSR1 and SIGUSR2 are passed on to all, and train.py stops with a checkpoint; a second SIGTERM or
SIGINT kills. When a process fails, the others get SIGTERM, and SIGKILL after --grace seconds. The exit code
is that of the first that failed, 128 + N for signal N. If the launcher is killed, so are its processes (on
Linux).

--max_restarts starts all of them again, and train.py goes on from the newest checkpoint; not after
a mistake (exit code 2), bad numbers (3) or a stop by one of these signals. The delay before it
doubles from 1 s to 60 s while starts fail within 10 minutes. With --min_processes a process that
fails first twice in a row is given up, with its GPUs, and the others go on if their devices fit the
mesh (an axis of -1 takes what is left). When the lost place is mended, SIGUSR2 to the launcher
stops them after a checkpoint and starts all again; with --min_processes it does nothing else. With
several hosts every launcher restarts its own processes, all of them, and they meet again at
--master_addr.

Processes of one host share a secret that the launcher makes, so that nobody else can join them. The
launchers of several hosts have none in common: export the same DEEPSEEK_JAX_TOKEN on each, or keep
strangers from their ports.
"""

import importlib
import os
import sys

from deepseek_jax.cli.command import exit_code
from deepseek_jax.launch.launcher import Launcher
from deepseek_jax.launch.options import environments, parse
from deepseek_jax.launch.restarts import Restarts

# Other ways to start a run, by first argument: modules with main(argv), imported when asked for.
SUBCOMMANDS = {
    "ray": "deepseek_jax.launch.ray.command",
    "template": "deepseek_jax.launch.template.command",
}


def main(argv: list[str]) -> int:
    if argv and argv[0] in SUBCOMMANDS:
        return importlib.import_module(SUBCOMMANDS[argv[0]]).main(argv[1:])
    options = parse(argv, __doc__)
    environments(options, os.environ)  # what is wrong with GPUs is said before anything starts
    count = options.nproc_per_node
    restarts = Restarts(count, options.min_processes or count, options.max_restarts)
    module = ["-m"] if options.module else []
    return Launcher(
        [sys.executable, "-u", *module, options.program, *options.arguments],
        lambda places: environments(options, os.environ, places),
        options.grace,
        restarts,
    ).run()


if __name__ == "__main__":
    sys.exit(exit_code("deepseek_jax.launch", lambda: main(sys.argv[1:])))
