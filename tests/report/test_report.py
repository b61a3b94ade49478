"""`python -m deepseek_jax.report`: the page that it makes of the folder of a run, without a browser."""

import base64
import hashlib
import json
import math
import os
import pathlib

import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.report import __main__, load_map, page, run_data, series
from deepseek_jax.report.run_files import Look
from deepseek_jax.run import metrics, started
from deepseek_jax.train import load_history, starts
from tests.support import report_runs
from tests.support.report_pages import Page

UPLOT = {  # of uplot 1.6.32 in the registry of npm
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
ASSETS = pathlib.Path(page.__file__).parent


def built(*folders) -> str:
    return page.build([str(f) for f in folders], metrics.METRICS)


def read(*folders) -> Page:
    return Page(built(*folders))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return report_runs.whole(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def whole_page(whole):
    return read(whole)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_figure_is_that_of_metrics_jsonl(whole, whole_page):
    """All points of a run of 400 steps, as the same numbers; a row that lacks one is a gap."""
    rows = lines(whole)
    for name in whole_page.data["runs"][0]["series"]:
        steps, values = whole_page.series(name)
        own = [r for r in rows if ("eval_loss" in r if name.startswith("eval_") else "lr" in r)]
        assert steps.tolist() == [r["step"] for r in own], name
        wanted = np.array([r.get(name, math.nan) for r in own], np.float64)
        np.testing.assert_array_equal(values, wanted, err_msg=name)
    assert np.isnan(whole_page.series("loss")[1]).sum() == 3
    drawn = {s["name"] for chart in whole_page.data["charts"] for s in chart["series"]}
    assert drawn >= set(whole_page.data["runs"][0]["series"]) - {"dropped_tokens"}
    assert "The same in every row: dropped_tokens 0." in whole_page.text
    last = max((r for r in rows if "loss" in r), key=lambda r: r["step"])
    exact = {a["value"] for tag, a in whole_page.elements if tag == "data"}
    assert {json.dumps(last["loss"]), json.dumps(last["tokens_seen"]), "3"} <= exact


def test_charts_say_units_and_meanings(whole_page):
    loss = next(c for c in whole_page.data["charts"] if c["title"] == "Loss")
    assert loss["unit"] == metrics.METRICS["loss"].unit
    assert metrics.METRICS["eval_loss"].help in loss["help"]


@pytest.mark.parametrize("count", [1, 8, 50, 5000])
def test_fewer_points_keep_every_extreme(count):
    """Of each bucket the lowest and the highest, of the whole the ends; a gap stays one."""
    rng = np.random.default_rng(count)
    values = rng.normal(0, 1, count)
    values[rng.random(count) < 0.01] = math.nan
    values[[0, -1]] = 0.5, -0.5
    kept = series.thinned(values, 50)
    assert len(kept) <= max(50, min(count, 50)) and (np.diff(kept) > 0).all()
    assert kept[0] == 0 and kept[-1] == count - 1
    assert np.nanmin(values[kept]) == np.nanmin(values)
    assert np.nanmax(values[kept]) == np.nanmax(values)
    assert np.isnan(values[kept]).any() == np.isnan(values).any()
    if count > 50:
        for part in np.array_split(np.arange(1, count - 1), 16):
            inside = values[np.intersect1d(kept, part)]
            assert np.nanmax(inside) == np.nanmax(values[part])
            assert np.nanmin(inside) == np.nanmin(values[part])


def test_a_hundred_thousand_steps_fit_into_two_megabytes(tmp_path, monkeypatch):
    """With 27 layers of 64 experts, and the page of the same run is the same."""
    folder = report_runs.folder(tmp_path / "long", 100_000, 28, 64)
    config = json.loads((folder / "config.json").read_text())
    rng = np.random.default_rng(0)
    names = [n for n, m in metrics.METRICS.items() if m.row == "step" and m.contract]
    names += [
        "lm_loss",
        "z_loss",
        "utilisation",
        "memory_gb",
        "routing_entropy",
        "mtp_loss",
        "left_device_share",
    ]
    numbers = rng.normal(2, 1, (100_000, len(names))).round(8)
    rows = [dict(zip(names, values, strict=True)) for values in numbers.tolist()]
    for i, row in enumerate(rows):
        row["step"] = i + 1
    rows[54321]["loss"] = 99.5
    rows += [{"step": s, "eval_loss": 2.0} for s in range(500, 100_001, 500)]
    steps = np.arange(1, 1001) * 100
    counts = rng.integers(0, 400, (1000, 27, 64), np.uint32)
    look = Look(str(folder), 0.0, config, rows, steps, counts, [])

    class Files:
        def __init__(self, workdir: str):
            pass

        def look(self) -> Look:
            return look

    monkeypatch.setattr(run_data, "RunFiles", Files)
    source = built(folder)
    assert len(source.encode()) < 2_000_000
    found = Page(source)
    assert all(len(found.series(n)[0]) <= 2000 for n in found.data["runs"][0]["series"])
    at, values = found.series("loss")
    assert values[at == 54322] == 99.5 and at[-1] == 100_000
    assert len(found.data["runs"][0]["load"]["expert_steps"]) == 200


def test_starts(tmp_path):
    """Kept whole, the newest thousand; what is no record is left out, and damage is no reason to end."""
    devices = [0] * 8 + [1] * 8 + [0]
    record = {"step": 3, "processes": starts.in_runs(devices)}
    assert record["processes"] == [[0, 8], [1, 8], [0, 1]] and starts.processes(record) == devices
    for bad in (3, [[0, 2**40]], [["0", 1]], [1], None):
        assert starts.processes({"processes": bad}) == []
    path = tmp_path / starts.NAME
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1200)) + '{"step": 1')
    starts.add(str(tmp_path), record)
    assert [r["step"] for r in starts.read(str(tmp_path))] == [*range(201, 1200), 3]
    assert os.listdir(tmp_path) == [starts.NAME]
    starts.add(str(tmp_path / "nowhere"), record)


