"""`launch ray` without Ray: options, the environment of a process, what is tried again, the run's folder.

tests/launch/test_ray.py has the real thing, in an environment of its own (`make test-ray`).
"""

import os
import signal
import subprocess
import sys
import time
import types

import pytest
from pyarrow import fs

from deepseek_jax.errors import UserError
from deepseek_jax.launch import __main__
from deepseek_jax.launch.ray import cluster, driver, job, options, storage
from deepseek_jax.launch.ray.link import Link, Output, show
from deepseek_jax.launch.ray.process import Process
from deepseek_jax.launch.ray.worker import Chief, Order, WorkerFailed
from tests.support import ROOT
from tests.support.runs import lives

COMMAND = ["train.py", "--config=configs/tiny.py"]


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def parse(*arguments: str) -> options.RayOptions:
    return options.parse([*arguments, *COMMAND])


def test_a_command_line():
    given = parse("--num_workers=2", "--gpus-per-worker=8", "--storage_path=store", "--env=A=b=c")
    assert given.storage_path == str(ROOT / "store") and given.run_folder.endswith("/tiny/run")
    assert (given.num_workers, given.gpus_per_worker, given.max_failures) == (2, 8, 0)
    assert given.command == tuple(COMMAND) and given.env == ("A=b=c",) and not given.remote
    bucket = parse("--storage_path=s3://bucket/checkpoints/", "--name=a-1.b")
    assert bucket.remote and bucket.run_folder == "s3://bucket/checkpoints/a-1.b/run"
    same = options.from_python(COMMAND, storage_path="s3://bucket/checkpoints", name="a-1.b")
    assert same == bucket
    assert options.parse(["--storage_path=s", "-m", "some.module"]).name == "run"
    packed = ["--storage_path=s", "train.py", "--config=configs/v3.py:small"]
    assert options.parse(packed).name == "v3"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required: --storage_path"),
        (["--storage_path="], "--storage_path is missing"),
        (["--storage_path=x", "--num_workers=0"], "--num_workers=0 is not between 1 and"),
        (["--storage_path=x", "--num_workers=1:4"], "invalid int value: '1:4'"),
        (["--storage_path=x", "--max_failures=-2"], "--max_failures=-2 is not between -1 and"),
        (
            ["--storage_path=x", "--num_workers=2", "--min_workers=3"],
            "--min_workers=3 is not between 1 and --num_workers=2",
        ),
        (["--storage_path=x", "--placement_strategy=ROUND"], "Choose of SPREAD, STRICT_SPREAD,"),
        (["--storage_path=x", "--name=a/b"], "--name=a/b is no name of a folder"),
        (["--storage_path=x", "--name=.."], "--name=.. is no name of a folder"),
        (["--storage_path=hdfs://x/y"], "--storage_path=hdfs://x/y is no place for checkpoints"),
        (["--storage_path=s3://"], "--storage_path=s3:// is no place for checkpoints"),
        (["--storage_path=s3://b/c?endpoint_override=x"], "Set AWS_ENDPOINT_URL"),
        (["--storage_path=x", "--env=NOT_THERE"], "--env=NOT_THERE: there is no such variable"),
        (["--storage_path=x", "--env=a b=c"], "--env=a b=c names no variable"),
        (["--storage_path=x", "--use_gpu"], "unrecognized arguments: --use_gpu"),
    ],
)
def test_bad_options(arguments, text):
    with pytest.raises(UserError) as error:
        __main__.main(["ray", *arguments, *COMMAND])
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--workdir=runs/a", "--storage_path and --name say where the run is"),
        ("--num_processes=2", "--num_workers says how many"),
        ("-process_id=0", "the workers find each other"),
        ("--config.checkpoint.dir=/x", "Ray knows of checkpoints below --storage_path=s only"),
    ],
)
def test_what_ray_decides(argument, text):
    with pytest.raises(UserError, match=text):
        options.parse(["--storage_path=s", *COMMAND, argument])


def test_a_call_that_is_wrong():
    with pytest.raises(UserError, match="nowhere.py is not a file"):
        options.from_python(["nowhere.py"], storage_path="s")
    with pytest.raises(UserError, match="use_gpu is not an option of ray.fit. Choose of command,"):
        options.from_python(COMMAND, storage_path="s", use_gpu=True)
    with pytest.raises(UserError, match="is not a list"):
        options.from_python("train.py", storage_path="s")


