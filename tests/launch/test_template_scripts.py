"""The sbatch file and the ssh script, run: srun, scontrol and ssh are stand-ins that start the programs
here, as the real ones would there."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from deepseek_jax.cluster.ports import free_port
from deepseek_jax.launch.template import Job, write
from tests.support import ROOT, runs

# Starts the tasks of a step with SLURM's variables, passes signals on to them, and returns as srun does: the
# highest exit code (src/srun/launch.c). --kill-on-bad-exit=1 sends SIGTERM to the others when one fails.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys, time
arguments, kill = sys.argv[1:], False
while arguments[0].startswith("--"):
    kill |= arguments.pop(0) == "--kill-on-bad-exit=1"
tasks = []
for i in range(int(os.environ["SLURM_NTASKS"])):
    env = os.environ | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": os.environ["SLURM_NTASKS"]}}
    tasks.append(subprocess.Popen(arguments, env=env, start_new_session=True))
signal.signal(signal.SIGUSR1, lambda *_: [t.terminate() for t in tasks])  # slurmctld's --signal=TERM@300
codes = []
while tasks:
    for t in list(tasks):
        if t.poll() is not None:
            tasks.remove(t)
            codes.append(t.returncode if t.returncode >= 0 else 128 - t.returncode)
            if kill and t.returncode:
                time.sleep(0.1)
                for other in tasks:
                    other.terminate()
    time.sleep(0.02)
sys.exit(max(codes))
"""
SCONTROL = '#!/bin/bash\necho "$@" >>"$STAND_INS/requeued"\n'
# Options, then a host, then a command for its login shell.
SSH = """#!/bin/bash
while [ "$1" = -o ]; do shift 2; done
[ "$1" = nowhere ] && { echo "ssh: no such host" >&2; exit 255; }
shift
# sshd starts it with no signal ignored and no descriptor of this side.
for fd in {3..255}; do exec {fd}>&-; done
exec env --default-signal bash -c "$*"
"""
# Ends by itself with an exit code, or when it is told to; STUBBORN ends by SIGKILL alone.
PROGRAM = """#!/bin/bash
printf '%s\\n' "$@" >"arguments.$JAX_PROCESS_ID"
env >"environment.$JAX_PROCESS_ID"
echo "hello $JAX_PROCESS_ID"
for signal in INT HUP USR1 USR2; do trap "echo $signal >signal.$JAX_PROCESS_ID; exit 99" $signal; done
trap 'echo TERM >signal.$JAX_PROCESS_ID; [ -n "$STUBBORN" ] || exit 143' TERM
case $1 in "$JAX_PROCESS_ID":*) sleep 0.5; exit "${1#*:}" ;; all:*) exit "${1#*:}" ;; esac
for _ in {1..600}; do sleep 0.1; done
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A folder on the PATH with srun, scontrol and ssh, and a program; the working directory is another."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "ssh": SSH, "program": PROGRAM}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_INS", str(folder))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return folder


def started(kind: str, job: Job, *arguments: str, **env: str) -> subprocess.Popen:
    """The file that is written for the job, run by bash."""
    path = f"job.{kind}"
    with open(path, "w") as f:
        f.write(write(kind, job))
    return subprocess.Popen(
        ["bash", path, *arguments],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def waited_for(condition, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)


# SLURM


@pytest.mark.parametrize(
    "program, restarts, code, queued",
    [
        ("exit 0", 0, 0, False),
        ("exit 1", 0, 1, False),
        ("exit 2", 0, 2, False),
        ("exit 3", 0, 3, False),
        ("exit 4", 0, 4, True),
        ("exit 5", 0, 5, False),
        ("exit 6", 9, 6, True),
        ("exit 130", 0, 130, False),
        ("exit 143", 0, 143, True),
        ("kill -KILL $$", 0, 137, True),
        ("exit 4", 10, 4, False),  # ten restarts that do not last
        # One process says what is wrong; the others end as it tells them, which takes a moment.
        ('trap "exit 143" TERM; ((SLURM_PROCID)) && sleep 0.3; exit 2', 0, 2, False),
    ],
)
def test_exit_codes_that_deserve_another_start(stand_ins, program, restarts, code, queued):
    job = Job(command=("bash", "-c", program), name="x")
    env = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_RESTART_COUNT": str(restarts)}
    process = started("slurm", job, **env)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == code, out
    requeued = stand_ins / "requeued"
    assert requeued.exists() == queued and (not queued or requeued.read_text() == "requeue 77\n")
    assert ("Queued again" in out) == queued and ("Not queued again" in out) == (restarts == 10)


def test_a_mistake_would_pass_for_a_stop(stand_ins):
    """Why the file has --kill-on-bad-exit=0: SLURM stops the others before they end with the mistake's
    code, and the highest code is what it reports."""
    job = Job(
        command=("bash", "-c", 'trap "exit 143" TERM; ((SLURM_PROCID)) && sleep 0.5 & wait; exit 2')
    )
    text = write("slurm", job)
    assert "srun --kill-on-bad-exit=0 --wait=120 " in text
    with open("other", "w") as f:
        f.write(text.replace("srun --kill-on-bad-exit=0", "srun --kill-on-bad-exit=1"))
    env = os.environ | {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2"}
    assert (
        subprocess.run(["bash", "other"], env=env, capture_output=True, timeout=60).returncode
        == 143
    )


def test_the_sbatch_file_passes_all_on(stand_ins):
    """Arguments with what a shell takes apart, variables, a secret; leftovers of other launchers go."""
    odd = ("a b", "$(touch odd)", "it's", '"', "", "*")
    job = Job(
        command=("program", "all:0", *odd),
        workdir="w d",
        variables={"NCCL_X": "a b$", "JAX_PROCESS_ID": "5"},
    )
    env = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "MASTER_ADDR": "old", "RANK": "3"}
    process = started("slurm", job, "--more=1 2", **env)
    assert process.wait(60) == 0
    with open("arguments.5") as f:
        assert f.read().split("\n")[:-1] == ["all:0", *odd, "--workdir=w d", "--more=1 2"]
    with open("environment.5") as f:
        seen = dict(line.split("=", 1) for line in f.read().splitlines() if "=" in line)
    assert seen["NCCL_X"] == "a b$" and len(seen["DEEPSEEK_JAX_TOKEN"]) == 32
    assert not {"MASTER_ADDR", "RANK"} & seen.keys() and not os.path.exists("odd")


# ssh


def hosts_job(*words: str, hosts: tuple[str, ...] = ("127.0.0.1", "me@localhost"), **more) -> Job:
    return Job(command=("program", *words), hosts=hosts, **({"stop_before": 30} | more))


def test_one_process_per_host(stand_ins):
    odd = ("a b", "$(touch odd)", "it's", "")
    process = started("ssh", hosts_job("all:0", *odd, variables={"NCCL_X": "a b$"}), "more")
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and sorted(out.splitlines()) == ["[1] hello 1", "hello 0"]
    tokens = set()
    for i in range(2):
        with open(f"arguments.{i}") as f:
            assert f.read().split("\n")[:-1] == ["all:0", *odd, "more"]
        with open(f"environment.{i}") as f:
            seen = dict(line.split("=", 1) for line in f.read().splitlines() if "=" in line)
        tokens.add(seen["DEEPSEEK_JAX_TOKEN"])
        assert seen["JAX_COORDINATOR_ADDRESS"] == "127.0.0.1:8476" and seen["NCCL_X"] == "a b$"
        assert seen["JAX_NUM_PROCESSES"] == "2" and seen["PWD"] == os.getcwd()
    assert len(tokens) == 1 and len(tokens.pop()) == 32 and not os.path.exists("odd")


@pytest.mark.parametrize("words, hosts, code", [("1:7", "localhost", 7), ("x", "nowhere", 255)])
def test_one_that_fails_stops_the_others(stand_ins, words, hosts, code):
    process = started("ssh", hosts_job(words, hosts=("127.0.0.1", hosts)))
    out = process.communicate(timeout=60)[0]
    assert process.returncode == code and f"{hosts} ended with exit code {code}" in out
    with open("signal.0") as f:
        assert f.read() == "TERM\n"


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGUSR1", 99), ("SIGINT", 99)])
def test_signals_go_on_to_all(stand_ins, name, code):
    process = started("ssh", hosts_job("x"))
    waited_for(lambda: all(os.path.exists(f"environment.{i}") for i in range(2)))
    time.sleep(0.3)  # until the program has its traps
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == code
    for i in range(2):
        with open(f"signal.{i}") as f:
            assert f.read() == f"{name.removeprefix('SIG')}\n"


def test_what_does_not_stop_is_killed(stand_ins):
    process = started("ssh", hosts_job("1:7", stop_before=1), STUBBORN="yes")
    assert process.wait(60) == 7  # of the first that failed, not of the killed one
    assert "TERM" in open("signal.0").read()


def test_the_time_limit(stand_ins):
    process = started("ssh", hosts_job("x", stop_before=2, seconds=3))
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "3 s are almost over" in out


def test_without_the_script_the_processes_stop(stand_ins):
    """Killed, or its connections broken."""
    process = started("ssh", hosts_job("x"))
    waited_for(lambda: all(os.path.exists(f"environment.{i}") for i in range(2)))
    time.sleep(0.3)
    process.kill()
    waited_for(lambda: all(os.path.exists(f"signal.{i}") for i in range(2)), 20)
    process.communicate(timeout=60)  # until nobody has its stdout any more


# Training


def losses(workdir) -> dict[int, float]:
    with open(os.path.join(workdir, "metrics.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture
def training(tmp_path, monkeypatch):
    """(command of a small run, its options) of two processes with a device each."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i}.txt").write_text(
            f"document {i}: " + " ".join(str(i * j) for j in range(200))
        )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    more = (
        "--config.train.steps=30",
        "--config.checkpoint.every_steps=10",
        "--config.mesh.fsdp=-1",
    )
    words = runs.command("WORKDIR", corpus, *more)
    return tuple(word for word in ["train.py", *words] if "WORKDIR" not in word)


