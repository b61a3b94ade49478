"""Watch a run in the terminal: loss, speed, memory, how its experts are loaded, where its processes are.

  python -m deepseek_jax.top runs/tiny
  python -m deepseek_jax.top runs/tiny --interval=10     # seconds between looks
  python -m deepseek_jax.top runs/tiny --once            # look once and print it

It only reads files of the folder (metrics.jsonl, expert_load.npy, processes/), from any host that sees it,
while the run goes on or afterwards. Ctrl-C ends it, and not the run. Where stdout is no terminal it looks
once.
"""

import argparse
import sys
import time

from rich.console import Console
from rich.live import Live

from deepseek_jax.cli import arguments
from deepseek_jax.cli.command import exit_code
from deepseek_jax.report.run_files import RunFiles
from deepseek_jax.top import view


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns its exit code."""
    return exit_code("top", lambda: _run(_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    console = Console()
    files = RunFiles(args.workdir)
    if args.once or not console.is_terminal:
        console.print(view.draw(files.look(), console.width, None))
        return 0
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(view.draw(files.look(), console.width, console.height), refresh=True)
                time.sleep(args.interval)
    except KeyboardInterrupt:
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(prog="python -m deepseek_jax.top", description=__doc__)
    parser.add_argument(
        "workdir", type=arguments.path, metavar="WORKDIR", help="folder of the run (--workdir)"
    )
    parser.add_argument(
        "--interval",
        type=arguments.number(above=0),
        default=2.0,
        metavar="SECONDS",
        help="between two looks (default 2)",
    )
    parser.add_argument("--once", action="store_true", help="look once, print it and end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
