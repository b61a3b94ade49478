"""Where the rows of a run go, and the table of their names."""

import errno
import json
import os
import struct
import subprocess
import sys
import textwrap
import threading

import numpy as np

from deepseek_jax.config.options import Config
from deepseek_jax.model.moe_statistics import Load
from deepseek_jax.run import figures, metrics
from deepseek_jax.run.trackers import jsonl, tensorboard
from deepseek_jax.run.trackers.every import Trackers
from tests.support import ROOT
from tests.support.runs import CONTRACT_KEYS


def events_of(folder) -> list:
    """The events in the files of a folder. A record: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    out = []
    for name in sorted(os.listdir(folder)):
        raw = (folder / name).read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            out.append(Event.FromString(raw[12 : 12 + length]))
            raw = raw[16 + length :]
    return out


def test_the_table_of_metrics():
    """The contract of metrics.jsonl is what the table says; what every metric means is written down."""
    assert {m.name for m in metrics.METRICS.values() if m.contract} == CONTRACT_KEYS | {"eval_loss"}
    assert all(name == m.name and m.help for name, m in metrics.METRICS.items())
    made = [m for m in metrics.METRICS.values() if m.of]
    assert made and all(m.row == "step" for m in made)
    shown = metrics.terminal_text(
        {"loss": 2.0, "tokens_per_sec": 1234.5, "max_violation": 0.5, "dispatch_rounds": 2, "lr": 1}
    )
    assert shown == "loss 2.0000  1,234 tokens/s  max violation 0.50  rounds 2"


def test_what_is_written(tmp_path):
    """A row with lists is one line of JSON; TensorBoard gets the numbers, and figures by layer."""
    load = Load(
        np.array([[6, 2], [0, 0]]),
        np.array([3, 0]),
        np.array([[2, 0], [0, 0]]),
        np.array([[6, 0], [0, 0]]),
        np.array([[0, 2], [0, 0]]),
        np.array([3, 0]),
    )
    writer = Trackers(str(tmp_path), Config(), 6)
    writer.write({"step": 7} | figures.routing(load, drop=True), load)
    writer.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["received_by_device"] == [6, 0] and row["dropped_by_device"] == [[0, 2], [0, 0]]
    assert row["dropped_tokens"] == 2
    version, start, *events = events_of(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    assert start.step == 7 and start.session_log.status == start.session_log.START
    assert {e.step for e in events} == {7}
    values = {v.tag: v for e in events for v in e.summary.value}
    scalars = {name for name, v in values.items() if v.HasField("simple_value")}
    assert scalars == set(row) - {"step", "received_by_device", "dropped_by_device"} | {
        "layer_max_violation/00",
        "layer_rounds/00",
        "layer_dropped/00",
    }  # the second layer routed nothing
    assert values["layer_dropped/00"].simple_value == 2
    assert values["layer_rounds/00"].simple_value == 3
    received = values["layer_device_rows/00"].histo
    assert (received.min, received.max, received.num, received.sum) == (0, 6, 2, 6)
    assert values["layer_expert_load/00"].histo.max == 1.5


def test_a_slow_disk_costs_rows_of_tensorboard_and_not_the_run(tmp_path, monkeypatch):
    """The thread waits for the disk; the caller does not."""
    from tensorboardX import event_file_writer

    answers = threading.Event()
    write = event_file_writer.EventsWriter.write_event

    def slow(self, event):
        answers.wait(60)
        return write(self, event)

    monkeypatch.setattr(event_file_writer.EventsWriter, "write_event", slow)
    monkeypatch.setattr(tensorboard.TensorBoard, "QUEUED", 5)
    writer = Trackers(str(tmp_path), Config(), 0)
    for step in range(1, 100):
        writer.write({"step": step, "loss": 1.0})  # returns
    answers.set()
    writer.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 99
    steps = [e.step for e in events_of(tmp_path / "tensorboard") if e.summary.value]
    # The first five are queued; which come after them depends on when the thread takes its first.
    assert 5 <= len(steps) <= 7 and steps == sorted(steps) and steps[:5] == [1, 2, 3, 4, 5]


def test_a_full_disk_costs_rows_and_not_the_run(tmp_path, monkeypatch, capsys):
    """Rows are whole or absent; one warning; rows are written again once there is room."""
    room, write = [0, True], os.write

    def limited(fd: int, text: bytes) -> int:
        if room[1]:
            return write(fd, text)
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count, room[0] = min(room[0], len(text)), max(room[0] - len(text), 0)
        return write(fd, text[:count])

    monkeypatch.setattr(jsonl.os, "write", limited)
    writer = Trackers(str(tmp_path), Config(), 0)
    for step in range(1, 40):
        if step == 5:
            room[:] = [30, False]  # some bytes of a row, then none
        if step == 30:
            room[1] = True
        writer.write({"step": step, "loss": step / 4, "rows": list(range(10))})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 5), *range(30, 40)]
    assert capsys.readouterr().err.count("metrics are being lost. Training goes on.") == 1
    assert writer.losses(3) == [37 / 4, 38 / 4, 39 / 4]


def test_tensorboard_on_a_full_disk(tmp_path, monkeypatch, capsys):
    """Its thread outlives the errors and is told to end: nothing waits for it."""
    from tensorboardX import event_file_writer

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(event_file_writer.EventsWriter, "write_event", full)
    writer = Trackers(str(tmp_path), Config(), 0)
    done = threading.Thread(
        target=lambda: (
            [writer.write({"step": i, "loss": 1.0}) for i in range(200)],
            writer.close(),
        ),
        daemon=True,
    )
    done.start()
    done.join(60)
    assert not done.is_alive(), "it waits for a thread that has ended"
    assert (
        len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 200
        and "tensorboard cannot be written (No space left" in capsys.readouterr().err
    )


def test_rows_cut_short_and_rows_to_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    writer = Trackers(str(tmp_path), Config(), 1)
    writer.write({"step": 2, "loss": 4.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 4.0},
    ]
    writer.rewind(0)
    writer.write({"step": 1, "loss": 5.0, "eval_loss": float("nan")})
    writer.close()
    assert path.read_text() == '{"step": 1, "loss": 5.0}\n'


def test_a_terminal_that_is_gone(tmp_path):
    """`train.py ... | head`: nobody reads any more, and the run goes on."""
    program = """
        import os, sys
        from deepseek_jax.cli.progress import StepBar
        bar = StepBar(10, 0)
        for i in range(2000):
            bar.say("a line " * 20)
        bar.close()
        print("went on", file=sys.stderr)
    """
    p = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    p.stdout.readline()
    p.stdout.close()
    error = p.stderr.read().decode()
    assert p.wait(60) == 0 and "went on" in error, error
