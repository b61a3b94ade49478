"""Looks at, checks and converts checkpoints, without the run's config and with little memory.

  python -m deepseek_jax.checkpoint ls DIR
      what is there: step, kind, bytes, mesh, and whether names and sizes fit
  python -m deepseek_jax.checkpoint show DIR [--step=N]
      one checkpoint: how it was saved, and its arrays
  python -m deepseek_jax.checkpoint verify DIR [--step=N]
      reads every byte of one, or of all, and compares checksums
  python -m deepseek_jax.checkpoint export DIR OUT [--step=N] [--only=params]
      whole tensors in safetensors files with an index, into the new folder OUT
  python -m deepseek_jax.checkpoint reshard DIR OUT --kind=sharded|full [--shards=N] [--step=N]
      the same checkpoint in another kind or division, as OUT/STEP
  python -m deepseek_jax.checkpoint diff DIR DIR2 [--step=N] [--step2=N] [--most=10]
      the first arrays that differ, and by how much at most

DIR is a run's workdir, its folder of checkpoints or one STEP folder, here or remote (gs://, s3://); of local
checkpoints, the folder of the run below checkpoint.local_dir, in which the folders of all its processes must
lie. Without --step, show, export, reshard and diff take the newest. Every command but `ls` reads all files
once to check them. --json prints JSON.

Exit codes: 0 good, or the same; 1 damaged, or different; 2 a mistake, said in one line.
"""

import json
import sys

import jax

from deepseek_jax.checkpoint import commands
from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.errors import UserError


def main() -> int:
    parser = arguments.Parser(prog="python -m deepseek_jax.checkpoint", description=__doc__)
    commands_of = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("ls", "show", "verify", "export", "reshard", "diff"):
        p = commands_of.add_parser(name, description=__doc__)
        p.add_argument("dir", type=arguments.path, metavar="DIR")
        p.add_argument("--json", action="store_true", help="print JSON")
        if name != "ls":
            p.add_argument("--step", type=int, help="the checkpoint's step")
        if name in ("export", "reshard"):
            p.add_argument("out", type=arguments.path, metavar="OUT")
        if name == "export":
            p.add_argument(
                "--only", default="", help="the arrays below this name only, for instance params"
            )
        if name == "reshard":
            p.add_argument("--kind", choices=("sharded", "full"), required=True)
            p.add_argument(
                "--shards",
                type=int,
                default=1,
                help="pieces of an array, for as many devices to read at once (of kind sharded)",
            )
        if name == "diff":
            p.add_argument("dir2", type=arguments.path, metavar="DIR2")
            p.add_argument("--step2", type=int, help="the step in DIR2")
            p.add_argument(
                "--most", type=int, default=10, help="how many differing arrays to tell of"
            )
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # a GPU that somebody trains on is left alone
    try:
        code, result, lines = getattr(commands, args.command)(args)
    except OSError as e:
        raise UserError(f"{e.filename or args.dir}: {e.strerror or e}.") from e
    print(json.dumps(result, indent=2) if args.json else "\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(exit_code("checkpoint", main))