def test_thousands_of_events_are_thinned(tmp_path):
    """Every second update of float16 overflows: the page stays small."""
    folder = report_runs.folder(tmp_path / "run", 9000)
    rows = [{"step": s, "loss": 1.0, "lr": 1.0, "skipped_steps": s // 2} for s in range(1, 9001)]
    report_runs.append(folder, rows)
    source = built(folder)
    assert len(source) < 600_000
    assert len(Page(source).marks()) == 4500 // -(-4500 // page.MARKS)
    assert "4,300 more are not in this table." in source


def test_the_same_files_make_the_same_page(whole):
    assert built(whole) == built(whole)


def test_hostile_names_are_text(tmp_path):
    """Where a user may give a name there is markup, script and what turns the order of text."""
    folder = report_runs.whole(tmp_path / "run", text=report_runs.HOSTILE)
    report_runs.append(folder, [{"step": 400, report_runs.HOSTILE: 1.5, "lr": 1.0}])
    source = built(folder, whole_of(tmp_path / report_runs.HOSTILE.replace("/", "|")))
    found = Page(source)
    assert [t for t in found.texts["script"] if "alert" in t] == [found.texts["script"][0]]
    kinds = [a.get("type") for tag, a in found.elements if tag == "script"]
    assert kinds == ["application/json", None, None, None]
    assert found.texts["script"][1:] == [(ASSETS / name).read_text() for name in page.SCRIPTS]
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"img", "iframe", "object", "embed", "link", "base", "form", "video"}
    for tag, attributes in found.elements:
        assert not [a for a in attributes if a.startswith("on") or a == "style"], (tag, attributes)
        assert not str(attributes.get("href", "#")).strip("#").startswith(("java", "data", "http"))
    assert "<script>alert(1)</script>" in found.text
    assert "\u202e" not in source and "\u2028" not in source
    block = source.partition('id="data">')[2].partition("</script>")[0]
    assert not set("<>&") & set(block) and block.isascii()


def whole_of(path: pathlib.Path) -> pathlib.Path:
    folder = report_runs.folder(path, 20)
    report_runs.append(folder, report_runs.rows_of(20))
    return folder


def test_the_policy_names_what_is_there(whole, whole_page):
    """Nothing but the scripts and styles in the page, each whole, as it is in the package."""
    meta = [a for tag, a in whole_page.elements if tag == "meta"]
    policy = next(a["content"] for a in meta if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    texts = [*whole_page.texts["script"][1:], *whole_page.texts["style"]]
    assert texts == [
        (ASSETS / n).read_text(encoding="utf-8") for n in (*page.SCRIPTS, *page.STYLES)
    ]
    for text in texts:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.count("sha256-") == len(texts)


def test_uplot_is_as_it_was_released():
    found = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (ASSETS / "uplot").iterdir()
    }
    assert found == UPLOT
    for name in (*page.SCRIPTS, *page.STYLES):  # nothing that an HTML parser takes for its own
        text = (ASSETS / name).read_text(encoding="utf-8").lower()
        assert not [w for w in ("<!--", "<script", "</script", "</style") if w in text], name
    for name in ("report.js", "maps.js"):
        text = (ASSETS / name).read_text()
        assert text.count("\n") < 300
        assert not [
            w
            for w in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(")
            if w in text
        ]


def test_what_happened(whole_page):
    marks = [m for m in whole_page.marks() if m[0] != "checkpoint"]
    assert marks == [("start", 200), ("spike", 220), ("skipped", 280), ("rollback", 283)]
    text = whole_page.text
    for said in (
        "the run begins on 8 devices of 2 processes",
        "goes on after step 200 on 8 devices of 2 processes, with sequence 1,600; 237 was reached",
        "before: 37 steps made again",
        "changed: config.log.run_name: a -> cluster-3",
        "loss 4.25, 31.5 deviations above the median 1.8",
        "no update in steps 280 to 282: not finite",
        "2,232 to 2,239, 2,240 to 2,247, 2,248 to 2,255",
        "rollback 1: from step 293 back to 282",
        "2,240 to 2,343",
        "of 400: finished",
        "neighbours along fsdp are in different processes",
        "device 6: fsdp 1, expert 2; process 1; experts 8 to 11",
        "State per device: 12.4 GB",
        "experts: 31.00 ms, 50.8%",
        "cluster-3 of step 400",
        "def cluster-3(): return",
        "3 of 213 options are not at their default".partition(" of ")[0] + " of",
    ):
        assert said in text, said


def test_the_data_of_steps_that_are_made_again(whole):
    """Sequences 1,600 to 1,895: 37 steps of 8 from step 200 on, as the options have them."""
    assert json.loads((whole / "config.json").read_text())["train"]["batch_size"] == 8
    assert "1,600 to 1,895" in read(whole).text


def test_the_map_of_experts(whole, whole_page):
    """Against NumPy: the highest of a column, and the experts' load over its steps, within half a unit of
    the scale."""
    steps, counts = load_history.read(str(whole / load_history.NAME))
    load = whole_page.data["runs"][0]["load"]
    relative = counts / counts.mean(axis=2, keepdims=True)
    fullest = np.frombuffer(base64.b64decode(load["fullest"]), "<u2").reshape(5, 400)
    assert load["steps"] == steps.tolist() and load["layers"][0] == "layer 1"
    np.testing.assert_allclose(fullest / load["layer_scale"], relative.max(axis=2).T, atol=0.0051)
    experts = np.frombuffer(base64.b64decode(load["load"]), "u1").reshape(5, 200, 16)
    pairs = counts.reshape(200, 2, 5, 16).sum(axis=1)
    wanted = (pairs / pairs.mean(axis=2, keepdims=True)).transpose(1, 0, 2)
    np.testing.assert_allclose(
        experts / load["expert_scale"], np.minimum(wanted, 255 / 32), atol=0.0157
    )
    worst = relative[:, 2].max(axis=1)
    assert (
        f"layer 3 {worst[-1]:.3f} {worst.mean():.3f} {worst.max():.3f} {worst.argmax() + 1}"
        in whole_page.text
    )


def test_a_large_map_has_fewer_columns_and_keeps_peaks():
    counts = np.full((1000, 3, 4), 100, np.uint32)
    counts[777, 1, 2] = 1000
    made = load_map.load_map(np.arange(1, 1001), counts, ["a", "b", "c"])
    assert made is not None and made.table[1].worst_step == 778
    fullest = np.frombuffer(base64.b64decode(made.data["fullest"]), "<u2").reshape(3, 400)
    assert fullest[1].max() == round(1000 / 325 * 100) and fullest[0].max() == 100
    large = load_map.load_map(np.arange(1, 101), np.ones((100, 58, 256), np.uint32), ["l"] * 58)
    assert large is not None and len(large.data["load"]) < 1.4 * load_map.EXPERT_BYTES


def test_numbers_that_are_not_finite(tmp_path):
    """NaN in the file, as another program may write it, text instead of a number, and a row cut by a kill."""
    folder = report_runs.folder(tmp_path / "run", 50)
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3.5, "lr": 0.1, "skipped_steps": 0}\n'
        '{"step": 2, "loss": NaN, "lr": Infinity, "skipped_steps": 1}\n'
        '{"step": 3, "loss": "low", "lr": 0.1, "skipped_steps": 2, "received_by_device": [1]}\n'
        '{"step": true, "loss": 1}\n{"loss": 2}\nnot JSON\n[1]\n'
        '{"step": 4, "loss": 1.5, "lr"'
    )
    found = read(folder)
    steps, loss = found.series("loss")
    assert steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(loss, [3.5, math.nan, math.nan])
    assert found.marks() == [("skipped", 2)] and "no update in steps 2 to 3" in found.text
    assert "received_by_device" not in found.data["runs"][0]["series"]


