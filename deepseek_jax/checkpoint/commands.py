"""What the commands of `python -m deepseek_jax.checkpoint` do. Each returns (exit code, result as JSON has it, lines of text)."""

import argparse
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from deepseek_jax.checkpoint import full, integrity, kinds, manifest, sharded
from deepseek_jax.checkpoint.finder import LocalRun
from deepseek_jax.checkpoint.folder import DAMAGED, Folder, is_step
from deepseek_jax.checkpoint.manifest import Manifest
from deepseek_jax.cli.texts import gb, table
from deepseek_jax.errors import UserError
from deepseek_jax.tensorfile import regions
from deepseek_jax.tensorfile.arrays import Shape
from deepseek_jax.tensorfile.bounded_json import BadFile

Answer = tuple[int, Any, list[str]]


class Place(NamedTuple):
    """A checkpoint: its folder STEP/, or those of the processes whose pieces make it up."""

    step: int
    name: str
    paths: tuple[epath.Path, ...]


def ls(args: argparse.Namespace) -> Answer:
    places = _places(args.dir)
    rows = [_about(p, integrity.inspect(p.paths[0], contents=False)) for p in places]
    for row, place in zip(rows, places):
        for path in place.paths[1:]:
            row["problems"] += [
                f"{path.parent.name}/{file}: {what}"
                for file, what in integrity.inspect(path, contents=False).bad
            ]
        if row["problems"]:
            row["state"] = "damaged"
    cells = [("step", "kind", "bytes", "files", "mesh", "processes", "held-out loss", "saved", "")]
    cells += [
        (
            r["name"],
            r["kind"],
            gb(r["bytes"]),
            str(r["files"]),
            r["mesh"],
            str(r["processes"] or ""),
            _loss(r["eval_loss"]),
            r["time"],
            r["state"] + (f": {r['problems'][0]}" if r["problems"] else ""),
        )
        for r in rows
    ]
    return int(any(r["problems"] for r in rows)), rows, table(cells, right=False).splitlines()


def show(args: argparse.Namespace) -> Answer:
    place = _one(args.dir, args.step)
    verdict = _check(place)
    source = _source(place)
    arrays = [
        {"name": n, "dtype": str(s.dtype), "shape": list(s.shape), "bytes": s.nbytes}
        for n, s in sorted(source.shapes.items())
    ]
    extra = {k: v for k, v in integrity.read_extra(place.paths[0]).items() if k != integrity.MARK}
    row = _about(place, verdict) | {"extra": extra, "arrays": arrays}
    lines = [
        f"{k:<14}{v}"
        for k, v in row.items()
        if k not in ("arrays", "problems") and v not in (None, "")
    ]
    total = sum(a["bytes"] for a in arrays)
    cells = [(a["name"], f"{a['dtype']}{a['shape']}", gb(a["bytes"])) for a in arrays] + [
        (f"{len(arrays)} arrays", "", gb(total))
    ]
    return 0, row, lines + table(cells, right=False).splitlines()


def verify(args: argparse.Namespace) -> Answer:
    places = _places(args.dir) if args.step is None else [_one(args.dir, args.step)]
    rows, lines = [], []
    for place in places:
        verdicts = [(path, integrity.inspect(path)) for path in place.paths]
        bad = [
            {"folder": str(path), "file": file, "what": what}
            for path, v in verdicts
            for file, what in v.bad
        ]
        bad += [
            {"folder": str(path), "file": manifest.NAME, "what": v.newer}
            for path, v in verdicts
            if v.newer
        ]
        state = (
            "damaged" if bad else "good" if all(v.protected for _, v in verdicts) else "unprotected"
        )
        if not bad:
            try:
                _source(place)
            except UserError as e:
                state, bad = (
                    "damaged",
                    [{"folder": str(place.paths[0]), "file": "state", "what": str(e)}],
                )
        rows.append({"step": place.step, "name": place.name, "state": state, "bad": bad})
        note = (
            " (written by an earlier version, without checksums)" if state == "unprotected" else ""
        )
        lines += [f"{place.name}: {state}{note}", *(f"  {b['file']}: {b['what']}" for b in bad)]
    return int(any(r["state"] == "damaged" for r in rows)), rows, lines


def export(args: argparse.Namespace) -> Answer:
    place = _one(args.dir, args.step)
    _check(place)
    source = _source(place)
    shapes = {
        n: s
        for n, s in sorted(source.shapes.items())
        if not args.only or n == args.only or n.startswith(args.only.rstrip("/") + "/")
    }
    if not shapes:
        raise UserError(
            f"--only={args.only} names no array of {place.paths[0]}. `show` lists them."
        )
    out = _new(args.out)
    full.write(out, shapes, lambda name: _blocks(source, name))
    names = list(manifest.files_of(out))
    manifest.sync(out, names)
    total = sum(s.nbytes for s in shapes.values())
    result = {
        "out": str(out),
        "step": place.step,
        "arrays": len(shapes),
        "bytes": total,
        "files": sorted(names),
    }
    return 0, result, [f"{len(shapes)} arrays of step {place.step}, {gb(total)}, in {out}"]


