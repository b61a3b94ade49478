"""Several processes as a user starts them: the launcher, and training over gloo that gives the
losses of one process."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from deepseek_jax.cluster.ports import free_port
from deepseek_jax.errors import UserError
from deepseek_jax.launch import __main__, options
from tests import support

ROOT = str(support.ROOT)
LAUNCH = [sys.executable, "-m", "deepseek_jax.launch"]
ENV = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": ROOT,
    # Programs this small spend their time in the compiler.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}
WORKER = """
import os, signal, subprocess, sys, time
me = int(os.environ["JAX_PROCESS_ID"])
def note(name, text):
    with open(f"{name}.{me}", "w") as f:
        f.write(str(text))
def stop(number, frame):
    note("signal", number)
    sys.exit(128 + number)
action = sys.argv[1]
signal.signal(signal.SIGTERM, signal.SIG_IGN if action == "stubborn" and me == 0 else stop)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGUSR1, stop)
note("child", subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)
note("pid", os.getpid())
print("hello", me, os.environ["JAX_NUM_PROCESSES"], os.environ.get("JAX_NUM_CPU_DEVICES"), *sys.argv[2:])
print("oh", me, file=sys.stderr)
while not (os.path.exists("pid.0") and os.path.exists("pid.1")):
    time.sleep(0.01)
if action == "killed" and me == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if action in ("exit", "stubborn") and me == 1:
    sys.exit(7)
for _ in range(0 if action == "done" else 6000):
    time.sleep(0.1)  # not once for long: a signal just before a sleep does not end it
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    yield tmp_path
    for pid in worker_pids(tmp_path):  # none, if the launcher is right
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def worker_pids(folder) -> list[int]:
    """The workers and their own children."""
    return [int(p.read_text()) for name in ("pid", "child") for p in folder.glob(f"{name}.?")]


@contextlib.contextmanager
def started(command: list[str], **options):
    """A process that is killed at the end of the block, if it still runs, or after minutes, which
    ends whoever reads from it."""
    options = {"env": ENV, "cwd": ROOT} | options
    p = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )
    limit = threading.Timer(240, p.kill)
    limit.start()
    try:
        yield p
    finally:
        limit.cancel()
        p.kill()
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # somebody it left behind has its output
            p.communicate(timeout=10)


def gone(folder) -> bool:
    """Whether they have ended within a few seconds."""

    def lives(pid: int) -> bool:
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as f:
                return f.read().rpartition(")")[2].split()[0] != "Z"
        except (ProcessLookupError, FileNotFoundError):
            return False

    pids = worker_pids(folder)
    assert len(pids) == 4
    deadline = time.monotonic() + 10
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(lives, pids))


def result(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, text=True, capture_output=True, timeout=240, **{"env": ENV, "cwd": ROOT} | options
    )


def launched(folder, action: str, *options: str) -> subprocess.CompletedProcess:
    return result(
        [*LAUNCH, "--nproc_per_node=2", *options, "worker.py", action, "a", "--b=c"], cwd=folder
    )


def test_output_and_environment(worker):
    done = launched(worker, "done", "--devices_per_process=3")
    assert done.returncode == 0 and gone(worker)
    assert sorted(done.stdout.splitlines()) == ["[1] hello 1 2 3 a --b=c", "hello 0 2 3 a --b=c"]
    assert sorted(done.stderr.splitlines()) == ["[1] oh 1", "oh 0"]


