"""What the commands of `python -m deepseek_jax.checkpoint` do."""

import argparse
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from deepseek_jax.checkpoint import full, integrity, manifest, sharded
from deepseek_jax.checkpoint.comparison import differences
from deepseek_jax.checkpoint.folder import Folder
from deepseek_jax.checkpoint.kind import TensorReader
from deepseek_jax.checkpoint.manifest import Manifest
from deepseek_jax.checkpoint.stored import StoredCheckpoint, checkpoint_of, checkpoints_in
from deepseek_jax.cli.texts import gb, table
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile import files

Answer = tuple[int, Any, list[str]]  # exit code, result as JSON has it, lines of text


def ls(args: argparse.Namespace) -> Answer:
    rows = []
    for checkpoint in checkpoints_in(args.dir):
        first, *others = checkpoint.paths
        row = checkpoint.describe(integrity.inspect(first, contents=False))
        for path in others:
            row["problems"] += [
                f"{path.parent.name}/{file}: {what}"
                for file, what in integrity.inspect(path, contents=False).bad
            ]
        if row["problems"]:
            row["state"] = "damaged"
        rows.append(row)
    heads = ("step", "kind", "bytes", "files", "mesh", "processes", "held-out loss", "saved", "")
    cells = [heads, *(_cells(row) for row in rows)]
    return int(any(r["problems"] for r in rows)), rows, table(cells, right=False).splitlines()


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    loss = row["eval_loss"]
    return (
        row["name"],
        row["kind"],
        gb(row["bytes"]),
        str(row["files"]),
        row["mesh"],
        str(row["processes"] or ""),
        f"{loss:.4f}" if isinstance(loss, float) else "",
        row["time"],
        row["state"] + (f": {row['problems'][0]}" if row["problems"] else ""),
    )


def show(args: argparse.Namespace) -> Answer:
    checkpoint = checkpoint_of(args.dir, args.step)
    verdict = checkpoint.check()
    specs = sorted(checkpoint.open().shapes.items())
    arrays = [
        {"name": n, "dtype": str(s.dtype), "shape": list(s.shape), "bytes": s.nbytes}
        for n, s in specs
    ]
    row = checkpoint.describe(verdict) | {"extra": checkpoint.extra(), "arrays": arrays}
    lines = [
        f"{k:<14}{v}"
        for k, v in row.items()
        if k not in ("arrays", "problems") and v not in (None, "")
    ]
    cells = [(name, str(spec), gb(spec.nbytes)) for name, spec in specs]
    cells.append((f"{len(specs)} arrays", "", gb(sum(spec.nbytes for _, spec in specs))))
    return 0, row, lines + table(cells, right=False).splitlines()


def verify(args: argparse.Namespace) -> Answer:
    if args.step is None:
        checkpoints = checkpoints_in(args.dir)
    else:
        checkpoints = [checkpoint_of(args.dir, args.step)]
    rows, lines = [], []
    for checkpoint in checkpoints:
        row = _verified(checkpoint)
        rows.append(row)
        note = ""
        if row["state"] == "unprotected":
            note = " (written by an earlier version, without checksums)"
        lines.append(f"{row['name']}: {row['state']}{note}")
        lines += [f"  {b['file']}: {b['what']}" for b in row["bad"]]
    return int(any(r["state"] == "damaged" for r in rows)), rows, lines


def _verified(checkpoint: StoredCheckpoint) -> dict[str, Any]:
    bad, newer, protected = [], [], True
    for path in checkpoint.paths:
        verdict = integrity.inspect(path)
        protected = protected and verdict.protected
        bad += [{"folder": str(path), "file": file, "what": what} for file, what in verdict.bad]
        if verdict.newer:
            newer.append({"folder": str(path), "file": manifest.NAME, "what": verdict.newer})
    bad += newer
    if not bad:
        try:
            checkpoint.open()
        except UserError as e:
            bad = [{"folder": str(checkpoint.paths[0]), "file": "state", "what": str(e)}]
    state = "good" if protected else "unprotected"
    return {
        "step": checkpoint.step,
        "name": checkpoint.name,
        "state": "damaged" if bad else state,
        "bad": bad,
    }


