"""The page: one HTML file with everything in it, which asks nobody for anything.

Scripts and styles are named by their hashes in the page's content security policy, so that nothing else can
run, and every text of a run is escaped: in HTML by markup.py, in the data by `data_block`.
"""

import base64
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.errors import UserError
from deepseek_jax.report import charts, machine, run_data, sections
from deepseek_jax.report.charts import Described
from deepseek_jax.report.events import KINDS
from deepseek_jax.report.markup import Markup, joined, tag, visible
from deepseek_jax.report.run_data import RunData

NAME = "report.html"  # in a workdir
SCRIPTS = ("uplot/uPlot.iife.min.js", "maps.js", "report.js")
STYLES = ("uplot/uPlot.min.css", "report.css")
MARKS = 400  # of a kind in the charts; of more every second, third, ...
LICENSE = "uplot/LICENSE"  # asks to go along with every copy
_HERE = pathlib.Path(__file__).parent


def build(workdirs: Sequence[str], described: Mapping[str, Described]) -> str:
    """The page of one run, or of several over each other, the first of which is shown whole.

    The same files make the same page.

    Args:
      workdirs: folders of runs.
      described: unit and meaning of metrics (run/metrics.py).

    Raises:
      UserError: a folder holds no run, or a file in it is damaged.
    """
    names = _names(workdirs)
    runs = [run_data.read(w, n, len(workdirs)) for w, n in zip(workdirs, names, strict=True)]
    there = list(dict.fromkeys(name for run in runs for name in run.series.series))
    constant = charts.constant([run.series for run in runs])
    drawn = charts.charts([name for name in there if name not in constant], described)
    data = {
        "charts": drawn,
        "kinds": {k: list(v) for k, v in KINDS.items()},
        "runs": [_of_run(run) for run in runs],
    }
    title = f"{' and '.join(names)}: report"
    body = joined(
        tag("a", "Skip to the charts", href="#learning", class_="skip"),
        _header(names),
        tag("main", _parts(runs, {c["section"] for c in drawn}, constant)),
        tag("p", "", id="live", aria_live="polite", class_="hidden"),
        tag(
            "footer",
            tag("p", "Written by deepseek_jax.report; curves drawn by uPlot 1.6.32."),
            tag("details", tag("summary", "Licence of uPlot"), tag("pre", str(_asset(LICENSE)))),
        ),
        data_block("data", data),
        [tag("script", _asset(name)) for name in SCRIPTS],
    )
    head = joined(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy()),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        [tag("style", _asset(name)) for name in STYLES],
    )
    html = tag("html", tag("head", head), "\n", tag("body", body), lang="en")
    return f"<!DOCTYPE html>\n{html}\n"


def write(path: str, text: str) -> None:
    """Writes a page, whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    draft = f"{path}.{os.getpid()}.tmp"
    try:
        with open(draft, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(draft, path)
    except OSError:
        pathlib.Path(draft).unlink(missing_ok=True)
        raise


def data_block(id: str, value: Any) -> Markup:
    """JSON that no browser runs and no text in which can end: it is ASCII without <, > and &."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return tag("script", Markup(text), type="application/json", id=id)


@functools.cache
def policy() -> str:
    """The content security policy: nothing but this page's scripts and styles, no connection, no form."""

    def hashes(names: Sequence[str]) -> str:
        sums = (hashlib.sha256(_asset(n).encode()).digest() for n in names)
        return " ".join(f"'sha256-{base64.b64encode(s).decode()}'" for s in sums)

    return (
        f"default-src 'none'; script-src {hashes(SCRIPTS)}; style-src {hashes(STYLES)}; "
        "base-uri 'none'; form-action 'none'"
    )


@functools.cache
def _asset(name: str) -> Markup:
    return Markup((_HERE / name).read_bytes().decode("utf-8"))