def test_without_ray(monkeypatch):
    """This environment has none."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Install it: pip install 'deepseek_jax\[ray\]'"):
        driver.fit(COMMAND, storage_path="s")


def test_neither_ray_nor_jax_is_imported():
    heavy = "sorted({'jax', 'flax', 'orbax', 'ray'} & sys.modules.keys())"
    program = f"import sys, deepseek_jax.launch.ray.command as c; print({heavy}, c.main and '')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[] \n"), done.stderr


class FakeRay(types.ModuleType):
    """Ray as it is imported: `fails` are raised by the next calls of init."""

    def __init__(self, monkeypatch, *fails: Exception, hosts=({"CPU": 2.0},)):
        super().__init__("ray")
        for name in ("ray.train", "ray.train.v2", "ray.train.v2.jax"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "ray", self)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        self.fails, self.hosts, self.calls = list(fails), hosts, []

    def is_initialized(self):
        return False

    def init(self, **options):
        self.calls.append(options)
        if self.fails:
            raise self.fails.pop(0)

    def shutdown(self):
        self.calls.append("shutdown")

    def nodes(self):
        return [{"Alive": True, "Resources": host} for host in self.hosts]


def test_a_cluster_of_this_host(monkeypatch):
    """It is tried twice; one that `ray start` has made comes first; a named one is the only one."""
    ray, given = FakeRay(monkeypatch, RuntimeError("timed out")), parse("--storage_path=s")
    with cluster.connected(given) as to:
        assert to == (ray, True, True) and len(ray.calls) == 3 and ray.calls[1] == "shutdown"
        assert ray.calls[0] == ray.calls[2] and ray.calls[2]["include_dashboard"] is False
        with pytest.raises(UserError, match="the cluster has room for 2 of 9 workers"):
            cluster.check_room(to, parse("--storage_path=s", "--num_workers=9"), print)
    assert ray.calls[3:] == ["shutdown"]
    said, existing = [], ValueError("When connecting to an existing cluster, num_cpus ...")
    ray = FakeRay(monkeypatch, existing)
    with cluster.connected(given) as to:
        assert not to.alone and ray.calls[1]["address"] is None
        cluster.check_room(to, parse("--storage_path=s", "--num_workers=9"), said.append)
    assert said[0].startswith(
        "the cluster has room for 2 of 9 workers with 0 GPUs and 1 CPUs each now"
    )
    ray = FakeRay(monkeypatch, ConnectionError("nobody there"))
    with pytest.raises(UserError, match="--address=h:1: Ray cannot be reached or started there"):
        with cluster.connected(parse("--storage_path=s", "--address=h:1")):
            pass
    assert [call["address"] for call in ray.calls] == ["h:1"]


def test_what_a_process_is_given():
    given = parse("--storage_path=s3://bucket", "--env=HF_HOME=/hf", "--grace=7")
    caller = {
        "XLA_FLAGS": "--f",
        "NCCL_DEBUG": "INFO",
        "JAX_PLATFORMS": "cpu",
        "JAX_PROCESS_ID": "7",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "HOME": "/home/me",
    }
    plan = job.plan(given, "/project", caller)
    assert plan.command == [
        "-u",
        *COMMAND,
        "--config.checkpoint.dir=s3://bucket/tiny/run/checkpoints",
    ]
    assert plan.env == {
        "XLA_FLAGS": "--f",
        "NCCL_DEBUG": "INFO",
        "JAX_PLATFORMS": "cpu",
        "HF_HOME": "/hf",
    }
    assert plan.grace == 7 and plan.remote and job.Plan(**plan._asdict()) == plan
    ray = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "4,5", "JAX_NUM_PROCESSES": "9"}
    here = {"address": "10.0.0.1:23456", "token": "t"}
    assert job.environment(ray, plan, here, 1, 2) == plan.env | {
        "CUDA_VISIBLE_DEVICES": "4,5",
        "JAX_COORDINATOR_ADDRESS": "10.0.0.1:23456",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
        "DEEPSEEK_JAX_TOKEN": "t",
    }
    threads = job.plan(given, "/project", {"OMP_NUM_THREADS": "8"})
    assert job.environment(ray, threads, here, 0, 2)["OMP_NUM_THREADS"] == "8"
    for host in ("127.0.0.1", "127.0.0.2"):
        alone = job.environment({}, plan, job.meeting(host), 0, 2)
        assert alone["JAX_COORDINATOR_BIND_ADDRESS"] == alone["JAX_COORDINATOR_ADDRESS"]
    assert len(alone["DEEPSEEK_JAX_TOKEN"]) == 32
    folder = job.plan(parse("--storage_path=store"), "/project", {})
    assert not folder.remote and folder.command == ["-u", *COMMAND]


def test_what_is_not_tried_again():
    """A mistake, bad numbers and stops are returned to Ray; what is raised it starts again."""
    final = [code for code in range(256) if job.is_final(code)]
    assert final == [0, 2, 3, 129, 130, 138, 140, 143]
    assert job.explained(2, "train.py: --x is wrong.") == "train.py: --x is wrong."
    assert job.explained(137, "") == "train.py ended by SIGKILL"
    assert (
        job.explained(4, "lost", "process 1:") == "process 1: train.py ended with exit code 4: lost"
    )
    assert job.explained(255, "") == "train.py ended with exit code 255"


def test_room_in_a_cluster():
    hosts = [{"GPU": 8.0, "CPU": 64.0}, {"GPU": 8.0, "CPU": 64.0}, {"CPU": 64.0}]
    assert cluster.fitting(hosts, parse("--storage_path=s", "--gpus_per_worker=8")) == 2
    four = ["--storage_path=s", "--gpus_per_worker=4"]
    assert cluster.fitting(hosts, parse(*four)) == 4
    assert cluster.fitting(hosts, parse(*four, "--placement_strategy=STRICT_SPREAD")) == 2
    assert cluster.fitting(hosts, parse("--storage_path=s", "--cpus_per_worker=64")) == 3


def make_run(folder, steps=(10, 20), rows=3):
    for step in steps:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        (folder / "checkpoints" / str(step) / "manifest.json").write_text("{}")
    text = "".join(
        f'{{"step": {10 * i}, "loss": {5 - i}.5, "list": [1]}}\n' for i in range(1, rows + 1)
    )
    (folder / "metrics.jsonl").write_text(text + '{"step": 20, "eval_loss": 4.25}\n{"step": 3')
    (folder / "config.json").write_text("{}")
    return storage.Storage(fs.LocalFileSystem(), str(folder))


def test_checkpoints_and_metrics_of_a_run(tmp_path):
    run = make_run(tmp_path)
    (tmp_path / "checkpoints" / "30").mkdir()  # without a manifest it is not whole
    (tmp_path / "checkpoints" / "5.damaged").mkdir()
    assert run.steps() == [10, 20] and run.checkpoint(20) == str(tmp_path / "checkpoints/20")
    assert storage.metrics_at(str(tmp_path), 20) == {"eval_loss": 4.25, "loss": 3.5, "step": 20}
    assert storage.metrics_at(str(tmp_path), 15) == {"loss": 4.5, "step": 15}
    assert storage.metrics_at(str(tmp_path / "nothing"), 10) == {"step": 10}
    assert storage.Storage(fs.LocalFileSystem(), str(tmp_path / "new")).steps() == []


def test_files_go_to_a_bucket_and_come_back(tmp_path):
    """The storage wins: another host may have gone on. Checkpoints, the lock and unfinished files stay."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    make_run(here)
    (here / "lock").write_text("host")
    (here / "config.json.tmp").write_text("half")
    (here / "tensorboard").mkdir()
    (here / "tensorboard" / "events").write_text("e")
    bucket = storage.Storage(fs.LocalFileSystem(), str(there))
    bucket.send(str(here))
    names = sorted(p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file())
    assert names == ["config.json", "metrics.jsonl", "tensorboard/events"]
    (there / "config.json").write_text('{"from": "another host"}')
    bucket.send(str(here))
    assert (there / "config.json").read_text() == '{"from": "another host"}', "it has not changed"
    (here / "metrics.jsonl").write_text("rows\n")
    bucket.send(str(here))
    assert (there / "metrics.jsonl").read_text() == "rows\n"
    (here / "stale").write_text("")
    bucket.fetch(str(here))
    assert not (here / "stale").exists() and not (here / "lock").exists()
    assert (here / "config.json").read_text() == '{"from": "another host"}'
    assert (here / "tensorboard" / "events").read_text() == "e"