def reshard(args: argparse.Namespace) -> Answer:
    if args.shards < 1:
        raise UserError(f"--shards={args.shards} is no number of pieces. Set it to 1 or more.")
    if args.shards > 1 and args.kind == "full":
        raise UserError(
            f"--shards={args.shards} has no effect with --kind=full, whose tensors are whole. Leave it out, or set --kind=sharded."
        )
    place = _one(args.dir, args.step)
    verdict = _check(place)
    source = _source(place)
    folder = Folder(args.out, read_only=False)
    if place.step in folder.steps():
        raise UserError(f"{folder.at(place.step)} is there already. Name another OUT.")
    folder.begin(place.step)
    draft = folder.draft(place.step)
    try:
        if args.kind == "full":
            full.write(draft / "state", source.shapes, lambda name: _blocks(source, name))
        else:
            sharded.write(draft / "state", source.shapes, source.read, args.shards)
        extra = integrity.read_extra(place.paths[0])
        integrity.write_extra(draft, {k: v for k, v in extra.items() if k != integrity.MARK})
        names = list(manifest.files_of(draft))
        sums = manifest.checksums(draft, names)
        manifest.sync(draft, names)
        about = (verdict.manifest.about if verdict.manifest else {}) | {
            "mesh": [["shards", args.shards]],
            "devices": args.shards,
            "processes": 1,
        }
        manifest.write(draft, Manifest(args.kind, place.step, sums, about))
        folder.commit(place.step)
    except BaseException:
        folder.discard(place.step)
        raise
    result = {
        "out": str(folder.at(place.step)),
        "step": place.step,
        "kind": args.kind,
        "shards": args.shards,
        "arrays": len(source.shapes),
    }
    return 0, result, [f"step {place.step} of kind {args.kind} in {folder.at(place.step)}"]


def diff(args: argparse.Namespace) -> Answer:
    a, b = _one(args.dir, args.step), _one(args.dir2, args.step2)
    for place in (a, b):
        _check(place)
    first, second = _source(a), _source(b)
    rows, same = [], 0
    for name in sorted(first.shapes.keys() | second.shapes.keys()):
        here, there = first.shapes.get(name), second.shapes.get(name)
        if here != there:
            rows.append(
                {
                    "name": name,
                    "first": str(here) if here else None,
                    "second": str(there) if there else None,
                }
            )
        elif found := _difference(first, second, name, here):
            rows.append({"name": name, "dtype": str(here.dtype), "shape": list(here.shape)} | found)
        else:
            same += 1
        if len(rows) == max(args.most, 1):
            break
    lines = [
        f"{r['name']}: {r['elements']} of {r['of']} elements differ, by {r['max_abs_difference']:g} at most, first at {r['first_at']}"
        if "elements" in r
        else f"{r['name']}: {r['first'] or 'absent'} and {r['second'] or 'absent'}"
        for r in rows
    ]
    lines.append(
        f"{same} arrays are the same, bit for bit"
        + ("" if not rows else "; stopped looking" if len(rows) == args.most else "")
    )
    return int(bool(rows)), {"different": rows, "same": same}, lines


def _difference(first: Any, second: Any, name: str, what: Shape) -> dict[str, Any] | None:
    count, largest, where = 0, 0.0, None
    for index in regions.blocks(what.shape, what.dtype.itemsize, 1 << 24):
        a, b = first.read(name, index), second.read(name, index)
        bits = lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(x.size, -1)
        unequal = (bits(a) != bits(b)).any(axis=1)
        if not unequal.any():
            continue
        count += int(unequal.sum())
        x, y = (v.reshape(-1)[unequal].astype(np.float64) for v in (a, b))
        with np.errstate(invalid="ignore"):
            gap = np.abs(x - y)
        largest = max(largest, float(np.max(np.where(np.isnan(gap), np.inf, gap))))
        if where is None:
            inside = np.unravel_index(int(np.argmax(unequal)), a.shape)
            where = [int(i) + s.start for i, s in zip(inside, index)]
    return (
        {
            "elements": count,
            "of": int(np.prod(what.shape, dtype=object)),
            "max_abs_difference": largest,
            "first_at": where,
        }
        if count
        else None
    )


def _blocks(source: Any, name: str) -> Iterator[np.ndarray]:
    what = source.shapes[name]
    for index in regions.blocks(what.shape, what.dtype.itemsize):
        yield source.read(name, index)


