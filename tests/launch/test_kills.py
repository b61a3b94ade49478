"""Runs that are killed, stopped and started again: the small version of `make storm`, and processes
that come and go."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.durability import faults, storm, storm_processes
from benchmarks.durability.faults import Process
from benchmarks.durability.storm_processes import Fault, launched
from tests.support.runs import with_own_cache

LIMIT = 400.0


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """Of processes that share their compiled programs, and with no others: a kill may damage them."""
    return with_own_cache(faults.environment(tmp_path_factory.mktemp("cache")))


@pytest.mark.slow
def test_a_small_storm(tmp_path):
    """Two kills and two signals; losses of every step are those of the run that nobody disturbed,
    bit for bit."""
    said = []
    found = storm.run(tmp_path, ["kills", "signals"], 2, 0, 1, said.append)
    assert sum(t.tried for t in found.values()) == 4
    assert all(t.wrong == 0 and t.survived == t.tried for t in found.values()), (found, said)
    assert all(t.steps_lost == 0 for name, t in found.items() if name.startswith("signal")), found
    text = storm.table({name: vars(t) for name, t in found.items()})
    assert len(text.splitlines()) == 1 + len(found) and "steps lost (max)" in text


def test_the_storm_finds_what_is_wrong(tmp_path):
    """Another loss, a step logged twice, a step that is missing in the undisturbed run."""
    path = tmp_path / "metrics.jsonl"
    row = '{{"step": {}, "loss": {}, "grad_norm": 1.0, "tokens_seen": 5}}\n'
    path.write_text(
        row.format(1, 2.5)
        + row.format(2, 2.25)
        + '{"step": 2, "eval_loss": 1.0}\n'
        + row.format(3, 2.0)[:20]
    )
    calm, twice = faults.rows(tmp_path)
    assert sorted(calm) == [1, 2] and twice == 0 and faults.differing(tmp_path, calm) == 0
    assert faults.differing(tmp_path, calm | {2: (2.2500002, 1.0, 5)}) == 1
    assert faults.differing(tmp_path, {1: calm[1]}) == 1
    path.write_text(row.format(1, 2.5) * 2)
    assert faults.differing(tmp_path, calm) == 1


@pytest.mark.slow  # a minute, most of it waiting; tests/cluster/test_monitor.py has its parts
def test_processes_that_are_lost(tmp_path, env):
    """Two processes. Number 0 is killed, then stopped: each time it is named, the other ends, the
    launcher starts again, at last without it, and the run goes on in one process. Losses are those
    of two processes that nobody disturbed."""
    text, options = faults.corpus(tmp_path), {"mesh__fsdp": -1, "watchdog__heartbeat_timeout": 10.0}
    with Process(
        launched(2, faults.train(tmp_path / "calm", text, train__steps=60, **options)), env
    ) as calm:
        assert calm.wait(LIMIT) == 0, calm.lines
    reference, _ = faults.rows(tmp_path / "calm")
    workdir, said = tmp_path / "run", []
    # A life is long enough for the next fault to come in time.
    command = launched(
        2,
        faults.train(workdir, text, train__steps=100_000, **options),
        "--max_restarts=3",
        "--min_processes=1",
    )
    with Process(command, env) as p:
        found = storm_processes.disturb(
            p, 2, (Fault(0, signal.SIGKILL), Fault(0, signal.SIGSTOP)), workdir, said.append
        )
        assert all(t.tried == t.detected == t.survived and not t.wrong for t in found.values()), (
            found,
            p.lines,
        )
        output = "\n".join(p.lines)
        assert re.search(r"process 0 \(.*\) was lost after step \d+: its connection closed", output)
        assert re.search(
            r"process 0 \(.*\) was lost after step \d+: it gave no sign of life for 10 s", output
        )
        assert "stacks of process 1" in output, "of the one that still could"
        assert (
            "restart 2 of 3 in 2 s, with 1 process without place 0, which failed twice in a row."
            in output
        )
        line = len(p.lines)
        assert p.wait_for(r"step +\d+/", LIMIT, line)
        p.kill(signal.SIGTERM)
        assert p.wait(LIMIT) == 143
    after, twice = faults.rows(workdir)
    resumed = [int(step) for step in re.findall(r"resuming after step (\d+)", "\n".join(p.lines))]
    common = sorted(set(after) & set(reference))
    assert (
        twice == 0
        and len(resumed) == 2
        and sorted(after) == list(range(1, len(after) + 1))
        and common[-1] > resumed[1]
    )

    def of(rows, i):
        return [rows[s][i] for s in common]

    np.testing.assert_allclose(of(after, 0), of(reference, 0), rtol=1e-5)
    assert of(after, 2) == of(reference, 2)
    assert [after[s] for s in common if s <= resumed[1]] == [
        reference[s] for s in common if s <= resumed[1]
    ], "in two processes the same bits"


def test_a_lost_place_is_mended(tmp_path):
    """SIGUSR2 to the launcher stops the processes that are left, and starts all again."""
    (tmp_path / "program.py").write_text(
        "import os, signal, sys, time\n"
        "count, me = int(os.environ['JAX_NUM_PROCESSES']), int(os.environ['JAX_PROCESS_ID'])\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "if count == 2 and me == 1 and not os.path.exists('mended'): sys.exit(9)\n"
        "print(f'{me} of {count}', flush=True)\n"
        "for _ in range(1000): time.sleep(0.1)\n"  # a signal just before a sleep does not end it
    )
    command = [
        "-m",
        "deepseek_jax.launch",
        "--nproc_per_node=2",
        "--max_restarts=5",
        "--min_processes=1",
        str(tmp_path / "program.py"),
    ]
    with Process(command, os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=tmp_path) as p:
        assert p.wait_for("^0 of 1$", 60), p.lines
        (tmp_path / "mended").touch()
        line = len(p.lines)
        p.kill(signal.SIGUSR2)
        assert p.wait_for("starting again with all 2 processes", 60, line) and p.wait_for(
            "^\\[1\\] 1 of 2$", 60, line
        ), p.lines
        p.kill(signal.SIGUSR2)  # all are there
        p.kill(signal.SIGTERM)
        assert (
            p.wait(60) == 143 and len([text for text in p.lines if "starting again" in text]) == 1
        )


def test_processes_that_do_not_fit(tmp_path):
    """Four processes on a mesh that three do not fit: two go on. A program that fails needs no
    training to show it."""
    (tmp_path / "program.py").write_text(
        "import os, sys, time\n"
        "count, me = int(os.environ['JAX_NUM_PROCESSES']), int(os.environ['JAX_PROCESS_ID'])\n"
        "open(f'start.{count}.{me}.{os.getpid()}', 'w')\n"
        "if count == 4 and me == 3: sys.exit(9)\n"
        "if count == 3: sys.exit(2)\n"
        "time.sleep(0 if count == 2 else 60)\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "deepseek_jax.launch",
            "--nproc_per_node=4",
            "--max_restarts=5",
            "--min_processes=2",
            "--grace=5",
            "program.py",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(faults.ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "restart" in line or "fit" in line]
    assert lines == [
        "deepseek_jax.launch: restart 1 of 5 in 1 s, with 4 processes.",
        "deepseek_jax.launch: restart 2 of 5 in 2 s, with 3 processes without place 3, which "
        "failed twice in a row.",
        "deepseek_jax.launch: 3 processes do not fit; trying 2.",
    ]
    assert len(list(pathlib.Path(tmp_path).glob("start.2.*"))) == 2


@pytest.mark.parametrize(
    "code, starts", [(2, 1), (3, 1), (143, 1), (138, 1), (0, 1), (1, 3), (137, 3)]
)
def test_what_is_started_again(tmp_path, code, starts):
    """--max_restarts=2; a mistake, bad numbers and a stop by signal would only come again."""
    (tmp_path / "program.py").write_text(
        "import os, signal, sys\nopen(f'start.{os.getpid()}', 'w')\nos.kill(os.getpid(), 9) if "
        f"{code} == 137 else sys.exit({code})\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "deepseek_jax.launch", "--max_restarts=2", "program.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(faults.ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == code and len(list(tmp_path.glob("start.*"))) == starts


@pytest.mark.parametrize(
    "count, number",
    [pytest.param(1, signal.SIGINT, marks=pytest.mark.slow), (2, signal.SIGTERM)],
)
def test_a_signal_while_it_compiles(tmp_path, count, number):
    """Ends all processes at once, with one line: there is nothing to save."""
    arguments = faults.train(
        tmp_path / "run",
        faults.corpus(tmp_path),
        compile__cache_dir="off",
        mesh__fsdp=-1,
        train__steps=100_000,
        model__num_hidden_layers=4,
        model__num_nextn_predict_layers=2,
    )  # a program of some seconds
    env = with_own_cache(faults.environment(tmp_path))
    with Process(launched(count, arguments), env) as p:
        assert p.wait_for("^workdir ", LIMIT), p.lines
        p.kill(number)
        assert p.wait(LIMIT) == 128 + number
    (line,) = [
        line for line in p.lines if "stopped" in line or "Traceback" in line or "lost" in line
    ]
    assert (
        line
        == f"train.py: stopped by signal {int(number)} before the first step; there was nothing to save."
    )
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


HANGS = """
import os, runpy, sys, time
from deepseek_jax.data.loader import Loader
read = Loader.train_rows
def hangs_here(self, start, count):
    if os.environ["JAX_PROCESS_ID"] == "1" and start >= 80:
        time.sleep(1000)
    return read(self, start, count)
Loader.train_rows = hangs_here
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_step_that_hangs(tmp_path, env):
    """One of two processes gets no data; the other waits in a collective. Both print their stacks
    and end, with the code that is restarted on."""
    (tmp_path / "hangs.py").write_text(HANGS)
    arguments = faults.train(
        tmp_path / "run",
        faults.corpus(tmp_path),
        mesh__fsdp=-1,
        train__steps=100_000,
        watchdog__step_timeout=15.0,
    )[1:]
    with Process(launched(2, [str(tmp_path / "hangs.py"), *arguments]), env) as p:
        assert p.wait(LIMIT) == 6, p.lines
    output = "\n".join(p.lines)
    assert re.search(
        r"train.py: a step does not end: process \d saw no step end for 1\d s after step \d+",
        output,
    ), output
    for process in (0, 1):
        assert f"stacks of process {process} (" in output
    assert "in hangs_here" in output and max(faults.rows(tmp_path / "run")[0]) >= 8
