"""What ends a run, or refuses one: the watchdog of its steps, the lock of its folder."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.run import lock, watchdog
from deepseek_jax.run.watchdog import Watchdog
from tests import support

ROOT = str(support.ROOT)


class Clock:
    """time.monotonic, moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)


class Turned(Watchdog):
    """A watchdog whose thread looks only when it is told to."""

    def __init__(self, timeout: float):
        self.found: list[tuple[int, float]] = []
        super().__init__(timeout, lambda *found: self.found.append(found))

    def _watch(self) -> None:
        pass

    def look(self, clock: Clock, seconds: float, every: float = 1.0) -> bool:
        """Lets time pass; whether the run counts as hung then."""
        looks = iter([False] * round(seconds / every) + [True])

        def wait(_):
            clock.now += every
            return next(looks)

        self._closed.wait = wait  # type: ignore  # the clock that the thread sleeps by
        Watchdog._watch(self)
        return bool(self.found)


def test_a_step_that_does_not_end_is_found(monkeypatch):
    clock = Clock(monkeypatch)
    w = Turned(60.0)
    assert not w.look(clock, 500), "the first step compiles"
    for step in range(5):
        w.beat(step)
        assert not w.look(clock, 50)
    assert w.look(clock, 12) and w.found[0][0] == 4 and 60 < w.found[0][1] < 63


def test_what_may_take_long_and_what_is_not_waited_for(monkeypatch):
    clock = Clock(monkeypatch)
    w = Turned(60.0)
    w.beat(1)
    with w.paused():
        with w.paused():
            assert not w.look(clock, 300)
        assert not w.look(clock, 300)
    assert not w.look(clock, 59)
    w.beat(1)  # a batch of an evaluation
    assert not w.look(clock, 59)
    w.beat(2)
    assert not w.look(clock, 25, every=1.0) and not w.look(clock, 40_000, every=20_000.0), (
        "seconds in which this process did not run do not count"
    )
    assert w.look(clock, 40)
    assert Turned(0)._timeout == 0 and threading.active_count() < 50


def test_the_time_is_chosen(monkeypatch):
    clock = Clock(monkeypatch)
    w = Turned(-1)
    assert w.limit() == 600
    for step in range(50):
        w.beat(step)
        clock.now += 100.0 if step % 2 else 90.0
    assert w.limit() == pytest.approx(20 * np.median([90, 100] * 24 + [90]))
    for step in range(50, 200):
        w.beat(step)
        clock.now += 0.5
    assert w.limit() == 600


def test_the_stacks_of_all_threads_are_printed():
    program = """
        import threading, time
        from deepseek_jax.run.watchdog import Watchdog
        def reads_for_ever(): time.sleep(600)
        def waits_for_ever(): time.sleep(600)
        threading.Thread(target=reads_for_ever, daemon=True).start()
        w = Watchdog(0.5)
        w.beat(41)
        waits_for_ever()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 6 and done.stdout == ""
    assert (
        done.stderr.startswith("train.py: a step does not end: none ended for ")
        and " after step 41. The stacks follow.\n" in done.stderr
    )
    assert "in reads_for_ever" in done.stderr and "in waits_for_ever" in done.stderr


def test_one_run_a_folder(tmp_path):
    """The second one is told who has it; a killed one leaves nothing behind that counts."""
    held = (
        "import sys, time\nfrom deepseek_jax.run import lock\nwith lock.locked(sys.argv[1]):\n"
        "    print('held', flush=True)\n    time.sleep(600)"
    )
    p = subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert p.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refusal, lock.locked(str(tmp_path), wait=0.2):
            pytest.fail("two runs in one folder")
        text = str(refusal.value)
        assert (
            f"--workdir={tmp_path} is in use by another run (host {os.uname().nodename}, "
            f"process {p.pid}, since 20"
            in text
            and "\n" not in text
        )
        threading.Timer(0.3, p.send_signal, (signal.SIGKILL,)).start()
        with lock.locked(str(tmp_path), wait=30):  # waits until the other is gone
            assert f"process {os.getpid()}," in (tmp_path / "lock").read_text()
        with lock.locked(str(tmp_path)):
            pass
    finally:
        p.kill()
        p.wait()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with lock.locked(str(tmp_path)), lock.locked(str(tmp_path)):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be opened"), lock.locked(str(tmp_path / "file")):
        pass
