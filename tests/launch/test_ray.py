"""Ray itself, on this host: `make test-ray`, in an environment of its own.

Two CPU workers train what two processes of the launcher train. One is killed, the driver is stopped, a
host is taken away, a bucket of S3 takes the place of the folder: losses are those of the run that nobody
disturbed, bit for bit, as in two processes on the same mesh the same programs run on the same numbers.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import tempfile
import time

import pytest

from benchmarks.durability import faults
from benchmarks.durability.faults import Process
from deepseek_jax.checkpoint import manifest
from deepseek_jax.checkpoint.folder import Folder, steps_in
from deepseek_jax.cluster.ports import free_port
from tests.support.runs import lives

pytestmark = [pytest.mark.slow, pytest.mark.ray]
LIMIT = 300.0
STEPS = 240


@pytest.fixture(autouse=True)
def own_cluster(monkeypatch):
    """Ray takes the cluster that the last one to start on this host has named in a file, dead or alive: each
    test has a folder of its own for it. Sockets are in there, whose paths are short."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a text, and compiled programs that all runs share."""
    folder = tmp_path_factory.mktemp("ray")
    faults.corpus(folder)
    return folder


@pytest.fixture(scope="module")
def calm(place) -> dict[int, faults.Row]:
    """The rows of the run that nobody disturbs."""
    launch = ["-m", "deepseek_jax.launch", "--nproc_per_node=2"]
    arguments = train(place)
    with Process([*launch, *arguments, f"--workdir={place}/calm"], environment(place)) as p:
        assert p.wait(LIMIT) == 0, p.lines
    return faults.rows(place / "calm")[0]