def _places(directory: str) -> list[Place]:
    """The checkpoints below a folder, in the order of their steps, those put aside at the end.

    Raises:
      UserError: there are none.
    """
    path = epath.Path(directory if "://" in directory else os.path.abspath(directory))
    if not path.is_dir():
        raise UserError(
            f"{directory} is no folder. Name a run's workdir, its folder of checkpoints or one of its steps."
        )
    out: list[Place] = []
    number = path.name.partition(".")[0]
    if (path / manifest.NAME).exists() or (path / "state").is_dir():
        if path.parent.name.startswith("process_"):
            found = LocalRun(
                os.fspath(path.parent.parent.parent), path.parent.parent.name, read_only=True
            ).paths(int(number), None)
            return [Place(int(number), path.name, found or (path,))]
        return [Place(int(number) if is_step(number) else -1, path.name, (path,))]
    if path.name.startswith("process_"):
        path = path.parent
    if any(p.name.startswith("process_") for p in path.iterdir()):
        run = LocalRun(os.fspath(path.parent), path.name, read_only=True)
        for step in run.steps():
            paths = run.paths(step, None) or tuple(
                sorted(p / str(step) for p in path.iterdir() if (p / str(step)).is_dir())
            )
            out.append(Place(step, str(step), paths))
    else:
        for inside in (path / "checkpoints", path):
            if inside.is_dir():
                folder = Folder(os.fspath(inside), read_only=True)
                out = [Place(s, str(s), (folder.at(s),)) for s in folder.steps()]
                out += [
                    Place(int(n.partition(DAMAGED)[0]), n, (folder.path / n,))
                    for n in folder.damaged()
                ]
                if out:
                    break
    if not out:
        raise UserError(
            f"{directory} holds no checkpoint. Name a run's workdir, its folder of checkpoints or one of its steps."
        )
    return out


def _one(directory: str, step: int | None) -> Place:
    places = _places(directory)
    whole = [p for p in places if DAMAGED not in p.name] or places
    if step is None:
        return whole[-1]
    for place in whole:
        if place.step == step:
            return place
    raise UserError(
        f"{directory} holds no checkpoint of step {step}. Name one of these steps: {', '.join(str(p.step) for p in whole)}."
    )


def _check(place: Place) -> integrity.Verdict:
    verdicts = [integrity.inspect(path) for path in place.paths]
    for path, verdict in zip(place.paths, verdicts):
        if verdict.newer:
            raise UserError(f"The checkpoint {path} {verdict.newer}. Update this program.")
        if verdict.bad:
            raise UserError(
                f"The checkpoint {path} is damaged ({verdict.line()}). Name another --step."
            )
    return verdicts[0]


def _source(place: Place) -> Any:
    try:
        source = kinds.source(place.paths)
    except BadFile as e:
        raise UserError(f"The checkpoint {place.paths[0]} cannot be read ({e}).") from e
    found = manifest.read(place.paths[0])
    count = found.about.get("processes") if found and found.kind == "local" else len(place.paths)
    if count != len(place.paths):
        raise UserError(
            f"{place.paths[0]} holds the pieces of one of {count} processes. Put the folders of all of them beside each other."
        )
    return source


def _new(out: str) -> epath.Path:
    path = epath.Path(out if "://" in out else os.path.abspath(out))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{out} is there already. Name a new folder.")
    return path


def _about(place: Place, verdict: integrity.Verdict) -> dict[str, Any]:
    found = verdict.manifest
    about = found.about if found else {}
    kind = (
        found.kind
        if found
        else next(
            (n for n, k in kinds.KINDS.items() if (place.paths[0] / "state" / k.INDEX).exists()),
            "?",
        )
    )
    files = found.files if found else {}
    mesh = about.get("mesh")
    shown = (
        " x ".join(f"{axis} {n}" for axis, n in mesh if n != 1) or "1 device"
        if isinstance(mesh, list) and all(isinstance(m, list) and len(m) == 2 for m in mesh)
        else ""
    )
    problems = [f"{file}: {what}" for file, what in verdict.bad] + (
        [f"{manifest.NAME}: {verdict.newer}"] if verdict.newer else []
    )
    state = "damaged" if problems else "whole" if verdict.protected else "no checksums"
    return {
        "step": place.step,
        "name": place.name,
        "kind": kind,
        "bytes": about.get("bytes") or sum(size for size, _ in files.values()),
        "files": len(files) * len(place.paths),
        "mesh": shown,
        "devices": about.get("devices"),
        "processes": about.get("processes"),
        "eval_loss": about.get("eval_loss"),
        "time": str(about.get("time", "")),
        "jax": about.get("jax"),
        "state": state,
        "problems": problems,
    }


def _loss(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else ""
