"""The watch over several processes, here threads of one: who is lost, who hangs, and the step that
all stop after; restarts, signals."""

import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from deepseek_jax.cluster import monitor as monitors
from deepseek_jax.cluster import ports, wire
from deepseek_jax.cluster.end import End
from deepseek_jax.cluster.monitor import Monitor
from deepseek_jax.errors import ExitCode
from deepseek_jax.launch.restarts import Restarts, first_failed
from tests import support
from tests.support.strangers import visit

ROOT = str(support.ROOT)
TOKEN = wire.job_token({}, "job")


class Ended(Exception):
    """In place of the end of a process."""


class Recorded(Monitor):
    """A process that notes what would have ended it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.info: End | None = None
        self.ended = threading.Event()

    def _end(self, end, say=None):
        if not self._closed:
            self.info = end
            self._closed = True
            self.ended.set()


@pytest.fixture
def together(monkeypatch):
    """`count` monitors that are connected."""
    made = []
    monkeypatch.setattr(monitors, "delay_abort", lambda: None)  # of the test's own process

    def make(count: int, timeout: float = 60.0) -> list[Recorded]:
        ms = [Recorded("train.py", i, count, timeout, TOKEN) for i in range(count)]
        made.extend(ms)
        where = ms[0].serve("127.0.0.1")
        for m in ms:  # process 0 first, which greets the others
            m.connect("127.0.0.1", where)
        deadline = time.monotonic() + 30
        while len(ms[0]._watched) < count - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        return ms

    yield make
    for m in made:
        m.close()


def test_a_closed_connection_is_a_lost_process(together):
    ms = together(4)
    for m in ms:
        assert m.after(7) is None
    ms[2]._closed = True  # its thread says no more
    ms[2]._to_first.socket.shutdown(socket.SHUT_RDWR)
    for m in (ms[0], ms[1], ms[3]):
        assert m.ended.wait(30)
        assert (
            m.info.process == 2
            and m.info.code == ExitCode.LOST
            and "connection closed" in m.info.why
            and not m.info.stacks
        )


def test_process_0_is_lost(together):
    ms = together(3)
    ms[0]._lost = lambda *_, **__: None
    ms[0]._closed = True
    for peer in ms[0]._watched:
        peer.connection.socket.shutdown(socket.SHUT_RDWR)
    for m in ms[1:]:
        assert m.ended.wait(30) and m.info.process == 0 and m.info.code == ExitCode.LOST


def test_silence_is_a_lost_process(together, monkeypatch):
    """Process 1 sends nothing any more; the others' stacks are asked for. Process 2, which is done,
    is not missed."""
    monkeypatch.setattr(
        wire.Connection,
        "send",
        lambda self, _send=wire.Connection.send, **m: (
            None if "beat" in m and m["beat"] == 99 else _send(self, **m)
        ),
    )
    ms = together(3, 2.0)
    ms[2].close()
    ms[1].stop.step = 99
    assert ms[0].ended.wait(60)
    assert (
        ms[0].info.process == 1
        and "no sign of life for 2 s" in ms[0].info.why
        and ms[0].info.stacks
    )


def test_a_hung_step_ends_all_and_names_the_slowest(together, monkeypatch):
    monkeypatch.setattr(monitors, "GRACE", 0.0)
    ms = together(3, 1.0)  # a beat every 0.1 s
    for m, step in zip(ms, (9, 8, 9), strict=True):
        m.after(step)
    deadline = time.monotonic() + 30
    while [p.step for p in sorted(ms[0]._watched, key=lambda p: p.index)] != [
        8,
        9,
    ] and time.monotonic() < deadline:
        time.sleep(0.01)
    ms[2].hung(9, 33.0)
    for m in ms[:2]:
        assert m.ended.wait(30) and m.info.code == ExitCode.HUNG and m.info.stacks
        assert (
            "process 2 saw no step end for 33 s after step 9; process 1 is the furthest behind, at step 8"
            in m.info.why
        )


def test_a_failure_is_told(together, monkeypatch):
    monkeypatch.setattr(monitors, "GRACE", 0.0)
    ms = together(3)
    ms[1].failed("ValueError: broken")
    for m in (ms[0], ms[2]):
        assert (
            m.ended.wait(30)
            and m.info.process == 1
            and m.info.why == "it ended with ValueError: broken"
            and m.info.code == ExitCode.LOST
        )


def test_a_mistake_in_process_0_is_not_a_loss(together):
    ms = together(2)
    ms[0].close("it ended because of a mistake", 2)
    assert ms[1].ended.wait(30) and ms[1].info.code == 2


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_all_stop_after_the_same_step(together, asked):
    """Threads that step at their own pace, at most two apart, as processes do whose device programs
    wait for each other."""
    ms = together(4)
    steps, stopped, turn = [0] * 4, [None] * 4, threading.Condition()

    def train(i: int) -> None:
        rng = __import__("random").Random(i)
        for step in range(1, 10**6):
            with turn:
                turn.wait_for(lambda step=step: min(steps) >= step - 2)
                steps[i] = step
                turn.notify_all()
            time.sleep(rng.random() * 1e-3)
            if (number := ms[i].after(step)) is not None:
                stopped[i] = (step, number)
                return

    threads = [threading.Thread(target=train, args=(i,), daemon=True) for i in range(4)]
    for t in threads:
        t.start()
    with turn:
        assert turn.wait_for(lambda: min(steps) >= 20, 60)
    ms[asked].request_stop(signal.SIGINT)
    ms[3 - asked].request_stop(signal.SIGTERM)  # of Ctrl-C and a scheduler one is first
    for t in threads:
        t.join(60)
    assert len(set(stopped)) == 1 and stopped[0] is not None, stopped
    assert (
        stopped[0][0] > 20
        and stopped[0][1] in (signal.SIGINT, signal.SIGTERM)
        and not any(m.info for m in ms)
    )


def test_others_answer_before_process_0(together, monkeypatch):
    """Asked when to stop, every other process has answered before process 0 goes on."""

    def send(self, _send=wire.Connection.send, **m):
        _send(self, **m)
        time.sleep(0.3 if "ask" in m else 0.0)

    monkeypatch.setattr(wire.Connection, "send", send)
    ms = together(3)
    for m, step in zip(ms, (9, 8, 7), strict=True):
        m.after(step)
    ms[0].request_stop(signal.SIGTERM)
    assert ms[0].after(10) == signal.SIGTERM
    for m, step in zip(ms[1:], (9, 8), strict=True):
        assert [m.after(s) for s in range(step, 11)] == [None] * (10 - step) + [signal.SIGTERM]


def test_who_leaves_need_not_answer(together):
    ms = together(3)
    ms[2]._told = lambda m: ms[2].close()
    for m in ms[:2]:
        m.after(7)
    ms[1].request_stop(signal.SIGINT)
    deadline = time.monotonic() + 30
    while not all(m.stop._asked for m in ms[:2]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [m.after(8) for m in ms[:2]] == [signal.SIGINT] * 2


def test_a_stranger_is_no_process(together):
    """Nor is a process that knows the job's token and not the salt of this start."""
    ms = together(2)
    port = ms[0]._hub.port
    visit(port)
    with pytest.raises(wire.Refused):
        wire.connect(("127.0.0.1", port), wire.derived(TOKEN, "an earlier start"), 1, 5, 5)
    assert len(ms[0]._watched) == 1 and not any(m.info for m in ms)


