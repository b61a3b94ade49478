"""The documentation names files that there are, and its figures are those of the results."""

import json
import re
import sys

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.learning import picture
from benchmarks.repository import figures, measures
from deepseek_jax.errors import UserError
from tests.support import ROOT

PAGES = [ROOT / "README.md", ROOT / "BUILD.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_names_is_there(page):
    """Links; files in code, from the root, from the package or from one of its packages."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    package = ROOT / "deepseek_jax"
    known = [p.relative_to(package).as_posix() for p in package.rglob("*.py")]
    for line in text.splitlines():
        # Not part of a command or of a path that a user chooses.
        for name in re.findall(r"`([a-z_/]+\.py)`", line):
            inside = any(k == name or k.endswith(f"/{name}") for k in known)
            assert inside or (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_the_figures_are_those_of_the_results():
    document = figures.DOCUMENT.read_text(encoding="utf-8")
    assert figures.filled(document) == document, "run: make docs"
    for page in figures.PAGES:
        text = page.read_text(encoding="utf-8")
        assert figures.shown(text) == text, f"{page.name}: run make docs"


def test_the_picture_is_that_of_the_kept_run():
    lines = (figures.RESULTS / "tiny.metrics.jsonl").read_text(encoding="utf-8").splitlines()
    svg = (ROOT / "docs" / "tiny.svg").read_text(encoding="utf-8")
    title = re.search(r'font-size="14">(.*)</text>', svg)
    assert title and picture.drawn([json.loads(line) for line in lines], title[1]) == svg


def test_pictures_are_drawn_from_the_results():
    for picture_file, text in figures.pictures().items():
        assert picture_file.read_text(encoding="utf-8") == text, (
            f"{picture_file.name}: run make docs"
        )


def test_every_result_is_quoted_and_names_no_path():
    """A result says which command, commit and machine it is of, and nothing of where it was made."""
    known = {figure.name for figure in figures.FIGURES}
    for file in figures.RESULTS.glob("*.json"):
        kept = json.loads(file.read_text(encoding="utf-8"))
        assert not re.search(r'"/|=/|/(home|root|tmp|work)/', json.dumps(kept)), file.name
        if not file.stem.startswith(("gpu", "smollm2")):
            assert file.stem in known and kept["command"].startswith("python -m benchmarks"), file


def test_a_result_is_kept(tmp_path, monkeypatch, capsys):
    """--out, of a benchmark that takes no time: what was measured, by which command, of which commit."""
    out = tmp_path / "kept" / "measures.json"
    monkeypatch.setattr(measures, "MEASURES", {"wide": measures.wide})
    monkeypatch.setattr(sys, "argv", [])
    assert benchmarks.main(["measures", "--json", f"--out={out}"]) == 0
    kept = json.loads(out.read_text())
    assert kept["result"] == json.loads(capsys.readouterr().out) and kept["machine"]["cores"] >= 1
    assert kept["command"] == "python -m benchmarks measures --json"


def test_the_picture_of_a_run(tmp_path):
    """Curves of all logged steps, a dot per evaluation; round ends of the axes; no picture of nothing."""
    rows = [{"step": 10 * n, "loss": 5 - n / 10, "max_violation": 1 / n} for n in range(1, 21)]
    rows += [{"step": 100, "eval_loss": 3.9}, {"step": 200, "eval_loss": 3.1}]
    svg = picture.drawn(rows, "a <run>")
    assert svg.count("<circle") == 2 and "a &lt;run&gt;" in svg
    curves = re.findall(r'<polyline points="([^"]+)"', svg)
    assert [len(c.split()) for c in curves] == [20, 20]
    assert picture.span([3.0, 4.9], None) == (3.0, 5.0) and picture.span([0.7], 0.0)[0] == 0
    with pytest.raises(UserError, match="log some steps"):
        picture.drawn([{"step": 1, "eval_loss": 3.0}], "")


@pytest.mark.parametrize(
    ("page", "count", "name"),
    [("finetuning.md", 17, r"test_bug_0?{}_"), ("guide_words.md", 13, "test_")],
)
def test_every_defect_in_the_wild_names_the_tests_that_forbid_it(page, count, name):
    """Rows with tests that there are; in docs/finetuning.md they are named after their row."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", text, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, count + 1))
    for number, row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, f"row {number} names no test"
        for file, test in tests:
            assert re.match(name.format(number), test), f"{test} is in row {number}"
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


@pytest.mark.parametrize("name", ["distillation", "compression"])
def test_defects_of_others_name_tests_that_there_are(name):
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    rows = page.partition("## Defects in the wild")[2].partition("\n|---")[2].splitlines()[1:]
    assert len(rows) > 5
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, row
        for file, test in tests:
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"