def _names(workdirs: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as make them different."""
    parts = [pathlib.PurePath(os.path.abspath(w)).parts for w in workdirs]
    if len(set(parts)) < len(parts):
        twice = next(w for w, p in zip(workdirs, parts, strict=True) if parts.count(p) > 1)
        raise UserError(f"WORKDIR {twice} is named twice. Name each run once.")
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def _of_run(run: RunData) -> dict[str, Any]:
    marks = [[e.kind, e.step, visible(e.text)] for e in run.events if e.kind != "start" or e.step]
    marks += [
        ["checkpoint", c["step"], str(c["state"])] for c in run.checkpoints or [] if c["step"] > 0
    ]
    for kind in KINDS:
        if (count := sum(m[0] == kind for m in marks)) > MARKS:
            some = [m for m in marks if m[0] == kind][:: -(-count // MARKS)]
            marks = [m for m in marks if m[0] != kind] + some
    return {
        "name": visible(run.name),
        "steps": run.series.steps,
        "series": run.series.series,
        "marks": marks,
        "load": run.load.data if run.load else None,
    }


def _header(names: Sequence[str]) -> Markup:
    return tag(
        "header",
        tag("h1", " and ".join(names)),
        tag(
            "div",
            tag("label", tag("input", type="checkbox", id="smooth"), " smooth"),
            tag("label", tag("input", type="checkbox", id="log"), " log scale"),
            tag("label", tag("input", type="checkbox", id="marks", checked=True), " marks"),
            tag("button", "Whole run", id="reset", type="button", disabled=True),
            tag("button", "Dark", id="theme", type="button", aria_pressed="false"),
            class_="controls",
            role="group",
            aria_label="What the charts show",
        ),
    )


def _parts(runs: Sequence[RunData], drawn: set[str], constant: Mapping[str, float]) -> Markup:
    """All parts that have something in them.

    Args:
      drawn: ids of those that have charts.
      constant: charts.constant.
    """
    run = runs[0]
    same = ", ".join(f"{name} {value}" for name, value in constant.items())
    heat = tag("div", id="heat") if any(r.load for r in runs) else Markup("")
    found = [
        ("summary", "Summary", joined(sections.about(run), sections.summary(run))),
        ("compared", "The runs beside each other", sections.compared(runs) if runs[1:] else ""),
        ("learning", "Learning", _holder("learning", drawn)),
        (
            "experts",
            "Load of the experts",
            joined(
                heat,
                sections.experts(run),
                _holder("experts", drawn),
                tag("p", f"The same in every row: {same}.", class_="about") if same else None,
            ),
        ),
        ("speed", "Speed and memory", _holder("speed", drawn)),
        ("step", "Where a step's time goes", machine.profile(run)),
        ("further", "Further figures", _holder("further", drawn)),
        ("events", "Events", sections.events(run)),
        ("checkpoints", "Checkpoints", sections.checkpoints(run)),
        (
            "machine",
            "Where it ran",
            joined(machine.mesh(run), machine.memory(run), machine.processes(run)),
        ),
        ("answers", "Samples and answers", sections.answers(run)),
        ("options", "Options", sections.options(run)),
    ]
    shown = [(id, title, part) for id, title, part in found if part]
    contents = tag(
        "nav",
        [tag("a", title, href=f"#{id}") for id, title, _ in shown],
        aria_label="Parts of this page",
    )
    of_first = f"Figures and tables are those of {run.name}; charts show all runs."
    return joined(
        contents,
        tag(
            "noscript",
            tag("p", "The charts of this page are drawn by its own script, which is off here."),
        ),
        tag("p", of_first, class_="about") if runs[1:] else None,
        [
            tag(
                "section",
                tag("h2", title, id=f"{id}-title"),
                part,
                id=id,
                aria_labelledby=f"{id}-title",
            )
            for id, title, part in shown
        ],
    )


def _holder(section: str, drawn: set[str]) -> Markup:
    return tag("div", id=f"charts-{section}", class_="charts") if section in drawn else Markup("")
