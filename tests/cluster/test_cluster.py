"""Finding the cluster, agreeing in it, and who gets which GPU: everything about several processes
that needs no training."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import types
from typing import NamedTuple

import pytest

from deepseek_jax.cluster import agreement, discovery, gpus, processes, wire
from deepseek_jax.cluster.agreement import Agreement, NoAnswer, difference, other_mistakes
from deepseek_jax.cluster.discovery import Membership, find
from deepseek_jax.cluster.gpus import Claim, divide, shares, visible_gpus
from deepseek_jax.cluster.ports import free_port, listen
from deepseek_jax.cluster.wire import TOKEN, job_token
from deepseek_jax.errors import UserError
from tests import support
from tests.support.strangers import visit

ROOT = str(support.ROOT)
JAX = {"JAX_COORDINATOR_ADDRESS": "host0:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
TORCHRUN = {
    "MASTER_ADDR": "host0",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
SLURM_JOB = "SLURM 77"
URI = "OMPI_MCA_orte_hnp_uri"
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
ALONE = [
    {},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a notebook
    SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    SLURM
    | {
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
    },  # an interactive step
    {
        "SLURM_JOB_ID": "77",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    },  # a batch script outside srun
    OMPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"},
    {"MASTER_ADDR": "host0", "WORLD_SIZE": "2"},  # left over
    JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
]


@pytest.mark.parametrize("env", ALONE, ids=str)
def test_alone(env, monkeypatch):
    """Nobody is asked: not the network, not JAX."""
    monkeypatch.setattr(discovery, "_ask_jax", lambda *_: pytest.fail("JAX was asked"))
    assert find(None, None, None, 1, env) is None


FOUND = [
    (("host1:1234", 2, 0), {}, Membership("host1", 1234, 2, 0)),
    (("[fe80::1]:1234", 2, 0), {}, Membership("fe80::1", 1234, 2, 0)),
    ((None, None, None), JAX, Membership("host0", 8476, 4, 3)),
    (("host1:1", None, 2), JAX, Membership("host1", 1, 4, 2)),
    ((None, None, None), JAX | SLURM | TORCHRUN, Membership("host0", 8476, 4, 3)),
    ((None, None, None), TORCHRUN, Membership("host0", 29500, 2, 1, True, "torchrun")),
    (
        (None, None, None),
        TORCHRUN | SLURM | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"},
        Membership("host0", 29501, 2, 1, True, "torchrun none"),
    ),
    ((None, None, None), SLURM, Membership("node003", 61440 + 77, 2, 1, True, SLURM_JOB)),
    (("node9:5", None, None), SLURM, Membership("node9", 5, 2, 1, True, SLURM_JOB)),
    (
        (None, 2, None),
        SLURM | {"SLURM_NTASKS": "3"},
        Membership("node003", 61440 + 77, 2, 1, True, SLURM_JOB),
    ),
    (
        (None, None, None),
        OMPI,
        Membership(
            "10.96.0.1", 61440 + 1531576320 // 4096 % 4096, 2, 1, True, f"Open MPI   {OMPI[URI]}"
        ),
    ),
    ((None, 1, None), SLURM, None),
]


@pytest.mark.parametrize("flags, env, place", FOUND, ids=str)
def test_found(flags, env, place, monkeypatch):
    for name, value in env.items():  # JAX reads the environment itself
        monkeypatch.setenv(name, value)
    assert find(*flags, 1, env) == place


@pytest.mark.parametrize(
    "flags, env, text",
    [
        ((None, 2, 0), {}, "--coordinator_address is missing"),
        (("host0:1", None, None), {}, "--num_processes and --process_id are missing"),
        ((None, None, 1), {}, "--process_id=1 needs --num_processes and --coordinator_address"),
        (("host0:1", 2, 2), {}, "--process_id=2 is not below --num_processes=2"),
        (("host0", 2, 1), {}, "--coordinator_address=host0 is not HOST:PORT"),
        (("host0:99999", 2, 1), {}, "--coordinator_address=host0:99999 is not HOST:PORT"),
        ((None, None, None), JAX | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID=one is not a number"),
        (
            (None, None, None),
            {k: v for k, v in OMPI.items() if "hnp" not in k},
            "Open MPI started this process",
        ),
        (
            (None, None, None),
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
            "--num_processes=1 trains alone",
        ),
    ],
    ids=str,
)
def test_not_found(flags, env, text, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        find(*flags, 1, env)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_visible_gpus(monkeypatch):
    """Asked of a driver that has three, and of none."""

    class Driver:
        cuInit = staticmethod(lambda flags: 0)

        @staticmethod
        def cuDeviceGetCount(count):
            count._obj.value = 3
            return 0

        @staticmethod
        def cuDeviceGet(device, index):
            device._obj.value = 10 + index
            return 0

        @staticmethod
        def cuDeviceGetUuid_v2(name, device):
            name._obj[:] = [device.value] * 16
            return 0

    def absent(name):
        raise OSError("no such library")

    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda name: Driver)
    assert visible_gpus() == [
        f"GPU-{d * 4}-{d * 2}-{d * 2}-{d * 2}-{d * 6}" for d in ("0a", "0b", "0c")
    ]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert visible_gpus() == []
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert len(visible_gpus()) == 3
    monkeypatch.setattr(gpus.ctypes, "CDLL", absent)
    assert visible_gpus() == []


def test_memory_of_the_gpus(monkeypatch):
    """Set where there are GPUs and nobody has said otherwise; less with several, for NCCL."""

    def found(visible, several=False, **env):
        monkeypatch.setattr(gpus, "visible_gpus", lambda: visible)
        gpus.take_memory(several, env)
        return env

    assert found([]) == {} and found(["a"]) == {gpus.FRACTION: "0.95"}
    assert found(["a"], several=True) == found(["a", "b"]) == {gpus.FRACTION: "0.9"}
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        assert found(["a"], **{name: "0.5"}) == {name: "0.5"}


def test_divide_gpus():
    four = ["a", "b", "c", "d"]
    assert divide([Claim("x", []), Claim("x", [])]) == [None, None]  # CPUs
    assert divide([Claim("x", four), Claim("y", ["e", "f"])]) == [None, None]  # a process a host
    assert divide([Claim("x", ["a", "b"]), Claim("x", ["c", "d"])]) == [
        None,
        None,
    ]  # the launcher's, or the scheduler's
    assert divide([Claim("x", four, True), Claim("y", ["e"], True), Claim("x", four, True)]) == [
        [0, 1],
        None,
        [2, 3],
    ]
    for claims, said in [
        (
            [Claim("x", four), Claim("x", four)],
            "Processes 0 and 1 on x would use the same GPUs (0, 1, 2, 3 of the 4 that process 0 sees)",
        ),
        (
            [Claim("y", ["e"]), Claim("x", four), Claim("x", ["d", "f"])],
            "Processes 1 and 2 on x would use the same GPUs (3 of the 4",
        ),
        (
            [Claim("x", four, True)] * 3,
            "Processes 0 and 1 on x",
        ),  # a scheduler's, but three into four
        ([Claim("x", four, True), Claim("x", four)], "Processes 0 and 1 on x"),
    ]:
        with pytest.raises(UserError) as error:
            divide(claims)
        assert said in str(error.value) and "deepseek_jax.launch" in str(error.value)


def test_shares_of_gpus():
    assert shares(["0", "1", "2", "3"], 2) == ["0,1", "2,3"]
    assert shares(["GPU-a", "GPU-b", "GPU-c"], 2, 1) == ["GPU-a", "GPU-b"]
    with pytest.raises(
        UserError, match=r"--nproc_per_node=3 does not divide the 4 visible GPUs \(0,1,2,3\)"
    ):
        shares(["0", "1", "2", "3"], 3)
    with pytest.raises(UserError, match="--nproc_per_node=4 does not divide the 2 visible GPUs"):
        shares(["0", "1"], 4)
    with pytest.raises(
        UserError,
        match="--nproc_per_node=2 x --devices_per_process=2 is more than the 3 visible GPUs",
    ):
        shares(["0", "1", "2"], 2, 2)


def report(process: int, **options) -> dict:
    return {"process": process, "host": "x", "same": {"command": {"--num_processes": 3} | options}}


def test_difference_names_the_option_and_both_values():
    assert difference([report(0, a=1), report(1, a=1)]) is None
    assert difference([report(0, a=1, b="u"), report(1, a=1, b="v"), report(2, a=1, b="v")]) == (
        "b differs between processes: 'u' (process 0), 'v' (process 1). Give every process the same command."
    )
    assert (
        "a differs between processes (and so does b): 1 (process 0), 2 (process 2)."
        in difference([report(0, a=1, b=1), report(1, a=1, b=1), report(2, a=2, b=2)])
    )
    assert "b differs between processes: 1 (process 0), None (process 1)" in difference(
        [report(0, b=1), report(1)]
    )
    same = report(0) | {"error": "wrong"}
    assert other_mistakes([same, same | {"process": 1}]) == []  # process 0 has said it
    assert other_mistakes([report(0), same | {"process": 1}, same | {"process": 2}]) == [
        "process 1, 2 (x): wrong"
    ]
    assert other_mistakes([same, report(1), report(2) | {"error": "bad"}]) == ["process 2 (x): bad"]


def together(count: int, work) -> list:
    """What work(index, port) returns or raises in `count` threads."""
    port = free_port()
    out = [None] * count

    def one(i):
        try:
            out[i] = work(i, port)
        except Exception as e:
            out[i] = e

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    return out


def numbers(reports):
    return {"came": [r["process"] for r in reports], "errors": [r.get("error") for r in reports]}


KEY = job_token({TOKEN: "the job's"}, "")


def agreement_of(i: int, port: int, key: bytes = KEY) -> Agreement:
    """Process `i` of three."""
    return Agreement(("127.0.0.1", port), 3, i, key, ("127.0.0.1", port))


def test_agreement():
    """Among strangers that connect to the same port; twice, the second time with a process that is gone."""

    def work(i, port):
        if i == 3:
            time.sleep(0.2)
            return visit(port)
        m = agreement_of(i, port)
        if i == 2:
            time.sleep(0.5)
        out = [m.exchange({"process": i, "count": 3}, numbers, 20)]
        if i < 2:
            out.append(m.exchange({"process": i, "count": 3}, numbers, 20))
        m.close()
        return out

    first, second, third, fourth = together(4, work)
    everyone = {"came": [0, 1, 2], "errors": [None] * 3}
    assert third == [everyone] and fourth is None
    gone = {"came": [0, 1, 2], "errors": [None, None, "it ended before training began"]}
    assert first == second == [everyone, gone]


def test_agreement_without_some(monkeypatch):
    monkeypatch.setattr(agreement, "PATIENCE", 1.0)
    started = time.monotonic()

    def late(i, port):
        return agreement_of(i, port).exchange({"process": i, "count": 3}, numbers, 1)

    assert [r["came"] for r in together(2, late)] == [[0, 1]] * 2

    def mistaken(i, port):  # a third process does not come; its absence is not waited for
        mine = {"process": i, "count": 3, "error": "wrong" * i}
        return agreement_of(i, port).exchange(mine, numbers, 60)

    assert [r["errors"] for r in together(2, mistaken)] == [["", "wrong"]] * 2

    def miscounted(i, port):  # nor is it when the processes were told different counts
        return agreement_of(i, port).exchange({"process": i, "count": 3 - i}, numbers, 60)

    assert [r["came"] for r in together(2, miscounted)] == [[0, 1]] * 2

    def nobody(i, port):
        return agreement_of(1, port).exchange({"process": 1, "count": 3}, numbers, 1)

    (answer,) = together(1, nobody)
    assert isinstance(answer, NoAnswer) and "refused" in str(answer) and not answer.refused
    assert time.monotonic() - started < 50


def test_another_token(monkeypatch):
    """A process with another token is refused, soon, and is not counted; process 0 can say where it
    came from."""
    monkeypatch.setattr(agreement, "PATIENCE", 1.0)
    first_process: list[Agreement] = []

    def work(i, port):
        mine = agreement_of(i, port, job_token({}, "SLURM 8") if i == 2 else KEY)
        first_process.extend([mine] * (i == 0))
        return mine.exchange({"process": i, "count": 3}, numbers, 3)

    first, second, third = together(3, work)
    assert first == second == {"came": [0, 1], "errors": [None, None]}
    assert isinstance(third, NoAnswer) and third.refused and "does not accept" in str(third)
    assert first_process[0].refused == {"127.0.0.1"}


def test_a_false_process_0(monkeypatch):
    """Something that does not know the token takes process 0's port: no report is sent to it."""
    monkeypatch.setattr(agreement, "PATIENCE", 0.5)
    heard: list[bytes] = []

    def work(i, port):
        if i == 1:
            return agreement_of(1, port).exchange({"process": 1, "secret": "options"}, numbers, 5)
        with listen("127.0.0.1", port) as listener:
            listener.settimeout(1)
            with contextlib.suppress(TimeoutError):
                while True:
                    s, _ = listener.accept()
                    with s:
                        s.sendall(b'{"challenge": "0"}\n')
                        heard.append(s.recv(1 << 16))
                        s.sendall(b'{"proof": "0"}\n')
                        heard.append(s.recv(1 << 16))

    _, answer = together(2, work)
    assert isinstance(answer, NoAnswer) and "does not know the token" in str(answer)
    assert heard and not any(b"options" in text for text in heard)


