"""Makes a cached teacher of made-up records, and is killed on the way:

    python -m tests.support.cache_kills FOLDER KILLS SEED

Processes are forked one after another and killed after a random time, each a worker of a random number of
workers; then one makes what is missing. Prints how many were killed before they had finished.
"""

import os
import random
import signal
import sys
import time

import numpy as np

from deepseek_jax.distill import maker, manifest
from deepseek_jax.distill.maker import Worker
from deepseek_jax.distill.manifest import Manifest

LENGTH, TOP, CALL = 16, 4, 2
MANIFEST = Manifest(
    top=TOP,
    temperatures=(1.0, 2.0),
    vocab_size=70000,
    teacher="ab" * 32,
    dtype="float32",
    program={"rows_per_call": CALL, "mesh": {}, "platform": "cpu"},
    options={"train.sequence_length": LENGTH},
    contents={"tokenizer": "bytes", "sources": []},
    train_rows=231,
    eval_rows=6,
    rows_per_shard=6,
    command="make it",
)


class Rows:
    """In place of a loader: a row is its number."""

    def record_rows(self, first: int, count: int) -> dict[str, np.ndarray]:
        return {"record": np.arange(first, first + count)}


class Program:
    """In place of a teacher: records are a function of a row's number, after a while."""

    rows = CALL

    def of_rows(self, weights, rows, temperatures):
        import jax  # here: whoever forks has not started it

        time.sleep(0.002)
        made = [np.random.default_rng(int(record)) for record in rows["record"]]
        shape = LENGTH, TOP
        ids = np.stack([rng.integers(0, 70000, shape) for rng in made]).astype(np.int32)
        values = np.stack([rng.normal(size=shape) for rng in made]).astype(np.float16)
        lse = np.stack([rng.normal(size=(LENGTH, 2)) for rng in made]).astype(np.float32)
        found = {"teacher_ids": ids, "teacher_values": values, "teacher_lse": lse}
        return {name: jax.numpy.asarray(a) for name, a in found.items()}


def make(folder: str, worker: Worker) -> None:
    manifest.write(folder, MANIFEST)
    maker.make(folder, MANIFEST, Rows(), Program(), None, worker, False)


def main(folder: str, kills: int, seed: int) -> int:
    """How many were killed in their work."""
    draw, killed = random.Random(seed), 0
    for _ in range(kills):
        count = draw.randint(1, 3)
        child = os.fork()
        if not child:
            make(folder, Worker(draw.randrange(count), count))
            os._exit(0)
        time.sleep(draw.uniform(0.0, 0.6))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    make(folder, Worker())
    return killed


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
