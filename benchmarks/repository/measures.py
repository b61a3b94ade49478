"""The repository's measures, beside what each may be at most.

  python -m benchmarks measures [--json] [--out=FILE]

Code is train.py, configs/, deepseek_jax/ and benchmarks/; lines are counted where they are not
empty. Exit code 1 if a measure is missed.
"""

import ast
import pathlib
import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks import ROOT
from benchmarks.repository import imports
from benchmarks.support.report import Parser, report
from deepseek_jax.cli import texts

WIDEST = 110
LONGEST = 349  # lines of a file
MANY = 8  # parameters
PRIVATE = "jax." + "_src"
REDUCTIONS = {"psum", "pmax", "pmin", "pmean", "axis_index", "axis_size"}


class Measure(NamedTuple):
    """One row: `found` names the places, the worst first."""

    name: str
    value: float
    bar: float
    found: list[str]

    @property
    def met(self) -> bool:
        return self.value <= self.bar


def main() -> int:
    own = Parser(__doc__).parse_args()
    measures = measured()
    report(own, [m._asdict() | {"met": m.met} for m in measures], lambda _: text(measures))
    return 0 if all(m.met for m in measures) else 1


def measured() -> list[Measure]:
    return [make() for make in MEASURES.values()]


def code() -> list[pathlib.Path]:
    """What is measured: everything but tests, whose files may be long."""
    folders = ("configs", "deepseek_jax", "benchmarks", "docs")
    return [ROOT / "train.py", *(p for f in folders for p in sorted((ROOT / f).rglob("*.py")))]


def everything() -> list[pathlib.Path]:
    return [*code(), *sorted((ROOT / "tests").rglob("*.py"))]


def short(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines(path: pathlib.Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def width() -> Measure:
    of = {p: [len(line) for line in lines(p) if line.strip()] for p in code()}
    mean = statistics.mean(n for found in of.values() for n in found)
    widest = sorted((p for p in of if of[p]), key=lambda p: -statistics.mean(of[p]))
    found = [f"{short(p)}: {statistics.mean(of[p]):.0f}" for p in widest]
    return Measure("mean line width", round(mean, 1), 48, found)


def wide() -> Measure:
    found = [
        f"{short(p)}:{number}"
        for p in everything()
        for number, line in enumerate(lines(p), 1)
        if len(line) > WIDEST
    ]
    return Measure(f"lines above {WIDEST}, tests too", len(found), 0, found)


def up() -> Measure:
    found = imports.pointing_up()
    return Measure("imports pointing up", len(found), 0, found)


def circles() -> Measure:
    found = [f"{m} -> {', '.join(others)}" for m, others in imports.in_circles().items()]
    return Measure("modules in import circles", len(found), 0, found)


def root_modules() -> Measure:
    found = [short(p) for p in sorted((ROOT / "deepseek_jax").glob("*.py"))]
    return Measure("modules in the package's root", len(found), 5, found)


def parameters() -> Measure:
    functions = [(p, f) for p in code() for f in functions_of(p)]
    many = [
        f"{short(p)}:{f.lineno} {f.name} {count}"
        for p, f in functions
        if (count := parameters_of(f)) >= MANY
    ]
    share = round(100 * len(many) / len(functions), 2)
    return Measure(f"% of functions with {MANY} or more parameters", share, 0.99, many)


def functions_of(path: pathlib.Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(imports.tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def longest() -> Measure:
    length = {short(p): len(lines(p)) for p in code()}
    found = [
        f"{name}: {n}" for name, n in sorted(length.items(), key=lambda kv: -kv[1]) if n > LONGEST
    ]
    return Measure("longest file", max(length.values()), LONGEST, found)


def private() -> Measure:
    """Modules of the package that use what JAX keeps to itself."""
    found = []
    for p in code():
        imported = any(m.startswith(PRIVATE) for m in imports.named(p))
        by_name = any(
            isinstance(node, ast.Constant) and str(node.value).startswith(PRIVATE)
            for node in ast.walk(imports.tree(p))
        )
        if imported or by_name:
            found.append(short(p))
    return Measure(f"modules that use {PRIVATE}", len(found), 1, found)


def token_axes() -> Measure:
    """Places that name the axes of the batch where the axes that tokens vary over are meant: in
    reductions, and written out."""
    found = []
    for p in code():
        for node in ast.walk(imports.tree(p)):
            if isinstance(node, ast.Call) and called(node) in REDUCTIONS:
                if any(getattr(a, "id", "") == "BATCH_AXES" for a in node.args[1:]):
                    found.append(f"{short(p)}:{node.lineno}")
            if isinstance(node, ast.Tuple) and p.name != "mesh.py":
                if [getattr(e, "value", None) for e in node.elts] == ["data", "fsdp", "expert"]:
                    found.append(f"{short(p)}:{node.lineno}")
    return Measure("batch axes where tokens are meant", len(found), 0, found)


def called(call: ast.Call) -> str:
    """The last name of what is called: psum of jax.lax.psum(...)."""
    return re.split(r"\W", ast.unparse(call.func))[-1]


MEASURES: dict[str, Callable[[], Measure]] = {
    "width": width,
    "wide": wide,
    "up": up,
    "circles": circles,
    "root_modules": root_modules,
    "parameters": parameters,
    "longest": longest,
    "private": private,
    "token_axes": token_axes,
}


def text(measures: list[Measure]) -> str:
    """The table, and the first places of what is missed."""
    rows: list[list[Any]] = [["measure", "value", "at most", ""]]
    rows += [[m.name, f"{m.value:g}", f"{m.bar:g}", "" if m.met else "MISSED"] for m in measures]
    missed = [
        f"\n{m.name}:\n" + "\n".join(f"  {place}" for place in m.found[:12])
        for m in measures
        if not m.met
    ]
    return "\n".join([texts.table(rows), *missed])
