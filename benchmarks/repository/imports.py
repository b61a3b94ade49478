"""Who imports whom: the modules of this repository and the order of its packages, read from the source.

Imports point one way, down ORDER. BUILD.md prints the list; tests/repository/test_imports.py keeps it true.
"""

import ast
import functools
import pathlib
import re

from benchmarks import ROOT

# From the top. A module may import its own package and what stands below it.
ORDER = (
    "entries top plan migrate launch run report compress distill esft inference train objectives hf "
    "checkpoint tensorfile data model experts parallel cluster xla cli config runtime errors"
).split()
# tools that do not know of each other; migrate writes launch's files
SIDE_BY_SIDE = ({"plan", "migrate"}, {"plan", "launch"})
ENTRIES = ("train", "deepseek_jax.generate", "deepseek_jax.evaluate")  # besides every __main__
OUTSIDE = ("benchmarks", "tests", "configs")  # they import the package, never the reverse


def module_of(path: pathlib.Path) -> str:
    """The name under which a file of the repository is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def files() -> dict[str, pathlib.Path]:
    """Module -> file, of the package and of train.py."""
    package = sorted((ROOT / "deepseek_jax").rglob("*.py"))
    return {module_of(p): p for p in package} | {"train": ROOT / "train.py"}


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    """A file, parsed."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def named(path: pathlib.Path) -> set[str]:
    """All modules that a file imports anywhere: at its top, in functions, for types alone."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: a relative import")
            for name in node.names:
                full = f"{node.module}.{name.name}"
                found.add(full if full in files() else str(node.module))
        elif isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
    return found


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of this repository that it imports."""
    return {module: named(path) & files().keys() for module, path in files().items()}


def place(module: str) -> str:
    """The package of ORDER that a module belongs to. Commands are entries."""
    parts = module.split(".")
    if parts[-1] == "__main__" or module in ENTRIES:
        return "entries"
    # deepseek_jax itself prepares the process before JAX starts, as runtime does.
    return parts[1] if len(parts) > 1 else "runtime"


def pointing_up() -> list[str]:
    """Imports against ORDER, and of what does not belong to the package."""
    up = []
    for module, imported in imports().items():
        for other in imported - {"deepseek_jax"}:
            mine, theirs = place(module), place(other)
            beside = {mine, theirs} in SIDE_BY_SIDE
            if ORDER.index(theirs) < ORDER.index(mine) or beside:
                up.append(f"{module} ({mine}) -> {other} ({theirs})")
        outside = {m for m in named(files()[module]) if m.split(".")[0] in OUTSIDE}
        up += [f"{module} -> {other}" for other in outside]
    return sorted(up)


def in_circles() -> dict[str, list[str]]:
    """Modules of which imports lead back to them, with those of their imports that do."""
    left = {module: imported - {module} for module, imported in imports().items()}
    while True:
        wanted = set().union(*left.values())
        free = [m for m, imported in left.items() if not imported & left.keys() or m not in wanted]
        if not free:
            return {module: sorted(imported & left.keys()) for module, imported in left.items()}
        for module in free:
            del left[module]


def unreached() -> set[str]:
    """Modules that no entry leads to."""
    reached: set[str] = set()
    todo = [module for module in files() if place(module) == "entries"]
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            parents = [module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)]
            todo += [*imports()[module], *parents, *named_in_strings(files()[module])]
    return files().keys() - reached


def named_in_strings(path: pathlib.Path) -> set[str]:
    """Modules that a file names in full in a string: the lazy face of deepseek_jax.hf."""
    text = path.read_text(encoding="utf-8")
    return set(re.findall(r'"(deepseek_jax\.[\w.]+)"', text)) & files().keys()
