"""The time of fine-tuning on short chats, packed here and padded there: CPU seconds per scored token
beside TRL's SFTTrainer.

  python -m benchmarks sft [--shape=small] [--steps=6] [--turns=3] [--spread=0.8] [--dtype=float32]
                           [--remat=dots] [--peer=benchmarks/speed/trl_sft.py] [--threads=1] [--json]

The models are those of `python -m benchmarks step`: DeepSeek-V3 made small, with random weights. The
chats are random too: ids with their labels, a quarter of a row long on average, each a prompt and an
answer, of which the answer is scored. Lengths are log-normal; --spread is the standard deviation of
their logarithm. With 0.8, chats of many kinds, the mean is 1.4 times the median; one narrow task has
0.4 or less, and less is padded there. They go as pretokenised JSONL
through the data path of a run, packing `bfd`. Each turn is a process of its own, which compiles the
step, makes one that does not count and times `steps` of them, packing and copies to the device
included. With --peer, SCRIPT does the same number of chats per update, in micro-batches of as many
chats as a row has places, padded to their longest; it runs in turns with ours. Both are held to as
many cores as --threads says: one by default, where no thread waits for another and a CPU second is one of
work for both.
Ratios are medians over pairs of turns. Per scored token is what a user waits for; per computed
token, padding counted, leaves out what packing brings.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tokenizers

from benchmarks.speed.step import PEER_STEPS_BEFORE, run_json
from benchmarks.support import shapes
from benchmarks.support.report import Parser, report
from deepseek_jax import objectives
from deepseek_jax.cli import arguments, texts
from deepseek_jax.config.options import IGNORE, Config, SftConfig
from deepseek_jax.data.open import open_data
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.hf import configuration
from deepseek_jax.plan import topology
from deepseek_jax.train.batch import put_batch
from deepseek_jax.train.state import init_state

BAR = 2.0  # times the peer's speed, by CPU seconds per scored token
CHATS_PER_ROW = 4  # a chat's mean length is this share of a row
SCORED = 0.5  # of a chat, on average
CHATS, TOKENIZER = "chats.jsonl", "tokenizer.json"


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--shape", choices=shapes.NAMES, default="small", help=f"{', '.join(shapes.NAMES)}."
    )
    parser.add_argument("--steps", type=int, default=6, help="Steps to time, a turn.")
    parser.add_argument("--turns", type=int, default=3, help="Processes, or pairs with --peer.")
    parser.add_argument("--dtype", default="float32", help="Compute dtype.")
    parser.add_argument("--remat", default="dots", help="config.train.remat.")
    parser.add_argument(
        "--peer",
        type=arguments.path,
        metavar="SCRIPT",
        help="Timed in turns with ours: benchmarks/speed/trl_sft.py, or what takes its options.",
    )
    parser.add_argument("--spread", type=float, default=0.8, help="Of the chats' lengths.")
    parser.add_argument("--threads", type=int, default=1, help="Threads, and cores, of either.")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.once:
        print(json.dumps(measure(own, pathlib.Path(own.once))))
        return 0
    if own.peer and not os.path.exists(own.peer):
        raise UserError(
            f"--peer={own.peer} does not exist. Name the script that times the other program."
        )
    hold_to(own.threads)
    turns = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        write_inputs(own, folder)
        for turn in range(own.turns):
            print(f"turn {turn + 1} of {own.turns} ...", file=sys.stderr)
            again = [
                f"--{name}={getattr(own, name)}" for name in ("shape", "steps", "dtype", "remat")
            ]
            ours = run_json(["-m", "benchmarks", "sft", f"--once={folder}", *again])
            turns.append((ours, own.peer and run_json(peer_command(own, folder))))
    report(own, summary(own, turns), text)
    return 0


def hold_to(cores: int) -> None:
    """Keeps this process, and those that it starts, on so many cores, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def peer_command(own: argparse.Namespace, folder: pathlib.Path) -> list[str]:
    t = shapes.config(own.shape).train
    return [
        own.peer,
        f"--data={folder / CHATS}",
        f"--model_config={folder / 'config.json'}",
        f"--length={t.sequence_length}",
        f"--batch={t.batch_size}",
        f"--accumulation={CHATS_PER_ROW}",
        f"--steps={own.steps}",
        f"--warmup={PEER_STEPS_BEFORE}",
        f"--threads={own.threads}",
        f"--dtype={ {'float32': 'fp32', 'bfloat16': 'bf16'}[own.dtype] }",
    ]


# -------------------------------------------------------------------------------------------- chats


def write_inputs(own: argparse.Namespace, folder: pathlib.Path) -> None:
    """The chats, a tokenizer that has their ids, and the model's config.json."""
    config = shapes.config(own.shape)
    t, vocab = config.train, config.model.vocab_size
    count = (own.steps + PEER_STEPS_BEFORE + 1) * t.batch_size * CHATS_PER_ROW
    with open(folder / CHATS, "w", encoding="utf-8") as f:
        for ids, labels in chats(count, t.sequence_length, vocab, own.spread):
            f.write(json.dumps({"input_ids": ids.tolist(), "labels": labels.tolist()}) + "\n")
    words = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>")).save(
        str(folder / TOKENIZER)
    )
    keys = configuration.from_model(config.model, "deepseek_v3")
    (folder / "config.json").write_text(json.dumps(keys), encoding="utf-8")


