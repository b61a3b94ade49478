"""What asynchronous saves cost training, and what restoring takes.

  python -m benchmarks checkpoint [--shape=mid] [--every=20] [--turns=3] [--kind=sharded]
                                  [--folder=DIR] [--json]

Training steps are timed with one asynchronous save in every `every` of them and without any, in
turns; what is left of a save when its steps are over counts too. Then one save alone, the share of
it that checksums take, and, in a process of its own, the time of a check and of a restore, and the
memory of that process at its peak: above what it held before, as a share of the state that is
restored.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from benchmarks.support import shapes
from benchmarks.support.report import Parser, machine, report
from deepseek_jax import objectives
from deepseek_jax.checkpoint import manifest
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.checkpoint.kinds import KINDS
from deepseek_jax.cli import arguments
from deepseek_jax.cli.texts import gb
from deepseek_jax.config.options import CheckpointConfig
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.tensorfile.arrays import bytes_of
from deepseek_jax.train.batch import put_batch
from deepseek_jax.train.state import init_state, make_layout, to_tree
from deepseek_jax.train.step import make_train_step


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--shape", choices=shapes.NAMES, default="mid", help="Model of the state.")
    parser.add_argument("--every", type=int, default=20, help="Steps between saves.")
    parser.add_argument(
        "--turns",
        type=int,
        default=3,
        help="Intervals timed with a save and without (0: only the rest).",
    )
    parser.add_argument(
        "--kind", choices=tuple(KINDS), default="sharded", help="Of the checkpoints."
    )
    parser.add_argument(
        "--folder", type=arguments.path, help="Where to write (default: a temporary folder)."
    )
    parser.add_argument("--restore", type=arguments.path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.restore:
        print(json.dumps(restore(args.shape, args.restore, args.kind)))
        return 0
    if args.folder:
        os.makedirs(args.folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(args.shape, args.every, args.turns, args.kind, folder)
    report(args, result, text)
    return 0


def measure(shape: str, every: int, count: int, kind: str, folder: str) -> dict[str, Any]:
    """All figures of one shape and kind."""
    config = shapes.config(shape)
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        layout = make_layout(config, mesh)
        state = init_state(config, layout)
        size = bytes_of(to_tree(state))
        checkpoints = Checkpointer(
            os.path.join(folder, "checkpoints"), options=_options(kind, folder)
        )
        result = {"shape": shape, "kind": kind, "state_bytes": size, **machine()}
        if count:
            batch = put_batch(shapes.batches(config, 1)[0], config.micro_batch, mesh)
            step = jax.jit(
                make_train_step(config, layout, objectives.make(config)), donate_argnums=0
            )
            state, _ = jax.block_until_ready(step(state, batch))
            without: list[float] = []
            with_save: list[float] = []
            blocked: list[float] = []
            for _ in range(count):
                for saving, times in ((False, without), (True, with_save)):
                    started = time.perf_counter()
                    if saving:
                        checkpoints.save(int(state.step), to_tree(state), {})
                        blocked.append(time.perf_counter() - started)
                    for _ in range(every):
                        state, metrics = step(state, batch)
                    jax.block_until_ready((state, metrics))
                    checkpoints.wait()
                    times.append(time.perf_counter() - started)
            pairs = list(zip(without, with_save, strict=True))
            result |= {
                "every": every,
                "step_s": statistics.median(without) / every,
                "blocked_s": statistics.median(blocked),
                "overhead": statistics.median(b / a for a, b in pairs) - 1,
                "turns": [[a / every, b / every] for a, b in pairs],
            }
        alone, busy = [], []
        for i in range(3):
            started, used = time.perf_counter(), time.process_time()
            checkpoints.save(10**6 + i, to_tree(state), {})
            checkpoints.wait()
            alone.append(time.perf_counter() - started)
            busy.append(time.process_time() - used)
        checkpoints.close()
        del state
        assert checkpoints._target is not None  # it writes
        top = checkpoints._target.at(10**6 + 2)
        names = list(manifest.files_of(top))
        started = time.perf_counter()
        manifest.checksums(top, names)
        sums = time.perf_counter() - started
        written = sum(manifest.files_of(top).values())
        result |= {"save_alone_s": statistics.median(alone), "save_cpu_s": statistics.median(busy)}
        result |= {"checksum_s": sums, "written_bytes": written, "files": len(names)}
    child = [
        sys.executable,
        "-m",
        "benchmarks",
        "checkpoint",
        f"--shape={shape}",
        f"--kind={kind}",
        f"--restore={folder}",
    ]
    found = [
        json.loads(
            subprocess.run(child, check=True, capture_output=True, text=True).stdout.splitlines()[
                -1
            ]
        )
        for _ in range(3)
    ]
    return result | {name: statistics.median(f[name] for f in found) for name in found[0]}


def restore(shape: str, folder: str, kind: str) -> dict[str, float]:
    """Times and memory of this process."""
    config = shapes.config(shape)
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        layout = make_layout(config, mesh)
        jax.block_until_ready(jax.numpy.zeros(8) + 1)
        checkpoints = Checkpointer(
            os.path.join(folder, "checkpoints"),
            options=_options(kind, folder),
            read_only=kind != "local",
        )
        wanted = to_tree(layout.abstract_sharded())
        started = time.perf_counter()
        checkpoints.newest_good(wanted)
        checked = time.perf_counter() - started
        before = memory(reset=True)
        started = time.perf_counter()
        state, _ = jax.block_until_ready(checkpoints.restore(wanted))
        took = time.perf_counter() - started
        peak = memory()
    return {
        "verify_s": checked,
        "restore_s": took,
        "restore_peak_bytes": peak,
        "restore_memory": (peak - before) / bytes_of(state),
    }


def memory(reset: bool = False) -> int:
    """Peak memory of this process in bytes. `reset` starts the count again, which only Linux can."""
    if not os.path.exists("/proc/self/clear_refs"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    if reset:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


def _options(kind: str, folder: str) -> CheckpointConfig:
    return CheckpointConfig(
        kind=kind, keep=1, local_dir=os.path.join(folder, "local") if kind == "local" else ""
    )


def text(r: dict[str, Any]) -> str:
    lines = [
        f"{r['shape']}, kind {r['kind']}: a state of {gb(r['state_bytes'])} on {r['device']}, "
        f"{r['cores']} cores"
    ]
    if "overhead" in r:
        lines += [
            f"  {b * 1e3:9.0f} ms per step without, {a * 1e3:9.0f} with a save every {r['every']}   "
            f"{a / b - 1:+.1%}"
            for b, a in r["turns"]
        ]
        lines.append(
            f"training       {r['overhead']:+.1%} (median); the call itself takes {r['blocked_s']:.2f} s"
        )
    lines += [
        f"a save alone   {r['save_alone_s']:.2f} s, {r['save_cpu_s']:.2f} s of one core, for "
        f"{gb(r['written_bytes'])} in {r['files']} files; "
        f"checksums {r['checksum_s']:.2f} s, "
        f"{r['checksum_s'] / r['save_alone_s']:.0%}",
        f"check          {r['verify_s']:.2f} s",
        f"restore        {r['restore_s']:.2f} s, {r['restore_memory']:.2f} times the state's "
        "bytes above what the process had; "
        f"{gb(r['restore_peak_bytes'])} in all",
    ]
    return "\n".join(lines)