class FakeProcess:
    def __init__(self):
        self.code = None
        self.got = []

    def signal(self, number):
        self.got.append(number)


def test_what_worker_0_decides(tmp_path):
    run, process, signals = make_run(tmp_path), FakeProcess(), []
    chief = Chief(run, process, lambda: signals, known=None)
    assert chief.reported == 10, "the newest one is news to a new controller"
    assert chief.decide(False) == Order((20,), None) and chief.decide(False) == Order((), None)
    make_run(tmp_path, steps=(30, 40))
    signals.append(signal.SIGTERM)
    assert chief.decide(False) == Order((30, 40), None) and process.got == [signal.SIGTERM]
    assert chief.decide(True) == Order((), None) and chief.preempted
    assert chief.decide(True) == Order((), None)
    assert process.got == [signal.SIGTERM] * 2, "each is passed on once"
    process.code = 143
    make_run(tmp_path, steps=(50,))
    assert chief.decide(True) == Order((50,), 143), "the last checkpoint is reported, too"
    assert Chief(run, process, list, known=40).decide(False) == Order((50,), 143)
    assert Chief(run, process, list, known=50).decide(False) == Order((), 143)


def test_a_bucket_has_the_metrics_before_ray_has_the_checkpoint(tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    make_run(local, steps=())
    bucket = (
        make_run(tmp_path / "bucket", rows=0) if (tmp_path / "bucket").mkdir() is None else None
    )
    chief = Chief(bucket, FakeProcess(), list, known=None, local=str(local))
    assert chief.decide(False).report == (20,)
    assert storage.metrics_at(str(tmp_path / "bucket"), 20)["loss"] == 3.5


def test_which_failure_is_said():
    lost, killed = WorkerFailed(4, "one was lost"), WorkerFailed(137, "ended by SIGKILL")
    assert driver._reason({0: lost, 1: killed}) == (137, "ended by SIGKILL")
    assert driver._reason({0: lost, 1: OSError(5, "gone")}) == (1, "worker 1: gone")
    assert driver._reason({0: lost}) == (4, "one was lost")


def test_signals_to_the_command():
    """They are passed on; the second urgent one ends it, wherever it waits."""
    got = []
    with pytest.raises(driver.RunFailed, match="ended at once by a second signal, 15") as error:
        with driver._signals(got.append):
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
    assert error.value.code == 143 and got == [10, 15, 10]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_output_and_signals(capfd):
    """Lines of a worker are in Ray's files as they are, and reach the command with their number."""
    link, first, second = Link(), Output(0), Output(1)
    first.add(False, b"step 1\n")
    second.add(True, b"warning\r\n")
    second.add(True, b"\n")
    assert capfd.readouterr() == ("step 1\n", "warning\r\n\n")
    link.began(2)
    for output in (first, second, first):
        output.send(link.put)
    lines = link.take()
    assert lines == [(False, "step 1"), (True, "[1] warning"), (True, "[1] ")] and not link.take()
    assert first.last == "" and second.last == "warning"
    show(lines)
    assert capfd.readouterr() == ("step 1\n", "[1] warning\n[1] \n")
    link.began(1)
    assert link.take() == [(True, "deepseek_jax.launch: starting again, with 1 worker.")]
    link.signal(15)
    link.signal(15)
    assert link.signals() == [15, 15]


def test_a_process_and_its_last_words(tmp_path, capfd):
    program = (
        "import os, sys\nprint(os.getcwd())\nprint('one', file=sys.stderr)\n"
        "print('two', file=sys.stderr)\nsys.exit(2)\n"
    )

    def start(program: str, folder=tmp_path) -> Process:
        return Process(["-c", program], str(folder), dict(os.environ), Output(0))

    process = start(program)
    assert process.end(60) == 2 and process.code == 2 and process.said == "two"
    assert capfd.readouterr().out.strip() == os.path.realpath(tmp_path)
    with pytest.raises(OSError):
        start("", tmp_path / "nowhere")
    process = start(
        "import signal, sys, time\nsignal.signal(15, signal.SIG_IGN)\n"
        "print('on', file=sys.stderr, flush=True)\ntime.sleep(99)\n"
    )
    while not process.said:
        time.sleep(0.02)
    process.signal(signal.SIGTERM)
    assert process.code is None and process.end(0.1) == 137


def test_a_process_ends_with_its_worker():
    """However the worker ends."""
    program = (
        "import os, time\nfrom deepseek_jax.launch.ray.link import Output\n"
        "from deepseek_jax.launch.ray.process import Process\n"
        "command = ['-c', 'import time; time.sleep(99)']\n"
        "print(Process(command, '.', dict(os.environ), Output(0)).pid, flush=True)\ntime.sleep(99)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(worker.stdout.readline())
    worker.kill()
    worker.wait()
    deadline = time.monotonic() + 10
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not lives(pid)