def test_a_message_that_is_too_long(together, monkeypatch):
    """It cannot be from a process of this job: that one counts as lost."""
    ms = together(2)
    monkeypatch.setattr(wire.Connection.read, "__defaults__", (1 << 10,))
    ms[1]._to_first.send(beat="x" * 5000)
    assert ms[0].ended.wait(30) and ms[0].info.process == 1


def test_dropped_in_the_turn_in_which_they_speak(monkeypatch):
    """Process 0 reads of several at once: one that makes room for another is not read any more."""
    monkeypatch.setattr(wire, "SPARE_CONNECTIONS", 0)
    hub = wire.Hub(ports.listen("127.0.0.1", 0), TOKEN, 1)
    first = socket.create_connection(("127.0.0.1", hub.port))
    assert hub.wait(10) == [] and len(hub._greeting) == 1
    second = socket.create_connection(("127.0.0.1", hub.port))
    first.sendall(b"1\n")
    time.sleep(0.2)
    for _ in range(3):
        assert hub.wait(0.1) == []
    for end in (first, second, hub):
        end.close()


def test_many_silent_strangers(together, monkeypatch):
    """They are dropped, the oldest first, before they use up process 0's files, and all after a while."""
    monkeypatch.setattr(wire, "SPARE_CONNECTIONS", 3)
    monkeypatch.setattr(wire, "GREETING_TIMEOUT", 1.0)
    ms = together(2, 1.0)  # a beat every 0.1 s
    address = ("127.0.0.1", ms[0]._hub.port)
    silent = [socket.create_connection(address, timeout=20) for _ in range(8)]
    for s in silent:
        while s.recv(1 << 10):  # the challenge, then the end
            continue
        s.close()
    assert not any(m.info for m in ms) and not ms[0]._hub._greeting


