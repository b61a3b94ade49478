"""What every benchmark does with its result: print it, as text or JSON, and keep it with --out=FILE."""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import ROOT
from deepseek_jax.cli import arguments
from deepseek_jax.plan import host, options


class Parser(options.Parser):
    """The flags of a benchmark: --json and --out besides its own.

    Args:
      about: The module's docstring.
    """

    def __init__(self, about: str | None) -> None:
        super().__init__(about)
        self.set_defaults(commit=commit())  # before the program runs: files may change meanwhile
        self.add_argument(
            "--out",
            type=arguments.path,
            metavar="FILE",
            help="Keep the result in this file too, as JSON with command, commit and machine.",
        )


def report(own: argparse.Namespace, result: Any, text: Callable[[Any], str]) -> None:
    """Prints a result and keeps it where the flags say so.

    Args:
      own: What a `Parser` has read.
      result: Plain values, as JSON has them.
      text: Makes the text for a person of it.
    """
    print(json.dumps(result, indent=2) if own.json else text(result))
    if own.out:
        kept = {"command": command(), "commit": own.commit, "machine": machine(), "result": result}
        out = pathlib.Path(own.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def command() -> str:
    """The command line of this process. Of a path outside the repository it has the name alone."""
    words = []
    for word in sys.argv[1:]:
        flag, equals, value = word.rpartition("=")
        if os.path.isabs(value):
            value = os.path.basename(value)
        if not flag.startswith("--out"):
            words.append(flag + equals + value)
    return " ".join(["python -m", sys.argv[0], *map(shlex.quote, words)])


def commit() -> str:
    """The commit that was measured, with "+" where files differ from it; "" outside a repository."""
    say = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(say, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {
        "cpu": host.cpu_name(),
        "cores": host.cores(),
        "python": sys.version.split()[0],
    }
    if jax := sys.modules.get("jax"):  # a benchmark that does not use it must not start it
        found |= {
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "jax": jax.__version__,
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        }
    return found