@pytest.mark.parametrize("action, code", [("exit", 7), ("killed", 137), ("stubborn", 7)])
def test_one_that_ends_ends_the_rest(worker, action, code):
    began = time.monotonic()
    done = launched(worker, action, "--grace=1")
    assert done.returncode == code and gone(worker)
    assert (
        f"deepseek_jax.launch: process 1 ended with exit code {code}; stopping the others."
        in done.stderr.splitlines()
    )
    assert (worker / "signal.0").exists() == (action != "stubborn"), "SIGTERM comes first"
    assert time.monotonic() - began < 120


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_the_launcher_leaves_nothing_behind(worker, number):
    with started([*LAUNCH, "--nproc_per_node=2", "-m", "worker", "wait"], cwd=worker) as p:
        while not all((worker / f"pid.{i}").exists() for i in range(2)):
            assert p.poll() is None
            time.sleep(0.02)
        if number == signal.SIGKILL:  # what the workers started is not the launcher's to find
            children = [int((worker / f"child.{i}").read_text()) for i in range(2)]
            p.kill()
            time.sleep(0.5)
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        else:
            p.send_signal(number)
            assert p.wait(20) == 128 + number
            assert all((worker / f"signal.{i}").read_text() == str(int(number)) for i in range(2))
        assert gone(worker)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ([], "the following arguments are required: program"),
        (["--nproc_per_node=two", "x.py"], "--nproc_per_node=two is not a number"),
        (["--nproc_per_node=0", "x.py"], "--nproc_per_node=0 is not between 1 and 4096"),
        (["--nproc_per_node=gpu", "x.py"], "--nproc_per_node=gpu, but no GPU is visible"),
        (["--nnodes=2", "x.py"], "--nnodes=2 needs --master_addr"),
        (["--nnodes=1:4", "x.py"], "--nnodes: invalid int value: '1:4'"),
        (
            ["--nnodes=2", "--node_rank=2", "--master_addr=h", "x.py"],
            "--node_rank=2 is not between 0 and 1",
        ),
        (["--master_port=70000", "x.py"], "--master_port=70000 is not between 1 and 65535"),
        (["--rdzv_backend=c10d", "x.py"], "unrecognized arguments: --rdzv_backend=c10d"),
        (["nowhere.py"], "nowhere.py is not a file"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, text, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(UserError) as error:
        __main__.main(arguments)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_bad_argument_is_one_line_and_exit_code_2():
    bad = result([*LAUNCH, "--nproc_per_node=0", "train.py"])
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1
    shown = result([*LAUNCH, "--help"])
    assert (
        shown.returncode == 0 and "--nproc_per_node" in shown.stdout and "--grace" in shown.stdout
    )


def test_the_launcher_imports_no_jax():
    """It lives as long as the processes, and JAX would take a GPU's memory, threads and signals."""
    heavy = "sorted({'jax', 'flax', 'numpy', 'orbax', 'grain'} & sys.modules.keys())"
    program = f"import sys, deepseek_jax.launch.__main__; print({heavy})"
    done = result([sys.executable, "-c", program])
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_environments(monkeypatch):
    monkeypatch.delenv("DEEPSEEK_JAX_TOKEN", raising=False)
    monkeypatch.setattr(options, "visible_gpus", lambda: ["GPU-a", "GPU-b", "GPU-c", "GPU-d"])
    hosts = options.parse(
        ["--nproc-per-node=2", "--nnodes=3", "--node-rank=2", "--master-addr=h", "-m", "x"]
    )
    assert options.environments(hosts, {"CUDA_VISIBLE_DEVICES": "7,5,3,1"}) == [
        {
            "JAX_COORDINATOR_ADDRESS": "h:29500",
            "JAX_NUM_PROCESSES": "6",
            "JAX_PROCESS_ID": str(i),
            "CUDA_VISIBLE_DEVICES": g,
        }
        for i, g in ((4, "7,5"), (5, "3,1"))
    ]
    four = options.environments(
        options.parse(["--nproc_per_node=gpu", "--devices_per_process=1", "-m", "x"]), {}
    )
    assert [e["CUDA_VISIBLE_DEVICES"] for e in four] == ["0", "1", "2", "3"]
    addresses = {
        e[name]
        for e in four
        for name in ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS")
    }
    assert len(addresses) == 1 and addresses.pop().startswith("127.0.0.1:")
    tokens = {e["DEEPSEEK_JAX_TOKEN"] for e in four}
    assert len(tokens) == 1 and len(tokens.pop()) == 32
    with pytest.raises(UserError, match="does not divide the 4 visible GPUs"):
        __main__.main(["--nproc_per_node=3", "-m", "x"])


# Training. What a step counts does not depend on config.train.steps here, so that runs of different
# lengths can be compared.
SMALL = {
    "model.hidden_size": 32,
    "model.moe_intermediate_size": 16,
    "model.num_hidden_layers": 1,
    "model.first_k_dense_replace": 0,
    "model.num_attention_heads": 2,
    "model.kv_lora_rank": 16,
    "train.batch_size": 8,
    "train.sequence_length": 32,
    "optimizer.warmup_steps": 2,
    "optimizer.schedule": "constant",
    "data.eval_fraction": 0.0,
    "checkpoint.every_steps": 0,
    "log.every_steps": 1,
    "log.trackers": "",
    "eval.sample_tokens": 0,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(
            " ".join(rng.choice(["route", "expert", "token", "mesh", "shard", "layer"], 400))
        )
    return folder


def arguments(workdir, corpus, **options) -> list[str]:
    values = SMALL | {name.replace("__", "."): v for name, v in options.items()}
    return [
        "train.py",
        "--config=configs/tiny.py",
        f"--workdir={workdir}",
        f"--config.data.path={corpus}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def finish(command: list[str], devices: int) -> str:
    done = result(command, env=ENV | {"JAX_NUM_CPU_DEVICES": str(devices)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(workdir) -> dict[int, dict]:
    with open(os.path.join(workdir, "metrics.jsonl")) as f:
        out = [row for row in map(json.loads, f) if "loss" in row]
    assert len({row["step"] for row in out}) == len(out), "a step was logged twice"
    return {row["step"]: row for row in out}


@pytest.fixture(scope="module")
def assert_as_one_process(tmp_path_factory, corpus):
    """Checks the rows of a folder against eight devices in one process, not interrupted."""
    reference = {}

    def check(workdir) -> None:
        run = rows(workdir)
        steps = list(range(1, len(run) + 1))
        if len(reference) < len(
            run
        ):  # one run serves all tests, unless a signal was slow to arrive
            folder = tmp_path_factory.mktemp("one")
            finish(
                [
                    sys.executable,
                    *arguments(folder, corpus, train__steps=max(60, len(run)), mesh__expert=8),
                ],
                8,
            )
            reference.update(rows(folder))

        def of(table, name):
            return [table[s][name] for s in steps]

        np.testing.assert_allclose(of(run, "loss"), of(reference, "loss"), rtol=1e-5)
        np.testing.assert_allclose(of(run, "grad_norm"), of(reference, "grad_norm"), rtol=1e-4)
        assert of(run, "tokens_seen") == of(reference, "tokens_seen")
        assert of(run, "max_violation") == of(
            reference, "max_violation"
        )  # the fullest expert's count over the mean

    return check


def wait_for_step(p: subprocess.Popen, step: int) -> None:
    for line in p.stdout:
        if re.match(rf"step +{step}/", line):
            return
    raise AssertionError(p.stderr.read())


@pytest.mark.slow
def test_two_processes_then_one_then_two(corpus, assert_as_one_process, tmp_path):
    """Two processes started by hand, one of which gets SIGTERM; then one; then two of the
    launcher's: the losses of one run.

    The expert axis is inside each process at first, across both in the end.
    """
    address = f"127.0.0.1:{free_port()}"
    by_hand = [
        sys.executable,
        *arguments(tmp_path, corpus, train__steps=100_000, mesh__expert=4),
        f"--coordinator_address={address}",
        "--num_processes=2",
    ]
    env = ENV | {"JAX_NUM_CPU_DEVICES": "4"}
    with (
        started([*by_hand, "--process_id=0"], env=env) as first,
        started([*by_hand, "--process_id=1"], env=env) as second,
    ):
        wait_for_step(first, 3)
        second.send_signal(signal.SIGTERM)
        out, err = first.communicate(timeout=120)
        assert (first.returncode, second.wait(60)) == (143, 143), out + err
        assert "goes on from there" in out
    stopped = max(rows(tmp_path))
    assert os.listdir(tmp_path / "checkpoints") == [str(stopped)]
    said = finish(
        [sys.executable, *arguments(tmp_path, corpus, train__steps=stopped + 3, mesh__expert=8)], 8
    )
    assert f"resuming after step {stopped}" in said
    said = finish(
        [
            *LAUNCH,
            "--nproc_per_node=2",
            *arguments(tmp_path, corpus, train__steps=stopped + 6, mesh__expert=8),
        ],
        4,
    )
    assert f"resuming after step {stopped + 3}" in said
    assert max(rows(tmp_path)) == stopped + 6
    assert_as_one_process(tmp_path)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.slow
def test_processes_stopped_by_the_launcher(processes, corpus, assert_as_one_process, tmp_path):
    """By SIGUSR1, as SLURM announces the end of a job. Of four, the expert axis spans pairs of processes."""
    command = [
        *LAUNCH,
        f"--nproc_per_node={processes}",
        f"--devices_per_process={8 // processes}",
        *arguments(tmp_path, corpus, train__steps=100_000, mesh__expert=4),
    ]
    with started(command) as p:
        wait_for_step(p, 3)
        p.send_signal(signal.SIGUSR1)
        out, err = p.communicate(timeout=120)
    assert p.returncode == 128 + signal.SIGUSR1, out + err
    assert f"Stopped by signal {signal.SIGUSR1.value}" in out and "goes on from there" in out
    assert not [line for line in err.splitlines() if "ended with exit code" in line]
    stopped = max(rows(tmp_path))
    assert os.listdir(tmp_path / "checkpoints") == [str(stopped)]
    assert_as_one_process(tmp_path)


# The program itself, one command line after another: its imports take longer than what is asked of it.
ONE_AFTER_ANOTHER = """
import json, runpy, sys
program, *commands = json.loads(sys.argv[1])
for command in commands:
    sys.argv = [program, *command]
    code = 0
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as e:
        code = e.code
    print("exit", code, file=sys.stderr, flush=True)
sys.exit(code)
"""


def test_processes_that_disagree(corpus, tmp_path):
    """In an option before anything is made, in what one of them finds afterwards: one line, exit
    code 2, soon."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "text").symlink_to(corpus)
    (tmp_path / "there").mkdir()
    (tmp_path / "program.py").write_text(ONE_AFTER_ANOTHER)
    shared = [
        a.replace("configs/", f"{ROOT}/configs/")
        for a in arguments(tmp_path / "run", "text", mesh__fsdp=2)[1:]
    ]
    commands: list[list] = [[f"{ROOT}/train.py"] for _ in range(2)]
    for both in ["--config.train.steps=10", "--config.train.steps=20"], ["", ""]:
        address = f"--coordinator_address=127.0.0.1:{free_port()}"
        for i, option in enumerate(both):
            more = [address, "--num_processes=2", "--cluster_timeout=60", f"--process_id={i}"]
            commands[i].append([*shared, *more, *filter(None, [option])])
    with contextlib.ExitStack() as stack:
        ps = [
            stack.enter_context(
                started(
                    [sys.executable, str(tmp_path / "program.py"), json.dumps(mine)],
                    cwd=tmp_path / folder,
                    env=ENV | {"JAX_NUM_CPU_DEVICES": "1"},
                )
            )
            for folder, mine in zip(("here", "there"), commands, strict=True)
        ]
        outs = [p.communicate(timeout=120) for p in ps]
    assert [p.returncode for p in ps] == [2, 2] and "".join(o for o, _ in outs) == "", outs
    errors = [err.split("exit 2\n") for _, err in outs]
    assert [len(parts) for parts in errors] == [3, 3], outs
    different, missing, rest = ("".join(parts).splitlines() for parts in zip(*errors, strict=True))
    assert different == [
        "train.py: config.train.steps differs between processes: 10 (process 0), 20 (process 1). "
        "Give every process the same command."
    ]
    assert len(missing) == 1 and re.match(
        r"train.py: process 1 \(.*\): config.data.path='.*/there/text' does not exist", missing[0]
    )
    assert not rest