def export(args: argparse.Namespace) -> Answer:
    checkpoint = checkpoint_of(args.dir, args.step)
    checkpoint.check()
    reader = checkpoint.open()
    specs = {
        n: s
        for n, s in sorted(reader.shapes.items())
        if not args.only or n == args.only or n.startswith(args.only.rstrip("/") + "/")
    }
    if not specs:
        raise UserError(
            f"--only={args.only} names no array of {checkpoint.paths[0]}. `show` lists them."
        )
    out = _new(args.out)
    full.write(out, specs, lambda name: _blocks(reader, name))
    names = list(manifest.files_of(out))
    manifest.sync(out, names)
    total = sum(s.nbytes for s in specs.values())
    result = {
        "out": str(out),
        "step": checkpoint.step,
        "arrays": len(specs),
        "bytes": total,
        "files": sorted(names),
    }
    return 0, result, [f"{len(specs)} arrays of step {checkpoint.step}, {gb(total)}, in {out}"]


def _blocks(reader: TensorReader, name: str) -> Iterator[np.ndarray]:
    """An array's values in row-major order."""
    return files.blocks(lambda index: reader.read(name, index), reader.shapes[name])


def _new(out: str) -> epath.Path:
    path = epath.Path(out if "://" in out else os.path.abspath(out))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{out} is there already. Name a new folder.")
    return path


def reshard(args: argparse.Namespace) -> Answer:
    if args.shards < 1:
        raise UserError(f"--shards={args.shards} is no number of pieces. Set it to 1 or more.")
    if args.shards > 1 and args.kind == "full":
        raise UserError(
            f"--shards={args.shards} has no effect with --kind=full, whose tensors are whole. Leave it out, "
            f"or set --kind=sharded."
        )
    checkpoint = checkpoint_of(args.dir, args.step)
    verdict = checkpoint.check()
    reader = checkpoint.open()
    folder, step = Folder(args.out, read_only=False), checkpoint.step
    if step in folder.steps():
        raise UserError(f"{folder.at(step)} is there already. Name another OUT.")
    folder.begin(step)
    draft = folder.draft(step)
    try:
        if args.kind == "full":
            full.write(draft / "state", reader.shapes, lambda name: _blocks(reader, name))
        else:
            sharded.write(draft / "state", reader.shapes, reader.read, args.shards)
        integrity.write_extra(draft, checkpoint.extra())
        names = list(manifest.files_of(draft))
        sums = manifest.checksums(draft, names)
        manifest.sync(draft, names)
        about = (verdict.manifest.about if verdict.manifest else {}) | {
            "mesh": [["shards", args.shards]],
            "devices": args.shards,
            "processes": 1,
        }
        manifest.write(draft, Manifest(args.kind, step, sums, about))
        folder.commit(step)
    except BaseException:
        folder.discard(step)
        raise
    result = {
        "out": str(folder.at(step)),
        "step": step,
        "kind": args.kind,
        "shards": args.shards,
        "arrays": len(reader.shapes),
    }
    return 0, result, [f"step {step} of kind {args.kind} in {folder.at(step)}"]


def diff(args: argparse.Namespace) -> Answer:
    checkpoints = checkpoint_of(args.dir, args.step), checkpoint_of(args.dir2, args.step2)
    for checkpoint in checkpoints:
        checkpoint.check()
    first, second = (checkpoint.open() for checkpoint in checkpoints)
    rows, same = differences(first, second, max(args.most, 1))
    lines = [_difference_line(row) for row in rows]
    stopped = "; stopped looking" if rows and len(rows) == args.most else ""
    lines.append(f"{same} arrays are the same, bit for bit{stopped}")
    return int(bool(rows)), {"different": rows, "same": same}, lines


def _difference_line(row: dict[str, Any]) -> str:
    if "elements" not in row:
        return f"{row['name']}: {row['first'] or 'absent'} and {row['second'] or 'absent'}"
    return (
        f"{row['name']}: {row['elements']} of {row['of']} elements differ, by {row['max_abs_difference']:g} "
        f"at most, first at {row['first_at']}"
    )
