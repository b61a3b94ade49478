"""Import and export of a Hugging Face checkpoint beside a plain copy of its bytes.

  python -m benchmarks hf_copy [--gigabytes=4] [--turns=1] [--folder=DIR] [--json]

Writes a random checkpoint in bfloat16 (qwen3_moe's, a tensor an expert), then copies, imports and
exports it, in turns. All read from the disk, as the system's cache of the files is dropped before,
and have written to the disk when their time ends (fsync of every file). The export is that of the
imported folder; in another dtype (float16, as many bytes) it goes through the model's arrays, as
that of a trained model does. Each runs in a process of its own, whose memory at its peak is that
above what it held before; the start of Python and JAX does not count.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.durability.checkpoint import memory
from benchmarks.support.report import Parser, machine, report
from deepseek_jax.cli import arguments
from deepseek_jax.errors import UserError
from deepseek_jax.hf import __main__ as commands
from deepseek_jax.hf import configuration, names, writer
from deepseek_jax.hf.tensors import dump
from deepseek_jax.inference.loaded import config_for
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.run import importer
from deepseek_jax.tensorfile import files, regions
from deepseek_jax.tensorfile.arrays import TensorSpec

NAMES = ("copy", "import", "export", "cast")
BAR = 3.0  # times the copy
LAYER = dict(
    hidden_size=1024,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    num_experts=32,
    moe_intermediate_size=512,
    vocab_size=32000,
)
TOY = dict(
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    moe_intermediate_size=32,
    vocab_size=256,
)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="Of the checkpoint.")
    parser.add_argument("--turns", type=int, default=1, help="How often all are timed.")
    parser.add_argument(
        "--folder",
        type=arguments.path,
        help="Where to write three times as much (default: a temporary folder).",
    )
    parser.add_argument("--part", nargs=3, metavar=("NAME", "FROM", "TO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(timed(*args.part)))
        return 0
    if not 0 < args.gigabytes < 1e4 or args.turns < 1:
        raise UserError(
            f"--gigabytes={args.gigabytes} must be above 0, --turns={args.turns} at least 1."
        )
    if args.folder:
        os.makedirs(args.folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(args.gigabytes, args.turns, folder)
    report(args, result, text)
    return 0


def measure(gigabytes: float, count: int, folder: str, run: Any = None) -> dict[str, Any]:
    """Seconds and memory of all, and their ratios. run: `timed` in this process, or by default in another."""
    run = run or _in_a_process
    source, at = os.path.join(folder, "source"), lambda name: os.path.join(folder, name)
    size = make(source, gigabytes * 1e9)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for _ in range(count):
        for name, start in zip(NAMES, (source, source, at("import"), at("import")), strict=True):
            _forget(start)
            rows[name].append(run(name, start, at(name)))
            if name != "import":
                shutil.rmtree(at(name))
        shutil.rmtree(at("import"))
    out: dict[str, Any] = {"bytes": size, "bar": BAR, **machine()}
    for name, of in rows.items():
        out[name] = {key: statistics.median(r[key] for r in of) for key in of[0]} | {
            "turns": [r["seconds"] for r in of]
        }
        out[name]["ratio"] = statistics.median(
            r["seconds"] / c["seconds"] for r, c in zip(of, rows["copy"], strict=True)
        )
    return out | {"met": max(out[name]["ratio"] for name in NAMES) < BAR}


def make(folder: str, size: float) -> int:
    """Writes a random checkpoint of about this size. Returns its bytes."""
    widths = LAYER if size > 3e8 else TOY
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1024,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "intermediate_size": 2048,
        "torch_dtype": "bfloat16",
        **widths,
    }

    def shapes_of(layers: int) -> dict[str, Any]:
        model = configuration.to_model({**config, "num_hidden_layers": layers})
        run, _ = config_for(model, None)
        _, params, bias = abstract_model(run)
        leaves = [
            leaf for state in (params, bias) for leaf in names.leaves(state, "qwen3_moe", model)
        ]
        shapes = {n: shape for leaf in leaves for n, shape in names.tensors(leaf).items()}
        bfloat16 = np.dtype("bfloat16")
        return {n: TensorSpec(shapes[n], bfloat16) for n in sorted(shapes, key=names.order)}

    one = shapes_of(1)
    layer, rest = (
        sum(s.nbytes for n, s in one.items() if n.startswith("model.layers.") == wanted)
        for wanted in (True, False)
    )
    layers = max(1, round((size - rest) / layer))
    shapes = shapes_of(layers)
    os.makedirs(folder)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        f.write(dump({**config, "num_hidden_layers": layers}))
    places = writer.lay_out(folder, shapes, 1_000_000_000)
    block = (np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02).astype(
        "bfloat16"
    )
    opened = {p.file: os.open(os.path.join(folder, p.file), os.O_WRONLY) for p in places.values()}
    for i, (name, shape) in enumerate(shapes.items()):
        numbers = np.resize(
            np.roll(block, 64 * i) if shape.nbytes > 1 << 20 else block, shape.shape
        ).astype(shape.dtype)
        place = places[name]
        files.write_at(opened[place.file])(regions.raw(numbers), place.offset)
    for descriptor in opened.values():
        os.fsync(descriptor)
        os.close(descriptor)
    return sum(s.nbytes for s in shapes.values())


def timed(name: str, source: str, target: str) -> dict[str, float]:
    """Does one of them in this process and measures it."""
    before = memory(reset=True)
    started, used = time.perf_counter(), time.process_time()
    run = {
        "copy": _copy,
        "import": importer.import_,
        "export": commands.export,
        "cast": lambda source, target: commands.export(source, target, dtype="float16"),
    }
    run[name](source, target)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "peak_bytes": memory() - before,
    }


def _in_a_process(*part: str) -> dict[str, float]:
    child = [sys.executable, "-m", "benchmarks", "hf_copy", "--part", *part]
    return json.loads(
        subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    )


def _copy(source: str, target: str) -> None:
    os.makedirs(target)
    for name in sorted(os.listdir(source)):
        with open(
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name)), "rb"
        ) as f:
            os.fsync(f.fileno())


def _forget(folder: str) -> None:
    """Drops what the system has cached of the files in a folder, where it can be asked to."""
    for here, _, found in os.walk(folder):
        for name in found if hasattr(os, "posix_fadvise") else ():
            with open(os.path.join(here, name), "rb") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def text(r: dict[str, Any]) -> str:
    lines = [
        f"{r['bytes'] / 1e9:.3g} GB in bfloat16, {r['cores']} cores",
        "          seconds   of a core   GB/s   times the copy   memory",
    ]
    for name in NAMES:
        p = r[name]
        lines.append(
            f"{name:8s} {p['seconds']:8.1f} {p['cpu_seconds']:11.1f} "
            f"{r['bytes'] / 1e9 / p['seconds']:6.2f} {p['ratio']:16.2f} "
            f"{p['peak_bytes'] / 1e6:6.0f} MB"
        )
    return "\n".join([*lines, f"bar {r['bar']:g} times: {'met' if r['met'] else 'MISSED'}"])
