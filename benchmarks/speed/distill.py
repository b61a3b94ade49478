"""What a teacher costs: a step of distillation beside the student's own step and the teacher's forward
pass, and a step that reads a cached teacher beside one of cross-entropy.

  python -m benchmarks distill [--shape=small] [--turns=7] [--top-k=64] [--steps=24] [--no-cache]
                               [--dtype=float32] [--remat=none] [--json]

The teacher has a shape of benchmarks/support/shapes.py, the student half of its experts; weights are
random. First, in one process: the student's step by cross-entropy, the teacher's forward pass with the
log-sum-exp of its logits, and the step of distillation with the full vocabulary and with the K
likeliest words, in turns. Ratios are medians over the turns; the bar is 1.1. Then whole runs of
train.py, in turns too: cross-entropy, and distillation from a cache that was made before. Their step
times are those of the loop, with reading, checking and copying of each batch; beside them stands how
fast the cache alone is read.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import ROOT
from benchmarks.learning.stages import metrics
from benchmarks.support import shapes, turns
from benchmarks.support.report import Parser, report
from deepseek_jax import objectives
from deepseek_jax.cli import texts
from deepseek_jax.config.options import Config, DistillConfig, ModelConfig
from deepseek_jax.data.fields import OF_TEACHER
from deepseek_jax.distill import manifest, reader
from deepseek_jax.distill.program import RecordProgram
from deepseek_jax.hf import configuration
from deepseek_jax.model import head, logit_functions
from deepseek_jax.objectives.base import Frozen
from deepseek_jax.objectives.forward import run_frozen
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan import topology
from deepseek_jax.run import teacher as teachers
from deepseek_jax.train.batch import put_batch
from deepseek_jax.train.state import init_state

BAR = 1.1  # times the student's step and the teacher's forward pass
SKIPPED = 4  # steps of a run, at its beginning


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--shape",
        choices=shapes.NAMES,
        default="small",
        help=f"Of the teacher: {', '.join(shapes.NAMES)}.",
    )
    parser.add_argument("--turns", type=int, default=7, help="Of each program.")
    parser.add_argument("--top-k", type=int, default=64, help="Words of a record.")
    parser.add_argument("--steps", type=int, default=24, help="Of a run of train.py.")
    parser.add_argument("--no-cache", action="store_true", help="Leave the runs out.")
    parser.add_argument("--dtype", default="float32", help="Compute dtype.")
    parser.add_argument("--remat", default="none", help="config.train.remat.")
    own = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        result = {
            "shape": own.shape,
            "dtype": own.dtype,
            "remat": own.remat,
            "top_k": own.top_k,
            "bar": BAR,
            "rows": online(own, folder),
            "cache": None if own.no_cache else cached(own, folder),
        }
    report(own, result, text)
    return 0


def student_of(own: argparse.Namespace) -> Config:
    """The options of the student by cross-entropy: half of the teacher's experts."""
    config = shapes.config(own.shape, own.dtype, own.remat)
    m = config.model
    groups: dict[str, Any] = {}
    if m.n_group > 1:
        groups = {"n_group": m.n_group // 2, "topk_group": m.topk_group // 2}
    model = dataclasses.replace(m, n_routed_experts=m.n_routed_experts // 2, **groups)
    return dataclasses.replace(config, model=model)


# ----------------------------------------------------------------------------------- in one process


def online(own: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Seconds of each program, and of a step of distillation in terms of its parts."""
    whole, student = shapes.config(own.shape, own.dtype, own.remat), student_of(own)
    (folder / "shapes").mkdir()
    keys = configuration.from_model(whole.model, "deepseek_v3")
    (folder / "shapes" / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    rows = shapes.batches(student, 1)[0]
    mesh = make_mesh(student, jax.devices()[:1])
    with jax.set_mesh(mesh):
        batch = put_batch(rows, student.micro_batch, mesh)
        distilled, listed = (
            dataclasses.replace(
                student,
                objective="distill",
                distill=DistillConfig(
                    teacher=str(folder / "shapes"), teacher_dtype=own.dtype, top_k=k
                ),
            )
            for k in (0, own.top_k)
        )
        teacher = teachers.planned(distilled)
        assert teacher is not None
        frozen = objectives.make(distilled, teacher).frozen(mesh)
        assert frozen is not None
        weights = random_weights(frozen)
        forward = turns.compiled(functools.partial(forward_pass, frozen), weights, batch)
        record = RecordProgram(
            frozen, own.top_k, whole.model.vocab_size, student.train.sequence_length, mesh
        )
        recorded = functools.partial(record.of_batch, weights, batch, (1.0, 2.0))
        fields = {name: batch[name] for name in batch} | dict(recorded())
        plain = Step(student, mesh, batch)
        full = Step(distilled, mesh, batch, weights)
        top = Step(listed, mesh, {n: a for n, a in fields.items() if n in batch or n in OF_TEACHER})

        def both() -> None:
            recorded()
            top()

        times = turns.seconds(
            {"student": plain, "teacher": forward, "full": full, "record": both}, own.turns
        )
    names = {"full vocabulary": "full", f"top_k={own.top_k}": "record"}
    return {
        name: {
            "seconds": statistics.median(times[key]),
            "student": statistics.median(times["student"]),
            "teacher": statistics.median(times["teacher"]),
            "times": (
                ratio := statistics.median(
                    t / (s + f)
                    for t, s, f in zip(times[key], times["student"], times["teacher"], strict=True)
                )
            ),
            "met": ratio <= BAR,
        }
        for name, key in names.items()
    }


class Step:
    """A train step that is called again and again; its state moves on, as it is donated."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, batch: Any, *frozen: Any):
        _, layout = topology.lay_out(config, list(mesh.devices.flat))
        self._step = topology.compile_step(config, mesh, layout).compiled
        self._given = (batch, *frozen)
        self._state = init_state(config, layout)

    def __call__(self) -> None:
        self._state, metrics = self._step(self._state, *self._given)
        jax.block_until_ready((self._state, metrics))


def random_weights(frozen: Frozen) -> Any:
    """Of a size that routing is not degenerate with."""
    wanted = frozen.model.abstract_sharded()
    leaves, tree = jax.tree.flatten(wanted)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [
        jax.device_put((0.05 * jax.random.normal(k, a.shape)).astype(a.dtype), a.sharding)
        for k, a in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, made)


def forward_pass(frozen: Frozen, weights: Any, batch: Any) -> jax.Array:
    """The teacher's cross-entropy: hidden states, and logits a chunk of tokens at a time."""

    def one(micro: Any) -> jax.Array:
        found = run_frozen(frozen, weights, micro)
        return head.scan_vocab_sum(
            logit_functions.cross_entropy, found.out.hidden_BSD, found.head, micro["targets"]
        )[0]

    return jnp.sum(jax.lax.map(one, batch))


# --------------------------------------------------------------------------------------- whole runs


def cached(own: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Step times of runs by cross-entropy and from a cache, in turns, and the speed of reading alone."""
    teacher, cache = folder / "teacher", folder / "cache"
    whole, student = shapes.config(own.shape, own.dtype, own.remat), student_of(own)
    text_file = folder / "text.txt"
    tokens = (own.steps + 1) * student.train.batch_size * student.train.sequence_length
    source = (ROOT / "deepseek_jax" / "hf" / "reader.py").read_text(encoding="utf-8")
    text_file.write_text((source * (tokens // len(source) + 2))[: tokens + tokens // 8])
    command(["train.py", *flags(whole, text_file, 2), f"--workdir={teacher}"])
    given = flags(student, text_file, own.steps)
    command(
        [
            *["-m", "deepseek_jax.distill", "cache", f"--teacher={teacher}", f"--out={cache}"],
            *[f"--top-k={own.top_k}", *given],
        ]
    )
    of_cache = [f"--config.distill.cache={cache}", "--config.objective=distill"]
    runs: dict[str, list[float]] = {"plain": [], "cached": []}
    for turn in range(3):
        for name, more in (("plain", []), ("cached", of_cache)):
            workdir = folder / f"{name}{turn}"
            command(["train.py", *given, *more, f"--workdir={workdir}"])
            rows = [r["step_time_s"] for r in metrics(workdir) if "step_time_s" in r]
            runs[name].append(statistics.median(rows[SKIPPED:]))
    of_step = student.train.batch_size * student.train.sequence_length
    rate = reading(cache, own.top_k)
    return {
        "plain_seconds": statistics.median(runs["plain"]),
        "seconds": statistics.median(runs["cached"]),
        "times": statistics.median(
            c / p for c, p in zip(runs["cached"], runs["plain"], strict=True)
        ),
        "bytes_per_token": rate["bytes_per_token"],
        "read_bytes_per_second": rate["bytes_per_second"],
        "used_bytes_per_second": of_step
        * rate["bytes_per_token"]
        / statistics.median(runs["cached"]),
    }


def reading(cache: pathlib.Path, top: int) -> dict[str, float]:
    """How fast the records are read, their checksums compared and their numbers unpacked."""
    of = manifest.read(str(cache), "--out")
    found = reader.CachedTeacher(str(cache), of, top, (1.0, 2.0))
    started = time.perf_counter()
    for row in range(of.rows):
        found.row(row)
    seconds = time.perf_counter() - started
    return {
        "bytes_per_second": of.rows * of.row_bytes / seconds,
        "bytes_per_token": of.row_bytes / of.length,
    }


def flags(config: Config, path: pathlib.Path, steps: int) -> list[str]:
    """Of train.py, for these options on this text."""
    model = [  # all that have a value: the file's own must not show through
        f"--config.model.{field.name}={value}"
        for field in dataclasses.fields(ModelConfig)
        if isinstance(value := getattr(config.model, field.name), (int, float, str))
    ]
    t = config.train
    given = {
        "data.path": path,
        "data.eval_fraction": 0,
        "train.steps": steps,
        "train.batch_size": t.batch_size,
        "train.sequence_length": t.sequence_length,
        "train.dtype": t.dtype,
        "train.remat": t.remat,
        "log.every_steps": 1,
        "log.trackers": "",
    }
    options = [f"--config.{name}={value}" for name, value in given.items()]
    return ["--config=configs/tiny.py", *model, *options]


def command(words: list[str]) -> None:
    """Runs a program of the repository; what it says is kept from stdout, where the result goes."""
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=sys.stderr)


def text(r: dict[str, Any]) -> str:
    lines = [f"{r['shape']}, {r['dtype']}, remat {r['remat']}: student with half of the experts"]
    for name, row in r["rows"].items():
        lines.append(
            f"  {name}: {row['seconds']:.3f} s a step; student {row['student']:.3f} s + teacher "
            f"{row['teacher']:.3f} s: {row['times']:.2f} times, bar {r['bar']:g}: "
            f"{'met' if row['met'] else 'MISSED'}"
        )
    if c := r["cache"]:
        lines.append(
            f"  from a cache: {c['seconds']:.3f} s a step of a run, by cross-entropy "
            f"{c['plain_seconds']:.3f} s: {c['times']:.2f} times; "
            f"{c['bytes_per_token']:.0f} bytes per token, "
            f"{texts.gb(c['used_bytes_per_second'])} per second used, "
            f"{texts.gb(c['read_bytes_per_second'])} per second when nothing else is done"
        )
    return "\n".join(lines)
