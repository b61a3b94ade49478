"""Imports point one way: down the list of BUILD.md ("Layout"), in every form that Python has.

And the other measures that `python -m benchmarks measures` prints: here every file is parsed once.
"""

import importlib
import re

import pytest

from benchmarks.repository import imports, measures
from tests.support import ROOT


def test_every_package_has_a_place():
    assert {imports.place(module) for module in imports.files()} == set(imports.ORDER)


def test_the_list_that_is_printed_is_the_one_that_is_kept():
    layout = (ROOT / "BUILD.md").read_text().partition("\n## Layout\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", layout, flags=re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`(\w+)", row)] == imports.ORDER


def test_no_import_points_up():
    up = imports.pointing_up()
    assert not up, "\n".join(up)


def test_no_circles():
    """Of files: what a file imports never leads back to it."""
    assert not imports.in_circles()


def test_every_module_is_reached_from_an_entry():
    assert not imports.unreached()


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
        hf.nothing  # noqa: B018  the attempt is the test
    assert importlib.import_module("deepseek_jax.configdict").base_config is base_config


def test_the_root_holds_entries_only():
    found = {p.name for p in (ROOT / "deepseek_jax").glob("*.py")}
    assert found <= {"__init__.py", "errors.py", "generate.py", "evaluate.py"}


def test_tests_share_by_way_of_support():
    """No test file imports another: what they share lies in tests/support/ or a conftest.py."""
    # Parsing all files would take seconds; support has no tests to import.
    some = re.compile(r"^\s*(from\s+\.|(from|import)\s+tests(?!\.support\b))", re.MULTILINE)
    for file in sorted((ROOT / "tests").rglob("*.py")):
        if not some.search(file.read_text(encoding="utf-8")):
            continue
        shared = [m for m in imports.named(file) if re.match(r"tests\..*\btest_", m)]
        assert not shared, f"{file.relative_to(ROOT)}: {shared}"
    assert not list((ROOT / "tests" / "support").rglob("test_*.py"))


@pytest.mark.parametrize(
    "name", ["width", "wide", "parameters", "longest", "private", "token_axes"]
)
def test_measure(name):
    """At its bar or better. The tests above are of the other measures."""
    m = measures.MEASURES[name]()
    assert m.met, f"{m.name}: {m.value:g}, at most {m.bar:g}\n" + "\n".join(m.found[:40])
