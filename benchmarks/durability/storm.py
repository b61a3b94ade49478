"""Kills, stops and damages runs by the dozen, and counts what was lost: make storm.

  python -m benchmarks storm [--kills=50] [--rounds=3] [--seed=0]
                             [--only=kills,signals,disk,processes,corruption] [--json]

  kills       ONE run on a CPU, killed at random instants (kill -9): while it starts, between
              checkpoints, while one is written. It is started again each time, with asynchronous
              checkpoints (where an unfinished save may be lost too) and without (where one
              interval is the most that may be lost) in turns.
  signals     SIGTERM and SIGINT to that run.
  disk        No room for the last checkpoint.
  processes   Runs of 2 and 4 processes under the launcher, one of which is killed or stopped
              (SIGSTOP).
  corruption  Files of checkpoints cut short, deleted, zeroed, flipped.

The losses of every step are compared, bit for bit, with those of an undisturbed run. Exit code 1 if
anything is wrong. Random choices come from --seed; the instants depend on the machine.
"""

import dataclasses
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.durability import faults, storm_processes
from benchmarks.durability.faults import INTERVAL, Process, Tallies
from benchmarks.support.report import Parser, report
from deepseek_jax.cli import texts
from deepseek_jax.cli.arguments import some_of

Say = Callable[[str], None]
PARTS = ("kills", "signals", "disk", "processes", "corruption")
START = "kill -9 while it starts"
STEP = "kill -9 between checkpoints"
SAVE = "kill -9 while one is written"
LIMIT = 600.0  # seconds for anything that takes some


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--kills", type=int, default=50, help="Kills of the run, and up to 4 signals."
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="Rounds of every kind of damage to files."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the faults.")
    parser.add_argument(
        "--only",
        type=some_of(*PARTS),
        default=",".join(PARTS),
        help="Parts to run, separated by commas.",
    )
    args = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:6.0f} s] {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="storm.") as name:
        found = run(pathlib.Path(name), args.only, args.kills, args.rounds, args.seed, say)
    result = {name: dataclasses.asdict(tally) for name, tally in found.items()}
    seconds = round(time.monotonic() - began)
    report(args, {"seconds": seconds, "interval": INTERVAL, "faults": result}, text)
    return 1 if failures(result) else 0


def failures(faults: dict[str, dict[str, int]]) -> int:
    """Faults after which something was wrong, or that a run did not survive."""
    return sum(t["wrong"] + max(t["tried"] - t["survived"], 0) for t in faults.values())


def text(r: dict[str, Any]) -> str:
    """The table for a person, and what it comes to."""
    bad = failures(r["faults"])
    tried = sum(t["tried"] for t in r["faults"].values())
    verdict = f"{bad} NOT AS PROMISED" if bad else "nothing lost, nothing wrong"
    return (
        f"{table(r['faults'])}\n"
        f"{tried} faults in {r['seconds']} s, a checkpoint every {r['interval']} steps: {verdict}"
    )


def table(result: dict[str, dict[str, int]]) -> str:
    columns = ("tried", "detected", "survived", "steps_lost", "wrong")
    heading = ["fault", *(c.replace("_", " ").replace("lost", "lost (max)") for c in columns)]
    return texts.table(
        [heading, *([name, *(str(t[c]) for c in columns)] for name, t in result.items())]
    )


def run(
    folder: pathlib.Path, parts: list[str], kills: int, rounds: int, seed: int, say: Say
) -> Tallies:
    """Runs the parts, with all files in `folder`; `say` reports progress."""

    def damaged_files() -> Tallies:
        from benchmarks.durability import corruption

        (folder / "corruption").mkdir()
        say("damaged files")
        return {
            name: faults.Tally(**t)
            for name, t in corruption.run(str(folder / "corruption"), rounds, seed).items()
        }

    out = faults.tallies()
    signals = min(kills, 4) if "signals" in parts else 0
    for wanted, part in (
        (
            {"kills", "signals"},
            lambda: one_run(folder, kills if "kills" in parts else 0, signals, seed, say),
        ),
        ({"disk"}, lambda: no_room(folder, say)),
        ({"processes"}, lambda: storm_processes.run(folder, say)),
        ({"corruption"}, damaged_files),
    ):
        if wanted & set(parts):
            try:
                out |= part()
            except RuntimeError as e:
                # A run that does not go on is a result; the other parts still have to run.
                say(str(e))
                out[f"{' and '.join(sorted(wanted))}: did not go on"] = faults.Tally(
                    tried=1, wrong=1
                )
    return out


