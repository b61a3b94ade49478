"""What one GPU reaches, within eight minutes, the most valuable first; useful if it is cut at any moment.

  make gpu-bench EXTRAS=cuda12                or, where JAX has a GPU:
  python -m benchmarks gpu_bench [--toy] [--out=FOLDER]

versions   of what is installed, the card, its memory, cuDNN and whether its attention works
tiny       a small model's train step: its losses, whether they are the same, bit for bit, when it starts
           again, and those of the CPU beside them
train      DeepSeek-V2-Lite with as many layers as the card's memory is known to hold, bfloat16, 4 sequences
           of 4,096 Zipf tokens: tokens/s, share of 989 TFLOP/s, tokens/s that the whole model would have at
           that rate. One document per sequence with cuDNN, which compiles fastest, and its largest costs by
           the profile; then packed documents; then the same with balanced routing
peer       transformers' DeepseekV2 in PyTorch, the same layers and tokens on the same card (if torch with
           CUDA is installed)
attention  the fused kernels, cuDNN and blocks against plain softmax at query width 192, value width 128, in
           rows of one document and of eight
experts    the grouped product in bfloat16 at V2-Lite's and V3's shapes: dense, equal slots, the kernels that
           train, tokamax and Pallas where installed, ragged_dot

Each result is a line of JSON on stdout at once, and in FOLDER (benchmarks/results/gpu_bench), where
results.json, results.jsonl and results.md are written anew after each. FOLDER/cache keeps compiled programs
and what XLA's autotuner found, for the next time; FOLDER/autotune.txt has the latter for compilers without a
GPU. Parts run in processes of their own, each with a limit of time.

--toy does all of it at toy size, on a CPU in seconds; it is the default where there is no GPU, and then
nothing is written unless --out is given. Needs jax, flax and optax, not the trainer's other dependencies.
"""

import importlib.util
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import ROOT
from benchmarks.gpu import tables as gpu_tables
from deepseek_jax.cli import arguments
from deepseek_jax.cluster import gpus
from deepseek_jax.plan import options

OUT = ROOT / "benchmarks" / "results" / "gpu_bench"
# Of every part; what one does not need, the next may. Together below eight minutes.
SECONDS = {"versions": 30, "tiny": 60, "train": 220, "peer": 60, "attention": 55, "experts": 50}
BARS = {"tokens_per_s_of_the_whole_model": 24_000, "times_of_the_peer": 2.0}

Row = dict[str, Any]


def main() -> int:
    parser = options.Parser(__doc__)
    parser.add_argument("--toy", action="store_true", help="Toy size, in this process.")
    parser.add_argument(
        "--out",
        type=arguments.path,
        help="Folder for the results; benchmarks/results/gpu_bench if it is no toy.",
    )
    parser.add_argument(
        "--part",
        choices=[p for p in SECONDS if p != "peer"],
        help="One part: what this program calls itself with.",
    )
    own = parser.parse_args()
    if own.part:
        for row in part(own.part, own.toy, own.out and pathlib.Path(own.out)):
            print(json.dumps(row), flush=True)
        return 0
    toy = own.toy or not has_gpu()
    out = pathlib.Path(own.out or OUT).absolute() if own.out or not toy else None
    signal.signal(
        signal.SIGTERM, lambda number, _: sys.exit(128 + number)
    )  # the part that runs is ended too
    rows: list[Row] = []
    for row in run(toy, out):
        print(json.dumps(row), flush=True)
        rows.append(row)
        if out:
            write(rows, out)
    if not own.json:
        print(gpu_tables.text(rows, bars(rows)), file=sys.stderr)
    return 0


def has_gpu() -> bool:
    """Whether JAX has a GPU here. It is not asked itself: one that has asked holds the card's memory."""
    return any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)) and bool(
        gpus.visible_gpus()
    )


def part(name: str, toy: bool, out: pathlib.Path | None) -> Iterator[Row]:
    """The results of one part, in this process. `out`: where a compiler keeps what it found."""
    from benchmarks.gpu import (
        parts as gpu_parts,  # imports JAX, which the process that starts the parts must not
    )

    for row in gpu_parts.PARTS[name](toy, out):
        yield {"part": name, **row}


