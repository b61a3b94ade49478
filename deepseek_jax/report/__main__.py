"""Write the report of a run: one HTML file with its charts and tables, which any browser shows offline.

  python -m deepseek_jax.report runs/tiny                     # writes runs/tiny/report.html
  python -m deepseek_jax.report runs/tiny --out=tiny.html     # elsewhere
  python -m deepseek_jax.report runs/b runs/a                 # b, with the curves of a drawn over its own

Loss, learning rate, gradient norm, speed and memory; how the experts of each layer were loaded, as a map
over the run; spikes, skipped updates, rollbacks and restarts with the data that they concern; checkpoints;
the mesh and its processes; options and what is not at its default. Of several runs the first is shown whole.

It only reads files, while the run goes on or afterwards; a run writes its own report when it ends.
"""

import argparse
import os
import sys

from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.errors import UserError
from deepseek_jax.report import page
from deepseek_jax.run import metrics


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns its exit code."""
    return exit_code("report", lambda: _run(_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    workdirs = [args.workdir, *args.more]
    text = page.build(workdirs, metrics.METRICS)
    path = args.out or os.path.join(args.workdir, page.NAME)
    try:
        page.write(path, text)
    except OSError as e:
        raise UserError(
            f"{path} cannot be written ({e.strerror}). Name another file with --out=FILE."
        ) from e
    print(f"{path} ({len(text.encode()) / 1e6:.2f} MB)")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(prog="python -m deepseek_jax.report", description=__doc__)
    parser.add_argument(
        "workdir", type=arguments.path, metavar="WORKDIR", help="folder of the run (--workdir)"
    )
    parser.add_argument(
        "more",
        nargs="*",
        type=arguments.path,
        metavar="MORE",
        help="other runs, to compare it with",
    )
    parser.add_argument(
        "--out", type=arguments.path, metavar="FILE", help="the file (default WORKDIR/report.html)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