def chats(
    count: int, length: int, vocab: int, spread: float, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random chats.

    Args:
      count: how many.
      length: of a row; a chat has a quarter of it on average, and all of it at most.
      vocab: ids are below it.
      spread: standard deviation of the logarithm of a length.

    Yields:
      (ids int64 [n], labels int64 [n]): the answer's ids, -100 in the prompt before it.
    """
    rng = np.random.default_rng(seed)
    center = np.log(length / CHATS_PER_ROW) - spread**2 / 2  # so that the mean is what it should be
    for _ in range(count):
        n = int(np.clip(np.exp(rng.normal(center, spread)), 8, length))
        ids = rng.integers(2, vocab, n)
        prompt = int(np.clip(n * rng.normal(1 - SCORED, 0.15), 1, n - 1))
        labels = np.where(np.arange(n) < prompt, -100, ids)
        yield ids, labels


# ----------------------------------------------------------------------------------------- one turn


def measure(own: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """One turn of ours, on one device."""
    config = config_of(own, folder)
    mesh, layout = topology.lay_out(config, jax.devices()[:1])
    fields = objectives.make(config).fields
    data = open_data(config, load_tokenizer(config.data.tokenizer), fields)
    started = time.perf_counter()
    step = topology.compile_step(config, mesh, layout)
    compiled = time.perf_counter() - started
    seconds, cpu, scored, losses = [], [], [], []
    b = config.train.batch_size
    with jax.set_mesh(mesh):
        state = init_state(config, layout)
        for n in range(own.steps + 1):
            at, cpu_at = time.perf_counter(), time.process_time()
            rows = data.train_rows(n * b, b)
            state, metrics = jax.block_until_ready(
                step.compiled(state, put_batch(rows, config.micro_batch, mesh))
            )
            seconds.append(time.perf_counter() - at)
            cpu.append(time.process_time() - cpu_at)
            scored.append(int((rows["targets"] != IGNORE).sum()))
            losses.append(float(metrics.loss))
    return {
        "seconds": seconds[1:],
        "cpu_seconds": cpu[1:],
        "scored": sum(scored[1:]),
        "computed": own.steps * b * config.train.sequence_length,
        "loss": statistics.mean(losses[1:]),
        "compile_seconds": compiled,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def config_of(own: argparse.Namespace, folder: pathlib.Path) -> Config:
    config = shapes.config(own.shape, own.dtype, own.remat)
    data = dataclasses.replace(
        config.data,
        path=str(folder / CHATS),
        tokenizer=str(folder / TOKENIZER),
        eval_fraction=0.0,
    )
    return dataclasses.replace(
        config, objective="sft", sft=SftConfig(format="tokenized"), data=data
    )


# ------------------------------------------------------------------------------------------ figures


def rates(turn: dict[str, Any]) -> dict[str, float]:
    """Tokens per CPU second and per second of a turn."""
    cpu, seconds = sum(turn["cpu_seconds"]), sum(turn["seconds"])
    return {
        "scored_per_cpu_second": turn["scored"] / cpu,
        "computed_per_cpu_second": turn["computed"] / cpu,
        "scored_per_second": turn["scored"] / seconds,
        "scored_share": turn["scored"] / turn["computed"],
        "peak_memory": turn["peak_memory"],
    }


def summary(own: argparse.Namespace, turns: list[tuple[dict, dict | None]]) -> dict[str, Any]:
    """Medians over the turns, and over pairs of turns for ratios."""

    def medians(rows: list[dict[str, float]]) -> dict[str, float]:
        return {key: statistics.median(r[key] for r in rows) for key in rows[0]}

    ours = [rates(turn) for turn, _ in turns]
    out: dict[str, Any] = {
        "shape": own.shape,
        "dtype": own.dtype,
        "remat": own.remat,
        "spread": own.spread,
        "ours": medians(ours),
    }
    theirs = [rates(turn) for _, turn in turns if turn]
    if theirs:
        first = turns[0][1] or {}
        out["peer"] = {"name": first["peer"], "threads": first["threads"], **medians(theirs)}
        ratios = [
            {key: a[key] / b[key] for key in a if key.endswith("second")}
            for a, b in zip(ours, theirs, strict=True)
        ]
        out["ratio"] = medians(ratios)
        out["met"] = out["ratio"]["scored_per_cpu_second"] >= BAR
    return out


def text(r: dict[str, Any]) -> str:
    def line(name: str, of: dict[str, Any]) -> str:
        return (
            f"{name}: {of['scored_per_cpu_second']:,.0f} scored tokens per CPU second "
            f"({of['scored_per_second']:,.0f} per second), {of['scored_share']:.0%} of those computed are "
            f"scored; {texts.gb(of['peak_memory'])}"
        )

    lines = [
        f"{r['shape']}, {r['dtype']}: chats of a quarter of a row, spread {r['spread']:g}",
        line("packed here", r["ours"]),
    ]
    if p := r.get("peer"):
        ratio = r["ratio"]
        lines += [
            line(f"padded by {p['name']}", p),
            f"ours is {ratio['scored_per_cpu_second']:.2f}x as fast by CPU seconds per scored token "
            f"({ratio['computed_per_cpu_second']:.2f}x per computed token, "
            f"{ratio['scored_per_second']:.2f}x by time); bar {BAR:g}x: {'met' if r['met'] else 'MISSED'}",
        ]
    return "\n".join(lines)
