"""`python -m deepseek_jax.top`: what it shows of the folder of a run."""

import functools
import io
import json
import math
import os
import time

import numpy as np
import pytest
from rich.console import Console

from deepseek_jax.errors import UserError
from deepseek_jax.report.run_files import RunFiles
from deepseek_jax.top import __main__, view
from deepseek_jax.train import load_history, process_state
from deepseek_jax.train.process_state import ProcessState


def row(step: int, **more) -> dict:
    return {
        "step": step,
        "loss": 3 - step / 100,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "step_time_s": 2.0,
        "tokens_per_sec": 12345.6,
        "tokens_seen": step * 1000,
        "memory_gb": 1.5,
        **more,
    }


@pytest.fixture
def run(tmp_path):
    """The folder of a run of 100 steps of a model with a dense layer, two of experts and one of those that
    predicts ahead."""
    folder = tmp_path / "run"
    folder.mkdir()
    model = {"first_k_dense_replace": 1, "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps({"model": model, "train": {"steps": 100}}))
    return folder


def append(folder, *rows) -> None:
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)


def shown(files: RunFiles, width: int = 100, height: int | None = None) -> str:
    console = Console(width=width, height=height, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(view.draw(files.look(), width, height))
    return capture.get()


def test_before_the_first_step(run):
    assert "no step has been logged yet, of 100" in shown(RunFiles(str(run)))


def test_what_a_run_says_of_itself(run):
    append(run, *(row(i) for i in range(1, 41)), {"step": 20, "eval_loss": 2.5})
    append(run, {"step": 30, "spike_loss": 9.0, "median_loss": 2.7, "deviations": 12.3})
    append(run, {"step": 31, "rollback": 1, "rolled_back_from": 33})
    append(run, {"step": 40, "eval_loss": 2.75})
    history = load_history.LoadHistory(
        str(run / load_history.NAME), load_history.record(3, 4), 0, 10
    )
    history.add(30, np.ones((3, 4)))
    history.add(40, np.array([[4, 4, 4, 4], [0, 0, 2, 14], [3, 5, 4, 4]]))
    ProcessState(str(run), 0, 2, lambda: 1.25).write(40)
    page = shown(RunFiles(str(run)))
    for text in (
        "step 40 of 100 (40%), 0:02 left",
        "loss 2.6000",
        "12,346 tokens/s",
        "1.5 GB",
        "40,000 tokens seen",
        "held-out loss 2.7500 at step 40, lowest 2.5000 at step 20",
        "spike at step 30: 9.0000, 12 deviations",
        "rollback 1: from step 33 to 30",
        "loss, steps 1 to 40",
        "tokens by expert, step 40",
        "fullest 3.50, 2 idle",
        "predicts 2 ahead",
        "step 40  1.25 GB",
    ):
        assert text in page.replace("0:02:00", "0:02"), (text, page)
    assert [line for line in page.splitlines() if "layer 1" in line and "▄▄" in line]
    assert "layer 0" not in page and "layer 3" not in page


def test_it_reads_what_is_new_and_starts_over_where_the_file_is_new(run):
    """Half a line is read when it is whole; a restart drops rows and renames another file over it."""
    files = RunFiles(str(run))
    append(run, row(1))
    with open(run / "metrics.jsonl", "a") as f:
        f.write(json.dumps(row(2))[:20])
    assert [r["step"] for r in files.look().rows] == [1]
    with open(run / "metrics.jsonl", "a") as f:
        f.write(json.dumps(row(2))[20:] + "\nnot JSON\n")
    append(run, row(3))
    assert [r["step"] for r in files.look().rows] == [1, 2, 3]
    (run / "new").write_text("".join(json.dumps(row(i)) + "\n" for i in (1, 2, 7, 8)))
    os.replace(run / "new", run / "metrics.jsonl")
    assert [r["step"] for r in files.look().rows] == [1, 2, 7, 8]


def test_nothing_in_the_files_steers_the_terminal(run):
    bad = "[red]\x1b[2J\u202e"
    append(run, row(1, stage=1, stage_name=bad))
    (run / "processes").mkdir()
    said = {"process": 0, "host": bad, "pid": 1, "state": bad, "step": 1, "time": 0, "memory_gb": 1}
    (run / "processes" / "00000.json").write_text(json.dumps(said))
    page = shown(RunFiles(str(run)))
    assert page.count("[red]?[2J?") == 3 and "\x1b" not in page and "\u202e" not in page


def test_a_silent_process_is_marked(run):
    for number in range(3):
        ProcessState(str(run), number, 3, lambda: 1.0).write(
            5, "ended" if number == 2 else "training"
        )
    for number, ago in ((1, 100), (2, 100)):
        path = run / "processes" / f"{number:05d}.json"
        said = json.loads(path.read_text())
        path.write_text(json.dumps(said | {"time": time.time() - ago}))
    page = shown(RunFiles(str(run)))
    assert page.count(": late") == 1 and "0:01:40 ago: late" in page


def test_processes_of_an_earlier_start_go(run):
    for number in range(4):
        ProcessState(str(run), number, 4, lambda: 1.0).write(5)
    ProcessState(str(run), 0, 2, lambda: 1.0)
    assert [p["process"] for p in process_state.read(str(run))] == [0, 1]
    (run / "processes" / "00001.json").write_text("{}")
    with pytest.raises(UserError, match="00001.json cannot be read"):
        process_state.read(str(run))


def test_a_process_writes_now_and_then(run, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(process_state.time, "monotonic", lambda: now[0])
    state = ProcessState(str(run), 0, 1, lambda: 1.0)
    for step, at in ((1, 0.0), (2, 1.0), (3, 2.5), (4, 3.0)):
        now[0] = at
        state.write(step)
        assert process_state.read(str(run))[0]["step"] == {1: 1, 2: 1, 3: 3, 4: 3}[step]
    state.write(5, "ended")
    assert process_state.read(str(run))[0]["state"] == "ended"


def test_a_page_is_no_higher_than_the_terminal(run):
    """Of 60 layers those with the fullest experts, in their order."""
    rng = np.random.default_rng(0)
    counts = rng.integers(90, 110, (60, 256))
    counts[[7, 41], 200] = 900
    kind = load_history.record(60, 256)
    load_history.LoadHistory(str(run / load_history.NAME), kind, 0, 1).add(1, counts)
    append(run, row(1), row(2))
    config = {"model": {"first_k_dense_replace": 1, "num_hidden_layers": 61}, "train": {"steps": 9}}
    (run / "config.json").write_text(json.dumps(config))
    page = shown(RunFiles(str(run)), 80, 40)
    assert len(page.splitlines()) <= 40
    assert page.index("layer 8 ") < page.index("layer 42 ")
    assert all(len(line) <= 80 for line in page.splitlines())


def test_curve():
    """From the lowest to the highest; what shares a column is averaged; a gap where nothing is finite."""
    lines = view.curve([0, 1, 2, 3], 4, 2)
    assert [line[:9].strip() for line in lines] == ["3", "0"]
    assert [line[10:] for line in lines] == ["  ▃█", "▁▆██"]
    assert view.curve([1, 3, 5, 7], 2, 1)[0].endswith("▁█")
    assert view.curve([1, math.nan, 2], 7, 1)[0].endswith("▁▁  ██")
    assert view.curve([4.0] * 5, 10, 1)[0].endswith(" " + "▁" * 10)
    assert view.curve([math.inf], 10, 1)[0].strip() == "0"


def test_bars():
    assert view.bars(np.array([0, 0.5, 1, 2, 9]), 10) == " ▂▄██"
    assert view.bars(np.array([0, 1, 0.5, 2]), 2) == "▄█"


def test_the_command(run, tmp_path, capsys):
    append(run, row(1), row(2))
    assert __main__.main([str(run)]) == 0  # no terminal: once
    assert "step 2 of 100" in capsys.readouterr().out
    for arguments, said in (
        ([str(tmp_path / "nothing")], "holds no run"),
        ([str(run), "--interval=0"], "'0' is not a number above 0"),
        ([], "WORKDIR"),
    ):
        assert __main__.main(arguments) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err


def test_live(run, monkeypatch):
    """Looks again and again, until Ctrl-C, which is no failure."""
    out, looks = io.StringIO(), []
    console = functools.partial(Console, file=out, force_terminal=True, width=80, height=40)
    monkeypatch.setattr(__main__, "Console", console)

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt
        append(run, row(len(looks)))

    monkeypatch.setattr(__main__.time, "sleep", sleep)
    assert __main__.main([str(run), "--interval=0.5"]) == 0
    assert looks == [0.5] * 3
    assert "step 1 of 100" in out.getvalue() and "step 2 of 100" in out.getvalue()