def test_tokens():
    """A secret comes before a job's name; another salt makes another key."""
    assert job_token({TOKEN: "a"}, "SLURM 7") == job_token({TOKEN: " a "}, "SLURM 8")
    assert len({job_token({}, ""), job_token({}, "a"), job_token({TOKEN: "a"}, "")}) == 3
    assert job_token({TOKEN: ""}, "a") == job_token({}, "a")
    assert wire.derived(KEY, "1") != wire.derived(KEY, "2")
    assert wire.new_token() != wire.new_token()


PROGRAM = """
import json, sys
from deepseek_jax.cluster import processes as cluster
from deepseek_jax.run.commandline import find_cluster
from deepseek_jax.errors import UserError

def agrees(flags, last):
    c = find_cluster(["program.py", *flags])
    with c.mistakes():
        if last.startswith("wrong"):
            raise UserError(last)
        c.agree("command", {"config.train.steps": last})
    print("agreed")

for flags, last in json.loads(sys.argv[1]):
    code = 0
    try:
        agrees(flags, last)
    except SystemExit as e:
        code = e.code
    print(f"exit {code}", flush=True)
    print("exit", file=sys.stderr, flush=True)
sys.exit(code)
"""


class Job(NamedTuple):
    """Processes, each with its last argument, of which the first two are started."""

    last: tuple[str, ...]
    timeout: int = 100


