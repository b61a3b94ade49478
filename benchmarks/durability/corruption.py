"""Damages every kind of file of every kind of checkpoint and counts what a restore makes of it.

  python -m benchmarks corruption [--rounds=20] [--seed=0] [--folder=DIR] [--json]

Three checkpoints of a small state are written of each kind. Then, again and again, a file of the
newest is truncated, deleted, zeroed, has one byte changed or is exchanged with another, at a random
place; the newest good checkpoint is restored and compared, bit for bit, with what was saved.
`rounds` is how often each fault meets each kind of file. Wrong results must be 0.
"""

import os
import shutil
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.support.report import Parser, report
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.checkpoint.kinds import KINDS
from deepseek_jax.cli import arguments, texts
from deepseek_jax.config.options import CheckpointConfig
from deepseek_jax.errors import UserError

COUNTS = ("tried", "detected", "survived", "steps_lost", "wrong")
STEPS = (1, 2, 3)


def run(folder: str, rounds: int, seed: int) -> dict[str, dict[str, int]]:
    """Damages files and restores, again and again.

    Returns, by fault and kind of checkpoint: tried; detected: reported, and the checkpoint set aside;
    survived: an earlier one was restored; steps_lost: the most that this cost; wrong: what came back was
    not what had been saved.

    Args:
      folder: where to work; it is empty again afterwards.
      rounds: tries of each fault on each kind of file.
      seed: of files and places.
    """
    rng = np.random.default_rng(seed)
    out: dict[str, dict[str, int]] = {}
    for kind in KINDS:
        template = os.path.join(folder, f"template-{kind}")
        want = save(template, kind)
        groups = file_kinds(template, kind)
        for fault in FAULTS:
            counts = out[f"{fault}, {kind}"] = dict.fromkeys(COUNTS, 0)
            for files in groups.values():
                for _ in range(rounds):
                    attempt(
                        template,
                        kind,
                        fault,
                        str(rng.choice(files)),
                        want,
                        rng,
                        os.path.join(folder, "try"),
                        counts,
                    )
        shutil.rmtree(template)
    return out


def attempt(
    template: str,
    kind: str,
    fault: str,
    file: str,
    want: dict[int, dict],
    rng: np.random.Generator,
    scratch: str,
    counts: dict[str, int],
) -> None:
    """Damages one file of the newest checkpoint of a copy, restores, and counts."""
    shutil.copytree(template, scratch)
    said: list[str] = []
    try:
        step = STEPS[-1]
        if not FAULTS[fault](os.path.join(steps_folder(scratch, kind), str(step)), file, rng):
            return
        counts["tried"] += 1
        checkpoints = Checkpointer(
            os.path.join(scratch, "checkpoints"),
            options=checkpoint_options(scratch, kind),
            warn=said.append,
        )
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_sharding(a.shape)),
            want[step],
        )
        try:
            state, extra = checkpoints.restore(abstract)
        except UserError:
            return
        finally:
            checkpoints.close()
        found = extra["step"]
        aside = os.path.isdir(os.path.join(steps_folder(scratch, kind), f"{step}.damaged"))
        counts["detected"] += aside and any(f"{step} is damaged (" in line for line in said)
        counts["survived"] += found < step
        counts["steps_lost"] = max(counts["steps_lost"], step - found)
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(want[found]), strict=True)
        same = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
        counts["wrong"] += not same or found == step
    finally:
        shutil.rmtree(scratch)


def save(folder: str, kind: str) -> dict[int, dict]:
    """Writes the checkpoints and returns what is in them."""
    checkpoints = Checkpointer(
        os.path.join(folder, "checkpoints"), options=checkpoint_options(folder, kind)
    )
    out = {}
    for step in STEPS:
        out[step] = _state(step)
        checkpoints.save(
            step,
            jax.tree.map(lambda a: jax.device_put(a, _sharding(a.shape)), out[step]),
            {"step": step},
        )
    checkpoints.close()
    return out


def checkpoint_options(folder: str, kind: str) -> CheckpointConfig:
    return CheckpointConfig(
        kind=kind, keep=0, local_dir=os.path.join(folder, "local") if kind == "local" else ""
    )


def steps_folder(folder: str, kind: str) -> str:
    """Where the folders STEP/ are."""
    shared = os.path.join(folder, "checkpoints")
    if kind != "local":
        return shared
    with open(os.path.join(shared, "run_id")) as f:
        return os.path.join(folder, "local", f.read(), "process_00000")


