"""The time of a real train step, from rows of tokens to the updated state, and its share of what
this machine's matmuls reach.

  python -m benchmarks step [--shape=mid] [--steps=6] [--turns=3] [--dtype=float32] [--remat=dots]
                            [--peer=benchmarks/speed/hf_torch.py] [--json]

Shapes: benchmarks/support/shapes.py. Each turn is a process of its own: it compiles the step, makes
one step that does not count, times `steps` steps (with the copy of their rows to the device), and
then times square matmuls of the compute dtype: the best size is the peak. Model FLOPs per token: 6
per active matmul weight (embedding look-up, norms, router and recomputation not counted; the head
counted) plus causal attention, counted once: 3 * layers * heads * (query width + value width) *
sequence_length (deepseek_jax/model/count.py). With --peer, SCRIPT runs in turns with ours on the
same shape and tokens: transformers' DeepseekV3 in PyTorch (it needs torch and transformers, which the
extra `test` installs). Ratios are medians over the pairs of turns. They count only on an idle
machine, as PyTorch's threads spin while they wait: what other programs used meanwhile is said, and the
CPU is named, as a ratio is one of program and CPU.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ROOT
from benchmarks.support import shapes
from benchmarks.support.report import Parser, report
from deepseek_jax.cli import arguments
from deepseek_jax.errors import UserError
from deepseek_jax.hf import configuration
from deepseek_jax.model.count import count
from deepseek_jax.plan import host, topology
from deepseek_jax.train.batch import put_batch
from deepseek_jax.train.state import init_state

PEER_STEPS_BEFORE = 2  # that do not count: its second step is still slow


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--shape", choices=shapes.NAMES, default="mid", help=f"{', '.join(shapes.NAMES)}."
    )
    parser.add_argument("--steps", type=int, default=6, help="Steps to time, a turn.")
    parser.add_argument(
        "--turns",
        type=int,
        default=3,
        help="Processes, one after the other; with --peer pairs of them.",
    )
    parser.add_argument("--dtype", default="float32", help="Compute dtype.")
    parser.add_argument("--remat", default="dots", help="config.train.remat.")
    parser.add_argument(
        "--peer",
        type=arguments.path,
        metavar="SCRIPT",
        help="Timed in turns with ours: benchmarks/speed/hf_torch.py, or what takes its options.",
    )
    parser.add_argument("--once", action="store_true", help="One turn, in this process.")
    own = parser.parse_args()
    if own.once:
        print(json.dumps(measure(own.shape, own.steps, own.dtype, own.remat)))
        return 0
    if own.peer and not os.path.exists(own.peer):
        raise UserError(
            f"--peer={own.peer} does not exist. Name the script that times the other program."
        )
    turns: list[tuple[dict, dict | None]] = []
    others = host.Others()
    with tempfile.TemporaryDirectory() as scratch:
        theirs = peer_command(own, pathlib.Path(scratch)) if own.peer else None
        for turn in range(own.turns):
            print(f"turn {turn + 1} of {own.turns} ...", file=sys.stderr)
            again = [
                f"--{name}={getattr(own, name)}" for name in ("shape", "steps", "dtype", "remat")
            ]
            ours = run_json(["-m", "benchmarks", "step", "--once", *again])
            turns.append((ours, run_json(theirs) if theirs else None))
    result = summary(turns) | {"cpu": host.cpu_name(), "other_cores": others.cores()}
    report(own, result, text)
    return 0


def peer_command(own: argparse.Namespace, folder: pathlib.Path) -> list[str]:
    """Writes the model's config.json and the tokens into the folder; the command that trains on them."""
    config = shapes.config(own.shape)
    keys = configuration.from_model(config.model, "deepseek_v3")
    (folder / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    rows = shapes.batches(config, own.steps + PEER_STEPS_BEFORE)
    np.save(folder / "tokens.npy", np.stack([batch["tokens"] for batch in rows]))
    return [
        own.peer,
        f"--model_config={folder / 'config.json'}",
        f"--tokens={folder / 'tokens.npy'}",
        f"--warmup={PEER_STEPS_BEFORE}",
        f"--threads={os.cpu_count()}",
        f"--dtype={ {'float32': 'fp32', 'bfloat16': 'bf16'}[own.dtype] }",
    ]


def run_json(arguments: list[str], **environment: str) -> dict[str, Any]:
    """The JSON object that a Python program prints last."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(
            f"{' '.join(arguments)} failed: "
            f"{done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(shape: str, steps: int, dtype: str, remat: str) -> dict[str, Any]:
    """One turn, on one device."""
    config = shapes.config(shape, dtype, remat)
    mesh, layout = topology.lay_out(config, jax.devices()[:1])
    started = time.perf_counter()
    step = topology.compile_step(config, mesh, layout)
    compiled = time.perf_counter() - started
    seconds, cpu = [], []
    with jax.set_mesh(mesh):
        state = init_state(config, layout)
        for batch in shapes.batches(config, steps + 1):
            at, cpu_at = time.perf_counter(), time.process_time()
            state, metrics = jax.block_until_ready(
                step.compiled(state, put_batch(batch, config.micro_batch, mesh))
            )
            seconds.append(time.perf_counter() - at)
            cpu.append(time.process_time() - cpu_at)
    memory = max(
        (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    return {
        "shape": shape,
        "dtype": dtype,
        "remat": remat,
        "tokens": config.train.batch_size * config.train.sequence_length,
        "flops_per_token": count(
            config.model, layout.abstract.params, config.train.sequence_length
        ).flops_per_token,
        "seconds": seconds[1:],
        "cpu_seconds": cpu[1:],
        "loss": float(metrics.loss),
        "compile_seconds": compiled,
        "temporaries": step.compiled.memory_analysis().temp_size_in_bytes,
        "peak_memory": memory,
        "matmul_flops": matmul_peak(dtype),
    }


def matmul_peak(dtype: str) -> float:
    """FLOP/s of the best of a few square matmuls."""
    multiply = jax.jit(jnp.matmul)
    best = 0.0
    for size in (1024, 2048, 3072):
        a = jnp.ones((size, size), dtype)
        multiply(a, a).block_until_ready()
        for _ in range(5):
            started = time.perf_counter()
            multiply(a, a).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def summary(turns: list[tuple[dict, dict | None]]) -> dict[str, Any]:
    """The figures over all turns."""
    first = turns[0][0]
    tokens, seconds = first["tokens"], [s for ours, _ in turns for s in ours["seconds"]]
    median = statistics.median(seconds)
    peak = max(ours["matmul_flops"] for ours, _ in turns)
    flops = first["flops_per_token"] * tokens / median
    out = {
        key: first[key]
        for key in ("shape", "dtype", "remat", "tokens", "flops_per_token", "temporaries", "loss")
    }
    out |= {
        "tokens_per_second": tokens / median,
        "best_tokens_per_second": tokens / min(seconds),
        "flops": flops,
        "matmul_flops": peak,
        "share_of_matmul": flops / peak,
        "tokens_per_cpu_second": tokens
        / statistics.median([c for ours, _ in turns for c in ours["cpu_seconds"]]),
        "peak_memory": max(ours["peak_memory"] for ours, _ in turns),
        "compile_seconds": statistics.median(ours["compile_seconds"] for ours, _ in turns),
    }
    if peer := turns[0][1]:
        pairs = [
            {
                key: (statistics.median(ours[key]), statistics.median(theirs[key]))
                for key in ("seconds", "cpu_seconds")
            }
            for ours, theirs in turns
            if theirs
        ]
        seconds = [s for _, theirs in turns if theirs for s in theirs["seconds"]]
        their_median = statistics.median(seconds)
        out["peer"] = {
            "name": peer["peer"],
            "tokens_per_second": tokens / their_median,
            "share_of_matmul": first["flops_per_token"] * tokens / their_median / peak,
            "peak_memory": max(theirs["peak_memory"] for _, theirs in turns if theirs),
            "ratio": statistics.median(b / a for a, b in (p["seconds"] for p in pairs)),
            "ratio_by_cpu_seconds": statistics.median(
                b / a for a, b in (p["cpu_seconds"] for p in pairs)
            ),
            "losses": peer["losses"],
        }
    return out


def text(r: dict[str, Any]) -> str:
    lines = [
        f"{r['shape']}: {r['tokens']} tokens per step, {r['dtype']}, remat {r['remat']}",
        f"  {r['tokens_per_second']:,.0f} tokens/s (best {r['best_tokens_per_second']:,.0f}), "
        f"{r['tokens_per_cpu_second']:,.0f} per CPU second",
        f"  {r['flops_per_token'] / 1e6:.1f} MFLOP per token: {r['flops'] / 1e9:.0f} GFLOP/s, "
        f"{r['share_of_matmul']:.0%} of the "
        f"{r['matmul_flops'] / 1e9:.0f} that this machine's best matmul reached",
        f"  peak memory {r['peak_memory'] / 1e9:.2f} GB, of which temporaries "
        f"{r['temporaries'] / 1e9:.2f} GB; "
        f"compiled in {r['compile_seconds']:.1f} s",
    ]
    if p := r.get("peer"):
        lines += [
            f"{p['name']}: {p['tokens_per_second']:,.0f} tokens/s, {p['share_of_matmul']:.0%} of "
            f"that matmul, {p['peak_memory'] / 1e9:.2f} GB",
            f"  ours is {p['ratio']:.2f}x as fast, {p['ratio_by_cpu_seconds']:.2f}x by CPU "
            "seconds (medians over pairs of turns)",
        ]
    lines += [f"{r['cpu']}; {host.said(r['other_cores'])}"]
    return "\n".join(lines)