Said = tuple[list[int], list[str], list[str]]  # exit codes, lines on stdout, lines on stderr


def agree(tmp_path, *jobs: Job) -> list[Said]:
    """What two processes, which are in one job after the other, end and say in each."""
    (tmp_path / "program.py").write_text(PROGRAM)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT}
    rounds: tuple[list, list] = ([], [])
    for job in jobs:
        flags = [
            f"--coordinator_address=127.0.0.1:{free_port()}",
            f"--num_processes={len(job.last)}",
            f"--cluster_timeout={job.timeout}",
        ]
        for i in range(2):
            rounds[i].append(([*flags, f"--process_id={i}"], job.last[i]))
    began = time.monotonic()
    ps = [
        subprocess.Popen(
            [sys.executable, tmp_path / "program.py", json.dumps(mine)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for mine in rounds
    ]
    try:
        outs = [p.communicate(timeout=150) for p in ps]
    finally:
        for p in ps:
            p.kill()
    assert time.monotonic() - began < 90, "the processes waited for each other"
    found: list[Said] = [([], [], []) for _ in jobs]
    for p, (out, err) in zip(ps, outs, strict=True):
        codes = [int(n) for n in re.findall(r"^exit (\d+)$", out, re.MULTILINE)]
        assert codes and p.returncode == codes[-1], out + err
        parts = re.split(r"^exit \d+\n", out, flags=re.MULTILINE), err.split("exit\n")
        for said, code, text, errors in zip(
            found, codes, *(part[:-1] for part in parts), strict=True
        ):
            said[0].append(code)
            said[1].extend(text.splitlines())
            said[2].extend(errors.splitlines())
    return found


JOBS = (
    Job(("wrong a", "wrong a")),
    Job(("wrong a", "10")),
    Job(("10", "wrong b")),
    Job(("10", "10", "10"), timeout=6),
)


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[Job, Said]:
    """Of JOBS, in the same two processes: their imports take longer than all that they say."""
    return dict(zip(JOBS, agree(tmp_path_factory.mktemp("jobs"), *JOBS), strict=True))


def test_a_mistake_is_said_once(said):
    both, first, second, _ = JOBS
    assert said[both] == ([2, 2], [], ["program.py: wrong a"])
    assert said[first] == ([2, 2], [], ["program.py: wrong a"])
    host = socket.gethostname()
    assert said[second] == ([2, 2], [], [f"program.py: process 1 ({host}): wrong b"])


def test_a_process_that_does_not_come(said):
    codes, out, err = said[JOBS[-1]]
    assert codes == [2, 2] and not out and len(err) == 1
    for text in (
        "1 of 3 processes did not come to 127.0.0.1:",
        "within 6 s: number 2.",
        "--cluster_timeout",
    ):
        assert text in err[0]


@pytest.mark.slow
def test_a_process_with_another_token_is_told_so(tmp_path, monkeypatch):
    """Both end, each with a line; the one that is refused need not wait for the other."""
    tokens = tmp_path / "sitecustomize.py"
    tokens.write_text(
        "import os, sys\n"
        "if '--process_id=1' in sys.argv[-1]:\n    os.environ['DEEPSEEK_JAX_TOKEN'] = 'b'\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", f"{tmp_path}{os.pathsep}{ROOT}")
    ((codes, out, err),) = agree(tmp_path, Job(("10", "10"), timeout=15))
    assert codes == [2, 2] and not out and len(err) == 2
    absent, refused = sorted(err)
    assert "1 of 2 processes did not come" in absent and "were refused, from 127.0.0.1." in absent
    assert "is not of the same job" in refused and "DEEPSEEK_JAX_TOKEN" in refused


def test_a_crash_does_not_wait_for_others(monkeypatch, capsys):
    """JAX's exit handler would wait for the other processes, who wait in a collective. A lost
    process, if there is one, is said in its place."""
    alone, told = processes.Cluster(None, 1, "program"), []
    with pytest.raises(ZeroDivisionError), alone.failures():
        raise ZeroDivisionError("alone")
    alone.monitor = types.SimpleNamespace(failed=told.append)
    monkeypatch.setattr(processes.signals, "leave", sys.exit)
    for error in (
        ZeroDivisionError("among others"),
        OSError(5, "Input/output error", "corpus.txt"),
    ):
        with pytest.raises(SystemExit) as end, alone.failures(ValueError):
            raise error
        assert end.value.code == 1
    for error in (UserError("mine"), ValueError("expected, in all of them")):
        with pytest.raises(type(error)), alone.failures(ValueError):
            raise error
    assert told == ["ZeroDivisionError: among others", "corpus.txt: Input/output error"]
    error = capsys.readouterr().err
    assert (
        "Traceback" in error
        and "ZeroDivisionError: among others" in error
        and error.endswith("program: process 0: corpus.txt: Input/output error\n")
    )


def test_the_port_is_taken(monkeypatch):
    with listen("127.0.0.1", 0) as s:
        place = Membership("127.0.0.1", s.getsockname()[1], 2, 0)
        taken = r"--coordinator_address=127.0.0.1:\d+: process 0 cannot listen there \(Address already in use"
        with pytest.raises(UserError, match=taken):
            processes.Cluster(place, 1, "program")
    alone = processes.Cluster(None, 1, "program")
    monkeypatch.setattr(
        processes, "jax", types.SimpleNamespace()
    )  # alone, nothing of JAX is touched
    alone.join({}, 1.0, None)
    alone.agree("command", {})
    with pytest.raises(UserError, match="mine"), alone.mistakes():
        raise UserError("mine")