def test_steps_that_are_there_twice(tmp_path):
    """A file of two starts one after the other: what the second made again replaces the first's rows."""
    folder = report_runs.folder(tmp_path / "run", 60)
    report_runs.append(folder, [r for r in report_runs.rows_of(60) if r["step"] <= 40])
    again = report_runs.rows_of(60, seed=5, start=25)
    report_runs.append(folder, again)
    found = read(folder)
    steps, loss = found.series("loss")
    assert steps.tolist() == list(range(1, 61))
    np.testing.assert_array_equal(loss[25:], [r["loss"] for r in again if "loss" in r])
    assert ("start", 25) in found.marks() and "goes on after step 25; 40 was reached" in found.text


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_runs_that_have_hardly_begun(rows, tmp_path):
    folder = report_runs.folder(tmp_path / "run", 100)
    report_runs.append(folder, report_runs.rows_of(100)[:rows])
    found = read(folder)
    assert len(found.data["charts"]) == (0 if not rows else len(found.data["charts"]))
    assert ("no step has been logged yet" in found.text) == (not rows)
    assert found.data["runs"][0]["load"] is None and "heat" not in found.text


def test_without_metrics_and_with_little(tmp_path):
    """An earlier version's folder: no file of experts, processes or starts."""
    folder = report_runs.folder(tmp_path / "run")
    assert "no step has been logged yet" in read(folder).text
    report_runs.append(folder, report_runs.rows_of(100)[:50])
    assert "of 100: stopped" in read(folder).text


