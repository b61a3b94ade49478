"""Train a DeepSeek-family mixture-of-experts language model.

  python train.py --config=configs/tiny.py --workdir=runs/tiny
  python train.py --config=configs/v3.py --workdir=DIR --config.mesh.expert=8
  python train.py --config=configs/post/sft.py --config.init_from=MODEL --config.data.path=chats.jsonl \\
    --workdir=runs/sft

The config is a Python file; any option can be overridden as --config.section.key=value. --help lists
them all, --print_config shows them resolved. The same command run again resumes from the newest
checkpoint in the workdir. Several processes: python -m deepseek_jax.launch --nproc_per_node=2
train.py ... starts them; under SLURM, Open MPI, Kubernetes and torchrun they find each other;
elsewhere run the same command on each host with --coordinator_address, --num_processes and
--process_id. The exit codes are at the end of --help.

From Python: deepseek_jax.run.train(config, workdir) goes through the same stages.
"""

from deepseek_jax.cli import terminal
from deepseek_jax.cluster.signals import Stopper
from deepseek_jax.runtime.huge_pages import use_huge_pages

if __name__ == "__main__":  # before the imports below, which take seconds
    use_huge_pages()  # starts this program again, once
    terminal.set_up("log")
    stopper = Stopper("train.py").install()  # a signal during the imports ends in one line too

import json
import sys

from deepseek_jax import objectives
from deepseek_jax.cli.command import exit_code
from deepseek_jax.cluster import gpus
from deepseek_jax.errors import ExitCode, UserError, exit_codes
from deepseek_jax.run import commandline
from deepseek_jax.run.job import Job
from deepseek_jax.run.processes import ending_together
from deepseek_jax.train.state import make_layout
from deepseek_jax.train.step import make_train_step


def main(argv: list[str], stopper: Stopper | None = None) -> int:
    """Trains as the command line says, and returns the exit code."""
    # ---- 1 Options ------------------------------------------------------------------------------
    # A config file and overrides of its options. A mistake is one line and exit code 2, before
    # anything is compiled; several processes, which are found here but not joined, say it once.
    processes = commandline.find_cluster(argv)
    with ending_together(processes):
        flags = commandline.parse(argv)
        if flags.help:
            print(f"{__doc__}\n{commandline.help_text(flags)}\n\nExit codes:\n{exit_codes()}")
            return ExitCode.DONE
        config = commandline.read_config(flags)
        if flags.print_config:
            print(json.dumps(config.to_json(), indent=2))
            return ExitCode.DONE
        if not flags.workdir:
            raise UserError(
                "--workdir is missing. Name the folder of this run, for instance --workdir=runs/tiny."
            )

        # ---- 2 Processes ------------------------------------------------------------------------
        # They compare their options, divide the GPUs and start JAX together. From here on they
        # watch each other, and a signal to one of them stops all after the same step (cluster/).
        gpus.take_memory(processes.together)
        options = commandline.options(config, flags)
        processes.join(options, config.watchdog.heartbeat_timeout, stopper or Stopper())

        with Job(config, flags.workdir, processes, stopper) as job:
            # ---- 3 Mesh and data ----------------------------------------------------------------
            # The devices, as a grid with named axes (parallel/mesh.py); documents packed into
            # sequences, or examples into rows, in an order that is a pure function of the seed
            # (data/open.py). What can be wrong with options, workdir or data is found here, and
            # where train.epochs says how often they are read, the steps that this takes.
            mesh, config = job.open()

            # ---- 4 What is learnt ---------------------------------------------------------------
            # The objective: the fields of a batch, the loss of the model's output that is minimised
            # and what is measured on held-out data. Pretraining: cross-entropy of the next tokens,
            # multi-token prediction. Fine-tuning: of the scored tokens of examples. Distillation:
            # with the divergence from a teacher, whose weights lie on the same mesh (objectives/).
            objective = objectives.make(config, job.teacher)
            frozen = objective.frozen(mesh)

            # What follows is done once, or for each stage of config.distill.stages, which differ in
            # the weights that learn (run/stages.py).
            for stage_config in job.stages():
                # ---- 5 Model and state ----------------------------------------------------------
                # The model's parameters (model/transformer.py) and the optimizer's moments, as
                # shapes laid out over the mesh; nothing is allocated yet. Their numbers come from
                # the first of these that there is: the newest good checkpoint of this run,
                # config.init_from, a checkpoint imported into the workdir, random numbers
                # (run/start.py).
                model = make_layout(stage_config, mesh, frozen)
                start = job.find_start(model, objective)

                # ---- 6 Step ---------------------------------------------------------------------
                # One program, (state, batch, frozen) -> (state, metrics): forward pass, loss, its
                # gradients summed over micro-batches and clipped, the optimizer's update of the
                # parameters, the bias that balances experts (train/step.py). It compiles while the
                # state is read.
                step = job.compile(make_train_step(stage_config, model, objective), start)

                # ---- 7 Loop ---------------------------------------------------------------------
                # Batches in, metrics out; evaluation, checkpoints, signals, bad numbers
                # (run/loop.py).
                result = job.loop(step, start)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(exit_code("train.py", lambda: main(sys.argv, stopper), "log"))