def run(
    toy: bool, out: pathlib.Path | None, names: tuple[str, ...] = tuple(SECONDS)
) -> Iterator[Row]:
    """All parts: the toy's in this process, others each in its own."""
    until = time.perf_counter()
    trained: Row = {}
    for name in names:
        until += SECONDS[name]
        seconds = max(1.0, until - time.perf_counter())
        if name == "peer":
            if "layers" not in trained:
                yield {"part": name, "failed": "no training to compare with"}
                continue
            command = [
                "-m",
                "benchmarks.gpu.peer",
                *(str(trained[k]) for k in ("layers", "batch_size", "sequence_length")),
                *(["--toy"] if toy else []),
            ]
            yield from ({"part": name, **row} for row in lines_of(name, command, seconds, out))
        elif toy:
            for row in part(name, toy, None):
                trained = trained or (row if name == "train" and "tokens_per_s" in row else {})
                yield row
        else:
            given = [
                "-m",
                "benchmarks",
                "gpu_bench",
                f"--part={name}",
                *([f"--out={out}"] if out else []),
            ]
            for row in lines_of(name, given, seconds, out):
                trained = trained or (row if name == "train" and "tokens_per_s" in row else {})
                yield {"part": name, **row}


def environment(out: pathlib.Path | None) -> dict[str, str]:
    """Of a part: most of the card's memory, and a folder for compiled programs, in which JAX keeps the
    autotuner's findings too."""
    mine = dict(os.environ)
    gpus.take_memory(False, mine)
    if out:
        mine.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "cache"))
    return mine


def lines_of(
    name: str, command: list[str], seconds: float, out: pathlib.Path | None = None
) -> Iterator[Row]:
    """The JSON objects that a Python program prints, one per line, as they come; at last why it failed or
    was ended, if so. What it says on stderr is kept in FOLDER/NAME.log."""
    deadline = time.monotonic() + seconds
    lines: queue.Queue[str | None] = queue.Queue()
    if out:
        out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{name}.log", "w+b") if out else tempfile.TemporaryFile() as errors:
        p = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=ROOT,
            env=environment(out),
            start_new_session=True,
        )

        def read() -> None:
            assert p.stdout is not None  # a pipe
            for line in p.stdout:
                lines.put(line.decode(errors="replace"))
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
                if line.startswith("{"):
                    yield json.loads(line)
            if p.wait(timeout=max(0.0, deadline - time.monotonic())):
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                yield {"failed": said[-1][:300] if said else f"exit code {p.returncode}"}
        except (queue.Empty, subprocess.TimeoutExpired):
            yield {"failed": f"took more than {seconds:.0f} s"}
        except json.JSONDecodeError as e:
            yield {"failed": f"printed no JSON: {e}"}
        finally:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
                p.wait()


def bars(rows: list[Row]) -> Row:
    """What was to be reached, and what was; empty for the toy."""
    runs = [r for r in rows if r["part"] == "train" and "tokens_per_s_of_the_whole_model" in r]
    if not runs or runs[0]["toy"]:
        return {}
    reached = {
        "tokens_per_s_of_the_whole_model": max(r["tokens_per_s_of_the_whole_model"] for r in runs)
    }
    peer = next(
        (r["tokens_per_s"] for r in rows if r["part"] == "peer" and "tokens_per_s" in r), None
    )
    if peer:
        reached["times_of_the_peer"] = runs[0]["tokens_per_s"] / peer
    return {k: {"bar": BARS[k], "reached": v, "met": v >= BARS[k]} for k, v in reached.items()}


def write(rows: list[Row], out: pathlib.Path) -> None:
    """All results so far; each file is whole at every moment."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "results.jsonl": "".join(json.dumps(r) + "\n" for r in rows),
        "results.md": gpu_tables.text(rows, bars(rows)),
        "results.json": json.dumps({"results": rows, "bars": bars(rows)}, indent=2) + "\n",
    }
    for name, text in texts.items():
        temporary = out / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out / name)