def test_runs_over_each_other(whole, tmp_path):
    other = report_runs.folder(tmp_path / "whole", 300)
    report_runs.append(other, report_runs.rows_of(300, seed=3))
    found = read(whole, other)
    names = [run["name"] for run in found.data["runs"]]
    assert names == [f"{whole.parent.name}/whole", f"{tmp_path.name}/whole"]
    assert found.series("loss", 1)[0][-1] == 300
    held = min(r["eval_loss"] for r in lines(other) if "eval_loss" in r)
    assert f"{held:.6g}" in found.text and "tokens_seen, last 6,553,600 4,915,200" in found.text
    assert "train.steps 400 300" in found.text and "model.num_hidden_layers 6 3" in found.text
    with pytest.raises(UserError, match="named twice"):
        built(whole, whole)


def test_the_command(whole, tmp_path, capsys):
    out = tmp_path / "out.html"
    assert __main__.main([str(whole), f"--out={out}"]) == 0
    assert capsys.readouterr().out.startswith(f"{out} (0.")
    assert out.read_text(encoding="utf-8") == built(whole)
    folder = whole_of(tmp_path / "run")
    assert __main__.main([str(folder)]) == 0
    assert (folder / "report.html").exists()
    assert not [n for n in os.listdir(folder) if n.endswith(".tmp")]
    capsys.readouterr()
    for arguments, said in (
        ([str(tmp_path / "nothing")], "holds no run: there is no"),
        ([str(folder), f"--out={tmp_path / 'no' / 'where.html'}"], "cannot be written"),
        ([], "WORKDIR"),
    ):
        assert __main__.main(arguments) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err


def test_what_keeps_a_run_from_its_page_is_a_line(whole, tmp_path, capsys, monkeypatch):
    """No mistake in a page, and no full disk, ends a run with an error."""
    started.report(str(tmp_path / "nothing"))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "report.html is not written (UserError: --workdir=" in err
    monkeypatch.setattr(page, "build", lambda *_: 1 / 0)
    started.report(str(whole))
    assert "is not written (ZeroDivisionError: division by zero)" in capsys.readouterr().err


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.os, "fsync", full)
    with pytest.raises(OSError):
        page.write(str(path), "new")
    assert os.listdir(tmp_path) == ["report.html"] and path.read_text() == "old"