def one_run(folder: pathlib.Path, kills: int, signals: int, seed: int, say: Say) -> Tallies:
    """One run in one process that is ended `kills + signals` times and resumed each time."""
    rng = random.Random(seed)
    out = faults.tallies()
    text = faults.corpus(folder)
    env = faults.environment(folder)
    steps = max(8 * (kills + signals), 4 * INTERVAL)
    say(f"the undisturbed run of {steps} steps")
    with Process(faults.train(folder / "calm", text, train__steps=steps), env) as calm:
        if calm.wait(LIMIT) != 0:
            raise RuntimeError("the undisturbed run failed:\n" + "\n".join(calm.lines[-20:]))
    reference, _ = faults.rows(folder / "calm")
    seconds_to_start = None

    workdir = folder / "storm"
    kinds = [rng.choice((START, STEP, STEP, SAVE, SAVE)) for _ in range(kills)] + [
        rng.choice((signal.SIGTERM, signal.SIGINT)) for _ in range(signals)
    ]
    rng.shuffle(kinds)
    after_fault, logged, least = None, 0, 0
    for number, kind in enumerate([*kinds, None]):
        left = steps - faults.newest_checkpoint(workdir)
        # Steps of this start.
        target = rng.randint(1, max(min(2 * left // (len(kinds) - number + 1), 3 * INTERVAL), 1))
        asynchronous = number % 2 == 0
        name = (
            f"signal {kind.name}"
            if isinstance(kind, signal.Signals)
            else f"{kind}{', asynchronously' if asynchronous else ''}"
        )
        with Process(
            faults.train(
                workdir, text, train__steps=steps, checkpoint__async_checkpointing=asynchronous
            ),
            env,
        ) as p:
            if kind == START:
                time.sleep(rng.uniform(0, seconds_to_start or 3))
                p.kill()
            elif kind is not None:
                if (
                    not p.wait_for_step(faults.newest_checkpoint(workdir) + target, LIMIT)
                    and p.popen.poll() is None
                ):
                    raise RuntimeError("the run does not go on:\n" + "\n".join(p.lines[-20:]))
                seconds_to_start = seconds_to_start or time.monotonic() - p.began
                if kind == SAVE:
                    wait_for_save(workdir, p)
                time.sleep(rng.uniform(0, 0.02 if kind == SAVE else 0.2))
                p.kill(kind if isinstance(kind, signal.Signals) else signal.SIGKILL)
            code = p.wait(LIMIT)
        # What the start before this one lost is known now.
        from_step = p.resumed_from()
        if after_fault and from_step is not None:
            tally = out[after_fault]
            tally.detected += 1
            tally.lost(logged - from_step)
            passed_over = from_step < least or from_step > logged + 1
            tally.wrong += passed_over
            tally.survived += not passed_over
            after_fault = None
        elif after_fault:  # this start was killed before it said so: the next one tells
            out[after_fault].survived += 1
            out[after_fault].detected += 1
        found, _ = faults.rows(workdir)
        wrong = faults.differing(workdir, reference)
        if kind is None:
            if code != 0 or len(found) != steps or wrong:
                out[after_fault or STEP].wrong += 1 + wrong
            break
        out[name].tried += 1
        out[name].wrong += wrong
        expected_code = 128 + kind if isinstance(kind, signal.Signals) else -signal.SIGKILL
        if code != expected_code and code != 0:
            say(f"exit code {code}, not {expected_code}:\n" + "\n".join(p.lines[-8:]))
            out[name].wrong += 1
        logged = max(found, default=0)
        if isinstance(kind, signal.Signals):
            least = logged
        elif any(line.startswith("step ") for line in p.lines):
            # A start without a step leaves the checkpoints as they were.
            least = faults.newest_save(logged) - (INTERVAL if asynchronous else 0)
        after_fault = name
        say(
            f"{number + 1} of {len(kinds)}: {name}, after step {logged}; checkpoint "
            f"{faults.newest_checkpoint(workdir)}{'; WRONG' if wrong else ''}"
        )
    return out


def no_room(folder: pathlib.Path, say: Say) -> Tallies:
    """A run that cannot write large files, as on a full disk, trains to its last step and reports the
    checkpoint that it lost; when there is room again it resumes."""
    out = faults.tallies()
    text = faults.corpus(folder)
    env = faults.environment(folder)
    workdir = folder / "room"
    steps = 6 * INTERVAL
    say("no room for checkpoints")
    with Process(faults.train(folder / "with_room", text, train__steps=steps), env) as calm:
        if calm.wait(LIMIT) != 0:
            raise RuntimeError("the undisturbed run failed:\n" + "\n".join(calm.lines[-20:]))
    tally = out["no room for the last checkpoint"]
    tally.tried = 1
    with Process(faults.train(workdir, text, train__steps=steps), env) as p:
        # The second save waits for the first, which is on disk by then.
        if not p.wait_for_step(2 * INTERVAL + 1, LIMIT):
            raise RuntimeError("the run does not begin:\n" + "\n".join(p.lines[-20:]))
        resource.prlimit(p.popen.pid, resource.RLIMIT_FSIZE, (16384, 16384))
        code = p.wait(LIMIT)
    tally.detected = int(code == 5 and any("could not be written in" in line for line in p.lines))
    logged = max(faults.rows(workdir)[0], default=0)
    with Process(faults.train(workdir, text, train__steps=steps), env) as p:
        code = p.wait(LIMIT)
    from_step = p.resumed_from() or 0
    tally.lost(logged - from_step)
    tally.wrong = faults.differing(workdir, faults.rows(folder / "with_room")[0])
    tally.survived = int(code == 0 and from_step >= INTERVAL)
    return out


def wait_for_save(workdir: pathlib.Path, p: Process) -> None:
    """Waits until the temporary folder of a checkpoint exists or the run is over."""
    folder, deadline = workdir / "checkpoints", time.monotonic() + 60
    while p.popen.poll() is None and time.monotonic() < deadline:
        if any("tmp" in f.name for f in folder.iterdir()):
            return
        time.sleep(0.001)
