"""What the measures of the repository count; that they are met: test_imports.py, which parses the files."""

import pytest

from benchmarks.repository import imports, measures


def test_what_is_counted(tmp_path, monkeypatch):
    """Every kind of what a measure counts, in one file."""
    (tmp_path / "deepseek_jax").mkdir()
    (tmp_path / "train.py").write_text("x = 1\n")
    (tmp_path / "deepseek_jax" / "one.py").write_text(
        "from jax import lax\n\n\n"
        "def many(a, b, /, c, d, e, *rest, f=1, g=2, h=3, **more):\n"
        '    return lax.psum(a, BATCH_AXES), ("data", "fsdp", "expert")\n\n\n'
        "class C:\n"
        "    def few(self, a, b, c, d, e, f, g):\n"
        '        return __import__("jax._' + 'src.lib")\n' + "#" * 111 + "\n"
    )
    monkeypatch.setattr(measures, "ROOT", tmp_path)
    monkeypatch.setattr(imports, "files", dict)
    one = "deepseek_jax/one.py"
    assert measures.parameters().found == [f"{one}:4 many 8"] and measures.parameters().value == 50
    assert measures.token_axes().found == [f"{one}:5", f"{one}:5"]
    assert measures.private().found == [one] and measures.wide().found == [f"{one}:11"]
    assert measures.root_modules().value == 1 and measures.longest().value == 11
    assert measures.width().value == pytest.approx(
        (5 + 19 + 57 + 66 + 8 + 41 + 40 + 111) / 8, abs=6
    )


def test_circles_are_found_without_what_leads_to_them(monkeypatch):
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}
    monkeypatch.setattr(imports, "imports", lambda: graph)
    assert imports.in_circles() == {"b": ["c"], "c": ["b"]}


def test_imports_in_every_form(tmp_path, monkeypatch):
    """At the top, in functions, for types alone, of a module by its package."""
    file = tmp_path / "some.py"
    file.write_text(
        "import deepseek_jax.errors as e\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from deepseek_jax.cli import texts\n"
        "def f():\n    from deepseek_jax.config.options import Config\n"
    )
    assert imports.named(file) >= {
        "deepseek_jax.errors",
        "deepseek_jax.cli.texts",
        "deepseek_jax.config.options",
    }
    file = tmp_path / "relative.py"
    file.write_text("from . import x\n")
    with pytest.raises(ValueError, match="relative"):
        imports.named(file)