def file_of(tmp_path, kind: str, job: Job):
    path = tmp_path / f"job.{kind}"
    path.write_text(write(kind, job))
    return ["bash", str(path)]


@pytest.mark.slow
def test_training_by_the_ssh_script(stand_ins, training, tmp_path):
    """Two processes, stopped by a signal to the script and started again: the losses of one process."""
    one = subprocess.run(
        [sys.executable, *training, f"--workdir={tmp_path}/one"],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
        timeout=400,
    )
    assert one.returncode == 0
    job = Job(
        command=training,
        hosts=("127.0.0.1", "localhost"),
        port=free_port(),
        workdir=f"{tmp_path}/two",
        python=sys.executable,
    )
    command = file_of(tmp_path, "ssh", job)
    first = subprocess.Popen(command)
    metrics = tmp_path / "two" / "metrics.jsonl"
    waited_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5, 300)
    first.terminate()
    assert first.wait(120) == 143
    assert subprocess.run(command, timeout=400).returncode == 0
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


@pytest.mark.slow
def test_training_by_the_sbatch_file(stand_ins, training, tmp_path):
    """Told to save before the limit, queued again, finished; a mistake is not queued again."""
    job = Job(command=training, workdir=f"{tmp_path}/run", python=sys.executable)
    command = file_of(tmp_path, "slurm", job)
    env = os.environ | {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    first = subprocess.Popen(command, env=env, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    waited_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5, 300)
    step = subprocess.run(
        ["pgrep", "-P", str(first.pid)], capture_output=True, text=True, timeout=60
    ).stdout.split()
    os.kill(int(step[0]), signal.SIGUSR1)  # srun's stand-in sends SIGTERM to the tasks
    assert first.wait(120) == 143
    assert (stand_ins / "requeued").read_text() == "requeue 77\n"
    assert subprocess.run(command, env=env, timeout=400).returncode == 0
    assert sorted(losses(tmp_path / "run")) == list(range(1, 31))
    wrong = [*command, "--config.mesh.fsdp=7"]
    assert subprocess.run(wrong, env=env, timeout=400).returncode == 2
    assert (stand_ins / "requeued").read_text() == "requeue 77\n"
