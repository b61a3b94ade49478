"""Imports point one way: down the list of BUILD.md ("Layout"), in every form that Python has."""

import ast
import importlib
import pathlib
import re

import pytest

from tests.support import ROOT

# From the top. A module may import what stands below its package, and its own package.
ORDER = (
    "entries plan launch run inference train objectives hf checkpoint tensorfile data model experts parallel "
    "cluster xla cli config runtime errors"
).split()
SIDE_BY_SIDE = {"plan", "launch"}  # tools, none of which imports another


def module_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(p): p for p in sorted((ROOT / "deepseek_jax").rglob("*.py"))} | {
    "train": ROOT / "train.py"
}


def imports_of(path: pathlib.Path) -> set[str]:
    """Modules of this repository that a file imports anywhere: at its top, in functions, for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            for name in node.names:
                full = f"{node.module}.{name.name}"
                found.add(full if full in FILES else node.module)
        elif isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
    return {m for m in found if m in FILES}


IMPORTS = {module: imports_of(path) for module, path in FILES.items()}


def place(module: str) -> str:
    """The package of `ORDER` that a module belongs to. Commands are entries."""
    parts = module.split(".")
    if parts[-1] == "__main__" or module in (
        "train",
        "deepseek_jax.generate",
        "deepseek_jax.evaluate",
    ):
        return "entries"
    return (
        parts[1] if len(parts) > 1 else "runtime"
    )  # deepseek_jax itself: threads of XLA, before JAX starts


def test_every_package_has_a_place():
    assert {place(m) for m in FILES} == set(ORDER)


def test_no_import_points_up():
    up = []
    for module, imported in IMPORTS.items():
        for other in imported - {"deepseek_jax"}:
            mine, theirs = place(module), place(other)
            beside = {mine, theirs} <= SIDE_BY_SIDE and mine != theirs
            if ORDER.index(theirs) < ORDER.index(mine) or beside:
                up.append(f"{module} ({mine}) -> {other} ({theirs})")
    assert not up, "\n".join(up)


def test_no_circles():
    """Of files: what a file imports never leads back to it."""
    left = {m: set(d) - {m} for m, d in IMPORTS.items()}
    while free := [m for m, d in left.items() if not d & left.keys()]:
        for m in free:
            del left[m]
    assert not left, {m: sorted(d & left.keys()) for m, d in left.items()}


def test_every_module_is_reached_from_an_entry():
    reached, todo = set(), [m for m in FILES if place(m) == "entries"]
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            parents = [module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)]
            todo += [*IMPORTS[module], *parents]
            todo += [m for m in named_in(FILES[module])]
    assert not FILES.keys() - reached


def named_in(path: pathlib.Path) -> set[str]:
    """Modules that a file names in full in a string: the lazy face of deepseek_jax.hf."""
    return {
        m
        for m in re.findall(r'"(deepseek_jax\.[\w.]+)"', path.read_text(encoding="utf-8"))
        if m in FILES
    }


def test_names_that_users_import_stay():
    """Config files of users, and programs around hf."""
    from deepseek_jax.configdict import base_config

    from deepseek_jax import hf
    from deepseek_jax.config import UserError
    from deepseek_jax.hf.configuration import to_model

    assert callable(base_config) and issubclass(UserError, Exception) and callable(to_model)
    for name in hf.__all__:
        assert getattr(hf, name).__name__ == name
    with pytest.raises(AttributeError):
        hf.nothing  # noqa: B018
    assert importlib.import_module("deepseek_jax.configdict").base_config is base_config


def test_the_root_holds_entries_only():
    found = {p.name for p in (ROOT / "deepseek_jax").glob("*.py")}
    assert found <= {"__init__.py", "errors.py", "generate.py", "evaluate.py"}