def test_restarts():
    r = Restarts(4, 2, 10)
    for code in (0, 2, 3, 130, 143, 128 + signal.SIGHUP, 128 + signal.SIGUSR1):
        assert r.after(code, 0, 1.0) is None
    texts = []
    for failed in (1, 2, 2, 0, 0, 3, 3):
        start = r.after(137, failed, 1.0)
        texts.append((start.places, start.delay))
    assert texts == [
        ([0, 1, 2, 3], 1.0),
        ([0, 1, 2, 3], 2.0),
        ([0, 1, 3], 4.0),
        ([0, 1, 3], 8.0),
        ([1, 3], 16.0),
        ([1, 3], 32.0),
        ([1, 3], 60.0),
    ]
    assert r.after(4, None, 700.0).delay == 1.0  # it had lasted
    assert r.grow().places == [0, 1, 2, 3] and r.grow() is None
    assert r.after(1, 0, 1.0) and r.after(1, 0, 1.0).places == [1, 2, 3]
    assert r.after(1, 0, 1.0) is None, "more than --max_restarts"
    few = Restarts(4, 1, 5)
    few.after(137, 3, 1.0)
    assert few.after(137, 3, 1.0).places == [0, 1, 2]
    assert (
        few.after(2, 0, 1.0).places == [0, 1]
        and "do not fit" in few.after(2, 0, 1.0).text
        and few.after(2, 0, 1.0) is None
    )
    assert Restarts(2, 2, 0).after(1, 0, 1.0) is None


def test_who_failed_first():
    assert first_failed([(0, ExitCode.LOST, False), (1, 137, False)]) == (137, 1)
    assert first_failed([(0, ExitCode.LOST, False), (2, ExitCode.LOST, False), (1, 137, True)]) == (
        ExitCode.LOST,
        1,
    )  # it was stopped
    assert first_failed([(1, 7, False), (0, 137, True)]) == (7, 1)
    assert first_failed([(0, 0, False), (1, 0, False)]) == (0, None)
    assert first_failed([(0, 143, False), (1, 143, False)]) == (143, 0)


def signalled(program: str, *numbers: int, wait: float = 0.0) -> subprocess.CompletedProcess:
    """A program that installs a Stopper, prints "ready", and gets these signals."""
    text = textwrap.dedent(program)
    p = subprocess.Popen(
        [sys.executable, "-c", text],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    timer = threading.Timer(60, p.kill)
    timer.start()
    try:
        assert p.stdout.readline() == "ready\n"
        for number in numbers:
            p.send_signal(number)
            time.sleep(wait)
        out, err = p.communicate(timeout=60)
        return subprocess.CompletedProcess([], p.returncode, out, err)
    finally:
        timer.cancel()


STOPPER = """
import time
from deepseek_jax.cluster.signals import Stopper
s = Stopper("train.py").install()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_before_the_first_step(number):
    """Also while the main thread is in C, which calls no handler of Python."""
    done = signalled(
        STOPPER
        + "import ctypes; c = ctypes.CDLL(None); print('ready', flush=True)\nwhile True: c.sleep(60)",
        number,
    )
    assert done.returncode == 128 + number and done.stdout == ""
    assert (
        done.stderr
        == f"train.py: stopped by signal {number} before the first step; there was nothing to save.\n"
    )


def test_a_signal_in_training_and_a_second_one():
    program = (
        STOPPER
        + "s.after(1); print('ready', flush=True)\n"
        + "while s.after(2) is None: time.sleep(0.01)\n"
        + "print(s.after(3), flush=True)\n"
    )
    once = signalled(program, signal.SIGTERM)
    assert (once.returncode, once.stdout, once.stderr) == (0, "15\n", "")
    twice = signalled(program + "time.sleep(60)", signal.SIGINT, signal.SIGINT, wait=0.5)
    assert (
        twice.returncode == 130
        and twice.stdout == "2\n"
        and twice.stderr == "train.py: ended at once by a second signal, 2.\n"
    )


def test_only_int_and_term_end_at_once():
    """A terminal sends SIGHUP twice, systemd after SIGTERM; SLURM sends SIGTERM after SIGUSR1. An ignored
    SIGHUP (nohup) is none at all."""
    program = (
        STOPPER
        + "s.after(1); print('ready', flush=True)\n"
        + "while s.after(2) is None: time.sleep(0.01)\n"
        + "time.sleep(1.5); print(s.after(3))\n"
    )
    asked = (
        signal.SIGUSR1,
        signal.SIGUSR1,
        signal.SIGHUP,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGUSR2,
    )
    done = signalled(program, *asked, wait=0.05)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{signal.SIGUSR1.value}\n", "")
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + program
    done = signalled(ignored, signal.SIGHUP, signal.SIGUSR2, wait=0.3)
    assert (done.returncode, done.stdout) == (0, f"{signal.SIGUSR2.value}\n")