def environment(place: pathlib.Path, **more: str) -> dict[str, str]:
    slow = {
        "RAY_agent_register_timeout_ms": "300000",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # a busy host
    return faults.environment(place) | slow | more


def train(place: pathlib.Path, steps: int = STEPS, **options) -> list[str]:
    """The arguments of a run without its workdir."""
    options = {"mesh__fsdp": -1, "train__steps": steps} | options
    arguments = faults.train(place, place / "corpus.txt", **options)
    return [a for a in arguments if not a.startswith("--workdir")]


def ray(place: pathlib.Path, name: str, *options: str, store: str = "") -> list[str]:
    """`launch ray` with two workers."""
    where = store or place / "store"
    start = ["-m", "deepseek_jax.launch", "ray", "--num_workers=2", f"--storage_path={where}"]
    return [*start, f"--name={name}", *options]


def pid_of(name: str, rank: int) -> int:
    """The train.py of a run with this number."""
    for proc in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (proc / "cmdline").read_bytes().split(b"\0")
            env = (proc / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        of_run = any(w.startswith(b"--workdir=") and f"/{name}".encode() in w for w in words)
        if of_run and f"JAX_PROCESS_ID={rank}".encode() in env:
            return int(proc.name)
    raise AssertionError(f"process {rank} of {name} does not run")


def parent_of(pid: int) -> int:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[1])


def wait_for_step(workdir: pathlib.Path, step: int, p: Process) -> None:
    deadline = time.monotonic() + LIMIT
    while max(faults.rows(workdir)[0], default=0) < step:
        assert p.popen.poll() is None and time.monotonic() < deadline, p.lines
        time.sleep(0.02)


def same(workdir: pathlib.Path, calm: dict[int, faults.Row], steps: int = STEPS) -> None:
    rows, twice = faults.rows(workdir)
    assert twice == 0 and sorted(rows) == list(range(1, steps + 1))
    assert all(rows[step] == calm[step] for step in rows)


def test_a_killed_process_and_a_killed_worker(place, calm):
    """Process 1 is killed, then Ray's worker 0, whose process the kernel ends with it. Both times all
    start again from the newest checkpoint."""
    workdir = place / "store" / "killed" / "run"
    with Process(
        [*ray(place, "killed", "--max_failures=2"), *train(place)], environment(place)
    ) as p:
        wait_for_step(workdir, 25, p)
        os.kill(pid_of("killed", 1), signal.SIGKILL)
        assert p.wait_for(r"process 1 \(.*\) was lost after step \d+", LIMIT), p.lines
        assert p.wait_for(r"resuming after step \d+", LIMIT), p.lines
        wait_for_step(workdir, max(faults.rows(workdir)[0]) + 20, p)
        train_0 = pid_of("killed", 0)
        os.kill(parent_of(train_0), signal.SIGKILL)
        assert p.wait(LIMIT) == 0, p.lines
        assert not lives(train_0)
    output = "\n".join(p.lines)
    assert len(re.findall(r"resuming after step \d+", output)) == 2
    assert f"the newest checkpoint is {workdir}/checkpoints/{STEPS}" in p.lines[-1]
    same(workdir, calm)


def test_a_mistake_is_not_tried_again(place):
    bad = train(place, train__batch_size=7)
    with Process([*ray(place, "bad", "--max_failures=3"), *bad], environment(place)) as p:
        assert p.wait(LIMIT) == 2, p.lines
    assert [re.sub("=7 .*", "=7 ", line) for line in p.lines] == [
        f"deepseek_jax.launch: run bad in {place}/store/bad/run, 2 workers on CPUs",
        "train.py: config.train.batch_size=7 ",
        "deepseek_jax.launch: train.py ended with exit code 2.",
    ]


def test_a_stopped_driver_saves(place, calm):
    """SIGTERM to the driver; the same command goes on."""
    workdir = place / "store" / "stopped" / "run"
    command = [*ray(place, "stopped"), *train(place)]
    with Process(command, environment(place)) as p:
        wait_for_step(workdir, 15, p)
        p.kill(signal.SIGTERM)
        assert p.wait(LIMIT) == 143, p.lines
    step = max(faults.rows(workdir)[0])
    assert step < STEPS and (workdir / "checkpoints" / str(step) / "manifest.json").exists()
    assert f"the newest checkpoint is {workdir}/checkpoints/{step}" in p.lines[-1]
    with Process(command, environment(place)) as p:
        assert p.wait(LIMIT) == 0, p.lines
    assert any(f"resuming after step {step}" in line for line in p.lines)
    same(workdir, calm)


FIT = """
import json, os, sys, ray
from deepseek_jax.launch.ray import fit
def main():
    ray.init(address="local", num_cpus=1, include_dashboard=False)
    outcome = fit(sys.argv[2:], storage_path=sys.argv[1], num_workers=2, min_workers=1, name="elastic")
    print("OUTCOME", json.dumps(outcome._asdict()))
main()
"""


def test_fewer_hosts_than_asked_for(place, calm, tmp_path):
    """From Python, on a cluster with room for one of two workers: it trains the same in one process."""
    (tmp_path / "fit.py").write_text(FIT)
    command = [str(tmp_path / "fit.py"), str(place / "store"), *train(place, 40)]
    with Process(command, environment(place)) as p:
        assert p.wait(LIMIT) == 0, p.lines
    (line,) = [line for line in p.lines if line.startswith("OUTCOME ")]
    outcome = json.loads(line.removeprefix("OUTCOME "))
    workdir = place / "store" / "elastic" / "run"
    assert (outcome["code"], outcome["step"], outcome["workdir"]) == (0, 40, str(workdir))
    assert outcome["checkpoint"] == f"{workdir}/checkpoints/40"
    rows, _ = faults.rows(workdir)
    assert outcome["metrics"]["step"] == 40 and outcome["metrics"]["loss"] == rows[40][0]
    # One device sums in another order than two: the tolerance of the mesh's own tests.
    assert [r[0] for r in rows.values()] == pytest.approx([calm[s][0] for s in rows], rel=1e-5)


PREEMPTION = """
import json, pathlib, sys, threading, time, ray
from ray.cluster_utils import Cluster
from deepseek_jax.launch.ray import fit

def take_a_host_away(address, checkpoints):
    while not any(p.name.isdigit() for p in checkpoints.glob("*")):
        time.sleep(0.05)
    free = ray._private.state.available_resources_per_node()
    hosts = [n["NodeID"] for n in ray.nodes() if n["Resources"].get("CPU")]
    busy = [host for host in hosts if not free[host].get("CPU")]
    in_a_minute = int(1000 * (time.time() + 60))
    print("DRAINED", ray._raylet.GcsClient(address=address).drain_node(busy[-1], 2, "a test", in_a_minute))

def main():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address)
    checkpoints = pathlib.Path(sys.argv[1], "preempted", "run", "checkpoints")
    threading.Thread(target=take_a_host_away, args=(cluster.address, checkpoints), daemon=True).start()
    outcome = fit(sys.argv[2:], storage_path=sys.argv[1], num_workers=2, name="preempted")
    print("OUTCOME", json.dumps(outcome._asdict()))
    ray.shutdown()
    cluster.shutdown()
main()
"""


def test_a_host_is_taken_away(place, calm, tmp_path):
    """Ray says so a minute before: the run is saved and goes on on other hosts. No failure is counted."""
    (tmp_path / "fit.py").write_text(PREEMPTION)
    workdir = place / "store" / "preempted" / "run"
    command = [str(tmp_path / "fit.py"), str(place / "store"), *train(place, 2000)]
    with Process(command, environment(place)) as p:
        assert p.wait(3 * LIMIT) == 0, p.lines  # four hosts of Ray, and two runs of 2,000 steps
    output = "\n".join(p.lines)
    assert "DRAINED (True" in output, output
    assert re.search(r"stopped at step \d+, as Ray takes a host away; starting again", output)
    rows, twice = faults.rows(workdir)
    assert twice == 0 and sorted(rows) == list(range(1, 2001))
    assert all(rows[step] == calm[step] for step in calm)


@pytest.fixture(scope="module")
def bucket():
    """A server of S3 on this host, with a bucket: (variables that lead there, what it holds)."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    server.start()
    env = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    client = boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="bucket")

    def contents(prefix: str) -> dict[str, bytes]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
        keys = [o["Key"] for page in pages for o in page.get("Contents", [])]
        return {
            k.removeprefix(prefix): client.get_object(Bucket="bucket", Key=k)["Body"].read()
            for k in keys
        }

    yield env, contents
    server.stop()


def test_the_folder_of_checkpoints_in_a_bucket(bucket, monkeypatch):
    """Half of a checkpoint does not count; a damaged one is put aside; what is not there is empty."""
    for name, value in bucket[0].items():
        monkeypatch.setenv(name, value)
    folder = Folder("s3://bucket/folder/checkpoints", read_only=False)
    assert folder.steps() == [] and folder.damaged() == []
    for step in (10, 20):
        folder.begin(step)
        draft = folder.draft(step)
        (draft / "state" / "x").write_bytes(b"abc" * 1000)
        (draft / "extra").write_text("{}")
        sums = manifest.checksums(draft, manifest.files_of(draft))
        assert sums.keys() == {"state/x", "extra"} and folder.steps() == [10] * (step > 10)
        manifest.write(draft, manifest.Manifest("full", step, sums, {}))
        folder.commit(step)
    assert folder.steps() == [10, 20] == steps_in("s3://bucket/folder/checkpoints")
    assert manifest.check(folder.at(20), manifest.read(folder.at(20))) == []
    (folder.at(20) / "state" / "x").write_bytes(b"abd" * 1000)
    (bad,) = manifest.check(folder.at(20), manifest.read(folder.at(20)))
    assert bad == ("state/x", "its bytes are not those that were written")
    assert folder.put_aside(20) == "20.damaged" and folder.damaged() == ["20.damaged"]
    assert folder.steps() == [10] and (folder.path / "20.damaged" / "state" / "x").exists()
    folder.begin(30)
    (folder.draft(30) / "extra").write_text("{}")
    folder.begin(30)
    assert not folder.draft(30).exists(), "what was left of a killed save is gone"
    folder.delete(10)
    assert folder.steps() == []


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_a_bucket(place, calm, bucket, kind, tmp_path):
    """storage_path="s3://bucket/checkpoints": checkpoints are written there, config and metrics copied; a
    host that has nothing goes on from there."""
    variables, contents = bucket
    env = environment(place, **variables)
    name = f"s3-{kind}"
    start = ray(place, name, store="s3://bucket/checkpoints")
    kind_of = {"checkpoint__kind": kind, "checkpoint__every_steps": 10}
    for host, steps in (("one", 20), ("two", 40)):
        local = f"--local_dir={tmp_path / host}"
        with Process([*start, local, *train(place, steps, **kind_of)], env) as p:
            assert p.wait(LIMIT) == 0, p.lines
        assert f"s3://bucket/checkpoints/{name}/run/checkpoints/{steps}" in p.lines[-1], p.lines
    assert any("resuming after step 20" in line for line in p.lines), p.lines
    there = contents(f"checkpoints/{name}/run/")
    steps_there = {int(k.split("/")[1]) for k in there if k.endswith("manifest.json")}
    assert steps_there == {20, 30, 40}, "checkpoint.keep=3"
    assert json.loads(there["config.json"])["checkpoint"]["kind"] == kind
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "metrics.jsonl").write_bytes(there["metrics.jsonl"])
    same(copy, calm, 40)
    shown = ["-m", "deepseek_jax.checkpoint", "verify", f"s3://bucket/checkpoints/{name}/run"]
    with Process(shown, env) as p:
        assert p.wait(LIMIT) == 0, p.lines
