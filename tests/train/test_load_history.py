"""expert_load.npy: what the experts got, while a run writes it, is killed, goes on and changes."""

import os

import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.train import load_history
from deepseek_jax.train.load_history import LoadHistory, interval, read, record

KIND = record(2, 3)


def counts(step: int) -> np.ndarray:
    return np.arange(6).reshape(2, 3) * 1000 + step


def check(path, steps) -> None:
    found, kept = read(str(path))
    assert found.tolist() == list(steps)
    for step, counts_LE in zip(steps, kept, strict=True):
        np.testing.assert_array_equal(counts_LE, counts(step))


def written(path, last: int, step: int = 0, every: int = 1) -> LoadHistory:
    history = LoadHistory(str(path), KIND, step, every)
    for i in range(step + 1, last + 1):
        history.add(i, counts(i))
    return history


def test_it_is_read_while_it_grows(tmp_path):
    """By `read` and by NumPy, to whom it is an array like any other."""
    path = tmp_path / "a.npy"
    history = LoadHistory(str(path), KIND, 0, 10)
    check(path, [])
    for step in range(1, 31):
        history.add(step, counts(step))
        check(path, range(10, step + 1, 10))
    plain = np.load(path, mmap_mode="r", allow_pickle=False)
    np.testing.assert_array_equal(plain["step"], [10, 20, 30])
    np.testing.assert_array_equal(plain["counts"][1], counts(20))


def test_a_run_that_goes_on_forgets_what_comes_again(tmp_path):
    path = tmp_path / "a.npy"
    written(path, 8).close()
    history = written(path, 6, step=5)
    check(path, [1, 2, 3, 4, 5, 6])
    history.rewind(2)
    history.add(3, counts(3))
    check(path, [1, 2, 3])


@pytest.mark.parametrize("cut", [1, 8, 31])
def test_a_record_cut_short_is_not_there(tmp_path, cut):
    """Killed before the header counted it, or on a machine that was lost with half of it written: neither
    makes the others unreadable, and what comes next stands in its place."""
    path = tmp_path / "a.npy"
    history = written(path, 4)
    os.truncate(path, os.path.getsize(path) - cut)
    check(path, [1, 2, 3])
    history.close()
    with open(path, "ab") as f:
        f.write(b"x" * (KIND.itemsize - 3))  # the header counts four, three and a half are there
    written(path, 5, step=3).close()
    check(path, [1, 2, 3, 4, 5])


def test_a_full_disk_costs_that_record(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    history = written(path, 2)
    pwrite = os.pwrite

    def full(fd, data, offset):
        pwrite(fd, data[: len(data) // 2], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError):
        history.add(3, counts(3))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    check(path, [1, 2])
    history.add(4, counts(4))
    check(path, [1, 2, 4])


@pytest.mark.parametrize(
    "steps, every, wanted",
    [(200, 10, 10), (1000, 1, 1), (1001, 1, 2), (100_000, 10, 160), (0, 5, 5)],
)
def test_a_long_run_keeps_fewer_steps(steps, every, wanted):
    assert interval(steps, every) == wanted
    assert steps / wanted <= load_history.MOST


def test_never_more_than_so_many(tmp_path, monkeypatch):
    """Not even of a run whose number of steps was raised again and again."""
    monkeypatch.setattr(load_history, "MOST", 10)
    path, done = tmp_path / "a.npy", 0
    for steps in (10, 20, 90, 91):
        written(path, steps, done, interval(steps, 1)).close()
        done = steps
        found = read(str(path))[0]
        assert len(found) <= 10 and (np.diff(found) > 0).all()
        assert found[-1] > steps - interval(steps, 1)


def test_another_model_begins_anew(tmp_path):
    path = tmp_path / "a.npy"
    written(path, 4).close()
    history = LoadHistory(str(path), record(3, 3), 4, 1)
    history.add(5, np.ones((3, 3)))
    assert read(str(path))[0].tolist() == [5]


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\x93NUMPY\x01\x00\x02\x00{}", "objects", "floats"]
)
def test_another_file_is_said_to_be_damaged(tmp_path, content):
    """And nothing is unpickled."""
    path = tmp_path / "a.npy"
    if content == "objects":
        np.save(path, np.array([{}], object), allow_pickle=True)
    elif content == "floats":
        np.save(path, np.ones(3))
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        read(str(path))
    written(path, 2).close()
    check(path, [1, 2])
