"""Trains configs/tiny.py whole and compares its held-out loss with the one that its docstring states.

  python -m benchmarks tiny [--config.seed=1 ...]

Further options go to train.py. Exit code 1 if the loss is off.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

from benchmarks import ROOT


def main() -> int:
    if {"--help", "-h"} & set(sys.argv):
        print(__doc__)
        return 0
    expected, tolerance = stated((ROOT / "configs" / "tiny.py").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as workdir:
        subprocess.run(
            [
                sys.executable,
                "train.py",
                "--config=configs/tiny.py",
                f"--workdir={workdir}",
                *sys.argv[1:],
            ],
            cwd=ROOT,
            check=True,
        )
        rows = [
            json.loads(line)
            for line in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
        ]
    loss = [r["eval_loss"] for r in rows if "eval_loss" in r][-1]
    good = abs(loss - expected) <= tolerance
    print(
        f"held-out loss {loss:.4f}, expected {expected} within {tolerance}: "
        f"{'as stated' if good else 'NOT as stated'}"
    )
    return 0 if good else 1


def stated(text: str) -> tuple[float, float]:
    """The held-out loss that the text states, and its tolerance; lines may be broken and indented
    anywhere."""
    found = re.search(
        r"([\d.]+) nats (?:a|per) token = [\d.]+ bits (?:a|per) byte, within ([\d.]+) nats",
        " ".join(text.split()),
    )
    assert found, "configs/tiny.py states no held-out loss"
    return float(found[1]), float(found[2])