def file_kinds(folder: str, kind: str) -> dict[str, list[str]]:
    """The files of the newest checkpoint by what they are: numbered and hashed names count as one."""
    top = os.path.join(steps_folder(folder, kind), str(STEPS[-1]))
    out: dict[str, list[str]] = {}
    for where, _, names in os.walk(top):
        for name in sorted(names):
            file = os.path.relpath(os.path.join(where, name), top)
            group = (
                os.path.dirname(file) if os.path.basename(os.path.dirname(file)) == "d" else file
            )
            out.setdefault(group, []).append(file)
    return out


def _sharding(shape: tuple[int, ...]) -> jax.NamedSharding:
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("fsdp",), devices=devices)
    return jax.NamedSharding(
        mesh, jax.P("fsdp") if shape and shape[0] % len(devices) == 0 else jax.P()
    )


def _state(step: int) -> dict:
    rng = np.random.default_rng(step)

    def weight(*shape: int) -> np.ndarray:
        return np.asarray(rng.standard_normal(shape), np.float32)

    return {
        "step": np.int32(step),
        "params": {"embed": weight(64, 16), "experts": {"up": weight(4, 16, 24)}},
        "opt_state": {"mu": np.asarray(weight(64, 16), jnp.bfloat16), "count": np.int32(step)},
    }


def _truncate(top: str, file: str, rng: np.random.Generator) -> bool:
    path = os.path.join(top, file)
    size = os.path.getsize(path)
    os.truncate(path, int(rng.integers(0, size)) if size else 0)
    return size > 0


def _delete(top: str, file: str, rng: np.random.Generator) -> bool:
    os.remove(os.path.join(top, file))
    return True


def _zero(top: str, file: str, rng: np.random.Generator) -> bool:
    """Writes a stretch of zeros, as a file system leaves it where a block was never written."""
    path = os.path.join(top, file)
    with open(path, "rb") as f:
        raw = f.read()
    start = int(rng.integers(0, max(len(raw), 1)))
    new = raw[:start] + b"\0" * (len(raw) - start)
    with open(path, "wb") as f:
        f.write(new)
    return new != raw


def _flip(top: str, file: str, rng: np.random.Generator) -> bool:
    path = os.path.join(top, file)
    size = os.path.getsize(path)
    if not size:
        return False
    with open(path, "r+b") as f:
        at = int(rng.integers(0, size))
        f.seek(at)
        old = f.read(1)[0]
        f.seek(at)
        f.write(bytes([old ^ int(rng.integers(1, 256))]))
    return True


def _exchange(top: str, file: str, rng: np.random.Generator) -> bool:
    """Exchanges the file with another file of the checkpoint that has other contents."""
    here = os.path.join(top, file)
    others = [
        os.path.join(where, name) for where, _, names in os.walk(top) for name in sorted(names)
    ]

    def contents(path):
        return open(path, "rb").read()

    others = [o for o in others if contents(o) != contents(here)]
    if not others:
        return False
    there = others[int(rng.integers(len(others)))]
    os.rename(here, here + ".x")
    os.rename(there, here)
    os.rename(here + ".x", there)
    return True


FAULTS: dict[str, Callable[[str, str, np.random.Generator], bool]] = {
    "truncated": _truncate,
    "deleted": _delete,
    "zeroed": _zero,
    "a byte changed": _flip,
    "exchanged": _exchange,
}


def text(result: dict[str, dict[str, int]]) -> str:
    """The table for a person, with a last row of sums."""
    rows = [["fault", *COUNTS]]
    rows += [[name, *(str(counts[c]) for c in COUNTS)] for name, counts in result.items()]
    rows.append(["all", *(str(sum(r[c] for r in result.values())) for c in COUNTS)])
    return texts.table(rows)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--rounds", type=int, default=20, help="Tries of each fault on each kind of file."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of files and places.")
    parser.add_argument(
        "--folder", type=arguments.path, help="Where to work (default: a temporary one)."
    )
    args = parser.parse_args()
    if args.folder:
        os.makedirs(args.folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = run(folder, args.rounds, args.seed)
    report(args, result, text)
    return int(any(r["wrong"] or r["detected"] < r["tried"] for r in result.values()))
