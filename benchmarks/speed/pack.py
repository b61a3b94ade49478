"""Packing tokenised chats into rows, beside trl.pack_dataset.

  python -m benchmarks pack [--examples=100000] [--tokens=200] [--length=2048] [--turns=3] [--json]

Random examples, about --tokens long each (log-normal), lie on the disk tokenised, as each library keeps
them: our raw arrays, an Arrow file of `datasets`. Timed is what a start of training does with them. Ours:
open them with their checksums, count what is scored, pack. Theirs: open, trl.pack_dataset, which writes the
packed rows to another file. Then every row is made once, as training reads it. Both pack by best fit
decreasing, and it is an error if the rows differ.

Each runs in a process of its own. Memory is the most that is held besides mapped files (RssAnon), above what
the process held before; the files take as much as they need and the system has to spare.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.support.report import Parser, machine, report
from deepseek_jax.cli import texts
from deepseek_jax.config.options import Config, DataConfig, SftConfig, TrainConfig
from deepseek_jax.data import example_choice
from deepseek_jax.data.example_files import ExampleWriter, Facts, open_kept
from deepseek_jax.data.example_packing import ExampleRows
from deepseek_jax.errors import UserError

BAR = 20.0  # seconds
VOCABULARY = 1 << 16
OURS, THEIRS = "ours", "trl"


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--examples", type=int, default=100_000, help="How many.")
    parser.add_argument("--tokens", type=int, default=200, help="Of an example, on average.")
    parser.add_argument("--length", type=int, default=2048, help="Tokens of a row.")
    parser.add_argument("--turns", type=int, default=3, help="How often both are timed.")
    parser.add_argument(
        "--part", nargs=3, metavar=("NAME", "FOLDER", "LENGTH"), help=argparse.SUPPRESS
    )
    own = parser.parse_args()
    if own.part:
        name, folder, length = own.part
        print(json.dumps(timed(name, folder, int(length))))
        return 0
    if min(own.examples, own.tokens, own.length, own.turns) < 1:
        raise UserError("--examples, --tokens, --length and --turns must be at least 1.")
    with tempfile.TemporaryDirectory() as folder:
        report(own, measure(own.examples, own.tokens, own.length, own.turns, folder), text)
    return 0


def measure(examples: int, tokens: int, length: int, turns: int, folder: str) -> dict[str, Any]:
    """Median seconds and memory of both."""
    kept = make(examples, tokens, folder)
    rows: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
    for _ in range(turns):
        for name, measured in rows.items():
            measured.append(_in_a_process(name, folder, length))
    same = {one["sha256"] for of in rows.values() for one in of}
    if len(same) != 1:
        raise ValueError(f"the rows differ: {rows}")
    figures = ("pack_s", "pack_cpu_s", "pack_bytes", "rows_s")
    out = {
        name: {key: statistics.median(one[key] for one in of) for key in figures}
        for name, of in rows.items()
    }
    first = rows[OURS][0]
    return {
        "machine": machine(),
        "examples": examples,
        "tokens": kept,
        "length": length,
        "rows": first["rows"],
        "padding": 1 - first["tokens"] / (first["rows"] * length),
        **out,
        "bar": BAR,
        "met": out[OURS]["pack_s"] < BAR,
    }


def make(examples: int, tokens: int, folder: str) -> int:
    """Writes the same random examples for both. Returns their tokens."""
    import datasets  # slow, and only this benchmark needs it

    rng = np.random.default_rng(0)
    sigma = 0.7
    lengths = np.maximum(rng.lognormal(np.log(tokens) - sigma**2 / 2, sigma, examples), 2).astype(
        int
    )
    ids = [rng.integers(0, VOCABULARY, n, np.int32) for n in lengths]
    with ExampleWriter(os.path.join(folder, OURS), VOCABULARY) as writer:
        for start in range(0, examples, 1_000):
            some = ids[start : start + 1_000]
            writer.write([(one, np.arange(len(one)) % 2) for one in some])
        writer.end_source()
        writer.finish(Facts())
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(os.path.join(folder, THEIRS))
    return int(lengths.sum())


def timed(name: str, folder: str, length: int) -> dict[str, Any]:
    """Packs in this process, and makes every row."""
    pack = {OURS: _ours, THEIRS: _trl}[name](os.path.join(folder, name), length)
    with _Memory() as memory:
        started, used = time.perf_counter(), time.process_time()
        rows, row = pack()
        pack_s, pack_cpu_s = time.perf_counter() - started, time.process_time() - used
    out = {"pack_s": pack_s, "pack_cpu_s": pack_cpu_s, "pack_bytes": memory.peak, "rows": rows}
    started = time.perf_counter()
    for i in range(rows):
        row(i)
    out["rows_s"] = time.perf_counter() - started
    return out | _compared(rows, row)


def _compared(rows: int, row: Callable[[int], np.ndarray]) -> dict[str, Any]:
    digest, tokens = hashlib.sha256(), 0
    for i in range(rows):
        ids = np.asarray(row(i), np.int32)
        digest.update(ids.tobytes())
        tokens += len(ids)
    return {"sha256": digest.hexdigest(), "tokens": tokens}


Rows = tuple[int, Callable[[int], np.ndarray]]  # how many, and the tokens of one


def _ours(stem: str, length: int) -> Callable[[], Rows]:
    config = Config(
        objective="sft",
        data=DataConfig(eval_fraction=0.0),
        train=TrainConfig(sequence_length=length),
        sft=SftConfig(),
    )

    def pack() -> Rows:
        examples = open_kept(stem)
        if examples is None:
            raise ValueError("the examples that were written cannot be read")
        choice = example_choice.choose(examples, config, {0})
        numbers = choice.numbers(held_out=False)
        rows = ExampleRows(examples, numbers, choice.kept[numbers], length, "bfd")

        def row(i: int) -> np.ndarray:
            made = rows.row(i)
            return made["tokens"][made["segment_ids"] > 0]

        return len(rows), row

    return pack


def _trl(folder: str, length: int) -> Callable[[], Rows]:
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()

    def pack() -> Rows:
        data = datasets.load_from_disk(folder)
        packed = pack_dataset(data, length, "bfd", {"load_from_cache_file": False})
        column = packed.with_format("numpy")
        return len(packed), lambda i: column[i]["input_ids"]

    return pack


class _Memory:
    """The most memory of this process besides files, above what it was, while the block runs."""

    def __enter__(self) -> "_Memory":
        self._before = _anonymous()
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, _anonymous() - self._before)
            if self._done.wait(0.005):
                return


def _anonymous() -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


def _in_a_process(name: str, folder: str, length: int) -> dict[str, Any]:
    child = [sys.executable, "-m", "benchmarks", "pack", "--part", name, folder, str(length)]
    done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def text(r: dict[str, Any]) -> str:
    """The table for a person."""
    lines = [["", "packed in", "of a core", "memory", "every row made in"]]
    for name in (OURS, THEIRS):
        p = r[name]
        lines.append(
            [
                name,
                *(f"{p[key]:.2f} s" for key in ("pack_s", "pack_cpu_s")),
                texts.gb(p["pack_bytes"]),
                f"{p['rows_s']:.2f} s",
            ]
        )
    said = "met" if r["met"] else "MISSED"
    return (
        f"{r['examples']:,} examples, {texts.human(r['tokens'])} tokens, {r['rows']:,} rows of {r['length']} "
        f"({r['padding']:.1%} padding), {r['machine']['cores']} cores\n\n{texts.table(lines)}\n\n"
        f"bar {r['bar']:g} s: {said}"
    )
