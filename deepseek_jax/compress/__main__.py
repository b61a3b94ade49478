"""Compress a mixture of experts: score, prune, merge, drop layers, narrow experts.

  python -m deepseek_jax.compress score MODEL OUT.safetensors --text=FILE --tokens=1M
  python -m deepseek_jax.compress prune MODEL OUT --method=reap --experts=32 --text=FILE
  python -m deepseek_jax.compress merge MODEL OUT --method=hc-smoe --experts=32 --text=FILE
  python -m deepseek_jax.compress layers MODEL OUT --drop=4 --text=FILE
  python -m deepseek_jax.compress width MODEL OUT --moe-intermediate=512 --text=FILE
  python -m deepseek_jax.compress shared-core MODEL OUT --rank=64
  python -m deepseek_jax.compress multiply-out MODEL OUT
  python -m deepseek_jax.compress upcycle MODEL OUT --experts=8 --experts-per-token=2

MODEL is a checkpoint of Hugging Face or the folder of a run. OUT is a Hugging Face folder that transformers
loads, with compression.json beside the weights: what was done, which layers and experts are left, and the
error of each layer's output. It gets its name when it is whole.

Exit codes: 0 done; 2 a mistake, said in one line.
"""

if __name__ == "__main__":
    from deepseek_jax.runtime.huge_pages import use_huge_pages

    use_huge_pages()  # before all other work: it starts the program again

import sys
from collections.abc import Sequence
from types import ModuleType

from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.compress import (
    layers,
    merge,
    multiply_out,
    prune,
    score,
    shared_core,
    upcycle,
    width,
)
from deepseek_jax.config.options import CompileConfig
from deepseek_jax.runtime import compile_cache

# A subcommand is a module: its docstring is the help, `add_options(parser)` its options after MODEL and OUT,
# `run(args) -> None` does the work.
COMMANDS: dict[str, ModuleType] = {
    "score": score,
    "prune": prune,
    "merge": merge,
    "layers": layers,
    "width": width,
    "shared-core": shared_core,
    "multiply-out": multiply_out,
    "upcycle": upcycle,
}


def parser() -> arguments.Parser:
    top = arguments.Parser(prog="python -m deepseek_jax.compress", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = str(module.__doc__)
        one = commands.add_parser(name, description=text, help=text.splitlines()[0].rstrip("."))
        one.add_argument(
            "model", type=arguments.path, metavar="MODEL", help="folder with the model"
        )
        one.add_argument("out", type=arguments.path, metavar="OUT", help="what is written")
        one.add_argument(
            "--step", type=arguments.whole(0), help="checkpoint of a run (default: the newest)"
        )
        module.add_options(one)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    compile_cache.use_cache(
        CompileConfig().cache_dir, warn=lambda line: print(line, file=sys.stderr)
    )
    COMMANDS[args.command].run(args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("compress", main))
