"""deepseek-jax COMMAND ...: the commands of deepseek_jax, for where there is no checkout.

The same as `python train.py` and `python -m deepseek_jax.COMMAND`. Where --config names no file,
--config=tiny and --config=configs/tiny.py name a config that comes with the package.

  deepseek-jax train --config=tiny --workdir=runs/tiny
  deepseek-jax launch --nproc_per_node=2 -m deepseek_jax.cli train --config=tiny --workdir=runs/two
"""

import runpy
import sys

from deepseek_jax import __version__
from deepseek_jax.cli import packaged
from deepseek_jax.cli.command import exit_code
from deepseek_jax.errors import ExitCode, UserError

# What each is, and the module that `python -m` runs. They are imported when they are asked for.
COMMANDS = {
    "train": ("train a model, or go on with a run", "train.py"),
    "generate": ("text from a checkpoint or a run", "deepseek_jax.generate"),
    "evaluate": ("perplexity and multiple choice", "deepseek_jax.evaluate"),
    "top": ("watch a run in the terminal", "deepseek_jax.top"),
    "report": ("a run as one HTML file: charts, experts, events", "deepseek_jax.report"),
    "plan": ("whether a run fits, and what it communicates", "deepseek_jax.plan"),
    "migrate": ("a config from the files of another trainer", "deepseek_jax.migrate"),
    "launch": ("start the processes of a run", "deepseek_jax.launch"),
    "hf": ("Hugging Face checkpoints in and out", "deepseek_jax.hf"),
    "data": ("prepare and show training data", "deepseek_jax.data"),
    "compress": ("prune, merge and narrow experts, drop layers", "deepseek_jax.compress"),
    "esft": ("find the experts that a task uses", "deepseek_jax.esft"),
    "distill": ("keep a teacher's logits for training", "deepseek_jax.distill"),
    "checkpoint": ("list, verify, convert checkpoints", "deepseek_jax.checkpoint"),
}


def main() -> int:
    """The command line's command, as if it had been called itself."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        return exit_code("deepseek-jax", lambda: _without_command(name))
    _, module = COMMANDS[name]
    sys.argv = [f"deepseek-jax {name}", *packaged.with_config_file(sys.argv[2:])]
    if module == "train.py":
        runpy.run_path(packaged.train_py(), run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return ExitCode.DONE  # of a program that does not leave by sys.exit


def _without_command(name: str) -> int:
    if name == "--version":
        print(__version__)
        return ExitCode.DONE
    if name in ("", "-h", "--help", "help"):
        lines = [f"  {command:<12}{text}" for command, (text, _) in COMMANDS.items()]
        print("\n".join([__doc__, "Commands (each has --help):", *lines]))
        return ExitCode.DONE if name else ExitCode.MISTAKE
    raise UserError(f"{name!r} is not a command. Commands: {', '.join(COMMANDS)}.")


if __name__ == "__main__":
    sys.exit(main())
