"""Files for clusters: what they say, what the tools that read them take, what is refused."""

import gzip
import json
import os
import re
import shutil
import stat
import subprocess

import jsonschema
import pytest
import yaml

from deepseek_jax.errors import UserError
from deepseek_jax.launch.template import KINDS, Job, command, write
from deepseek_jax.launch.template.job import format_time, parse_time
from deepseek_jax.launch.template.variables import MEANINGS, meaning
from tests.support import ROOT

PROGRAM = ("train.py", "--config=configs/v3.py")
POD = ("--image=registry/image:1", "--workdir=/runs/v3")
JOB = Job(
    command=PROGRAM,
    name="v3",
    nodes=4,
    gpus_per_node=8,
    seconds=36000,
    workdir="/runs/v3",
    image="registry/image:1",
    hosts=("host0", "me@host1", "host2", "host3"),
    variables={"NCCL_IB_HCA": "mlx5_0,mlx5_1", "NCCL_SOCKET_IFNAME": "=ib0"},
)
# What a shell, YAML or sbatch could take apart.
ODD = ("a b", "$(touch odd)", "it's", '"#{{x}}', "", "--y=\\", "ü: -", "`touch odd`", "!a", "# b")


def strict(schema):
    """As `kubectl apply --validate=strict`: a field that the schema does not know is an error."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    return out


def schema_errors(kind: str, document) -> list[str]:
    path = ROOT / "tests" / "files" / "kubernetes" / f"{kind}.schema.json.gz"
    schema = strict(json.loads(gzip.decompress(path.read_bytes())))
    schema["properties"]["metadata"] = {"type": "object"}  # which every object has
    found = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{e.json_path}: {e.message}" for e in found]


def full(kind: str) -> Job:
    """Every attribute that acts in a file of this kind, set."""
    more = {
        "queue": "team-a",
        "topology": "cloud.google.com/gke-nodepool",
        "claim": "shared",
        "cpus_per_node": 64,
        "gib_per_node": 900,
        "python": "/opt/venv/bin/python",
        "partition": "h100",
        "account": "a",
        "gpu_type": "h100",
        "container": "image.sqsh",
        "directives": ("--qos=high",),
    }
    return Job(**(vars(JOB) | more))


@pytest.mark.parametrize("kind", ["jobset", "rayjob"])
@pytest.mark.parametrize("job", ["least", "full", "odd", "cpu"])
def test_kubernetes_files_are_valid(kind, job):
    """By the published schemas, in which a field that is not known is an error."""
    least = Job(command=PROGRAM, name="v3", image="i", workdir="/runs/v3")
    odd = Job(**(vars(JOB) | {"command": (*PROGRAM, *ODD), "variables": {"NCCL_X": ODD[3]}}))
    jobs = {
        "least": least,
        "full": full(kind),
        "odd": odd,
        "cpu": Job(**(vars(JOB) | {"gpus_per_node": 0})),
    }
    document = yaml.safe_load(write(kind, jobs[job]))
    assert schema_errors(kind, document) == []
    document["spec"]["replicas"] = 1
    assert len(schema_errors(kind, document)) == 1  # the test can fail


def test_the_jobset():
    """No rights, one process per pod, exit codes."""
    document = yaml.safe_load(write("jobset", JOB))
    spec = document["spec"]
    (workers,) = spec["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (
        workers["replicas"] == 1 and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    )
    assert job["parallelism"] == job["completions"] == 4 and pod["restartPolicy"] == "Never"
    assert "serviceAccountName" not in pod and pod["terminationGracePeriodSeconds"] == 300
    assert container["command"] == ["python", "-u", *PROGRAM, "--workdir=/runs/v3"]
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
    assert (
        env["JAX_COORDINATOR_ADDRESS"] == "v3-workers-0-0.v3:8476"
        and env["JAX_NUM_PROCESSES"] == "4"
    )
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert env["JAX_PROCESS_ID"] == {"fieldRef": {"fieldPath": index}}
    assert env["NCCL_IB_HCA"] == "mlx5_0,mlx5_1" and env["NCCL_SOCKET_IFNAME"] == "=ib0"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {m["mountPath"] for m in container["volumeMounts"]} == {"/runs", "/dev/shm"}
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 3]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    (again,) = spec["failurePolicy"]["rules"]
    assert again["action"] == "FailJobSet" and spec["failurePolicy"]["maxRestarts"] == 10
    assert again["onJobFailureReasons"] == ["PodFailurePolicy", "DeadlineExceeded"]
    # The webhook of JobSet: names of rules, and the length of a pod's name.
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", again["name"])
    longest = "a" * 44
    write("jobset", Job(**(vars(JOB) | {"name": longest})))
    assert (
        len(f"{longest}-workers-0-3-abcde") == 63 - 1 or len(f"{longest}-workers-0-3-abcde") == 63
    )


def test_the_rayjob():
    spec = yaml.safe_load(write("rayjob", JOB))["spec"]
    words = spec["entrypoint"].split()
    assert words[:4] == ["python", "-m", "deepseek_jax.launch", "ray"] and words[-2:] == list(
        PROGRAM
    )
    assert {"--num_workers=4", "--gpus_per_worker=8", "--storage_path=/runs", "--name=v3"} <= set(
        words
    )
    assert spec["shutdownAfterJobFinishes"] and spec["backoffLimit"] == 0
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 4
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": 8}
    remote = Job(**(vars(JOB) | {"workdir": "s3://bucket/runs/v3"}))
    text = write("rayjob", remote)
    assert "--storage_path=s3://bucket/runs" in text and "persistentVolumeClaim" not in text
    assert schema_errors("rayjob", yaml.safe_load(text)) == []


def test_the_sbatch_file():
    text = write("slurm", full("slurm"))
    directives = re.findall(r"^#SBATCH (.*)$", text, flags=re.MULTILINE)
    assert directives == [
        "--job-name=v3",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--gres=gpu:h100:8",
        "--cpus-per-task=64",
        "--mem=900G",
        "--time=0-10:00:00",
        "--partition=h100",
        "--account=a",
        "--qos=high",
        "--output=%x-%j.out",
        "--open-mode=append",
        "--requeue",
        "--signal=TERM@300",
    ]
    assert text.startswith("#!/bin/bash\n") and "--container-image=image.sqsh" in text
    assert "export NCCL_IB_HCA='mlx5_0,mlx5_1'\n" in text
    whole = write("slurm", JOB)
    assert "#SBATCH --exclusive\n" in whole and "#SBATCH --mem=0\n" in whole
    cpus = write("slurm", Job(**(vars(JOB) | {"gpus_per_node": 0})))
    assert "--gres" not in cpus and "export JAX_PLATFORMS=cpu" in cpus


@pytest.mark.parametrize("kind", ["slurm", "ssh"])
def test_scripts_are_bash(kind, tmp_path):
    """Options that a shell would take apart among them; shellcheck, where there is one, finds nothing."""
    for name, job in {
        "full": full(kind),
        "odd": Job(**(vars(JOB) | {"command": (*PROGRAM, *ODD), "name": "a b'c"})),
        "least": Job(command=("-m", "some.module"), hosts=("h",)),
    }.items():
        path = tmp_path / name
        path.write_text(write(kind, job))
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and not done.stderr, done.stderr
        if shutil.which("shellcheck"):
            done = subprocess.run(
                ["shellcheck", "--severity=warning", path],
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stdout


def test_the_command(tmp_path, capsys):
    """To stdout or a file, whole or not at all; the workdir stands before or after --."""
    after = ["slurm", "--nodes=2", "--", *PROGRAM, "--workdir=/s/v3", "--config.train.steps=1"]
    assert command.main(after) == 0
    text = capsys.readouterr().out
    assert (
        "--workdir=/s/v3" in text
        and text.count("--workdir") == 1
        and "--config.train.steps=1" in text
    )
    out = tmp_path / "run.sh"
    ssh = ["ssh", "--hosts=a,b", f"--out={out}", "--nccl=DEBUG=INFO", "--nccl=NCCL_X=1"]
    assert command.main([*ssh, "--workdir=/s/v3", "--", *PROGRAM]) == 0
    assert os.listdir(tmp_path) == ["run.sh"] and out.stat().st_mode & stat.S_IXUSR
    assert "NCCL_DEBUG=INFO" in out.read_text() and "NCCL_X=1" in out.read_text()
    assert (
        command.main(["jobset", *POD, "--job-name=v3", "--", "-m", "deepseek_jax.cli", "train"])
        == 0
    )
    pod = yaml.safe_load(capsys.readouterr().out)["spec"]["replicatedJobs"][0]["template"]["spec"][
        "template"
    ]
    words = ["python", "-u", "-m", "deepseek_jax.cli", "train", "--workdir=/runs/v3"]
    assert pod["spec"]["containers"][0]["command"] == words
    # Over a file that is there already, unless it is the one that is read.
    assert command.main([*ssh, "--workdir=/s/v4", "--", *PROGRAM]) == 0 and "v4" in out.read_text()


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["slurm", "--workdir=w"], "The program is missing"),
        (["slurm", "--", *PROGRAM], "--workdir is missing"),
        (
            ["slurm", "--workdir=a", "--", *PROGRAM, "--workdir=b"],
            "--workdir=a, and --workdir=b after --",
        ),
        (["slurm", "--time=1h", "--workdir=w", "--", *PROGRAM], "--time=1h is not a time"),
        (["slurm", "--time=5", "--workdir=w", "--", *PROGRAM], "is not above --stop_before=300"),
        (["slurm", "--nodes=0", "--workdir=w", "--", *PROGRAM], "--nodes=0 is not between 1 and"),
        (["slurm", "--nodes=two", "--", *PROGRAM], "invalid int value: 'two'"),
        (
            ["slurm", "--image=i", "--workdir=w", "--", *PROGRAM],
            "--image=i has no effect for slurm: --container",
        ),
        (
            ["jobset", "--partition=p", "--", *PROGRAM],
            "--partition=p has no effect for jobset: --queue",
        ),
        (["ssh", "--nodes=2", "--", *PROGRAM], "--nodes=2 has no effect for ssh"),
        (["ssh", "--workdir=w", "--", *PROGRAM], "--hosts is missing"),
        (["rayjob", "--topology=t", "--", *PROGRAM], "it acts in a file for jobset"),
        (["jobset", "--workdir=/r/x", "--", *PROGRAM], "--image is missing"),
        (["jobset", "--image=i", "--workdir=runs/x", "--", *PROGRAM], "does not lie in a volume"),
        (
            ["jobset", *POD, "--job_name=open_r1", "--", *PROGRAM],
            "--job_name=open_r1 is no name for Kubernetes",
        ),
        (["jobset", *POD, f"--job_name={'a' * 60}", "--", *PROGRAM], "at most 45 of"),
        (["rayjob", *POD, "--job_name=x", "--", "prog"], "prog is no Python program"),
        (
            ["slurm", "--nccl=DEBUG", "--workdir=w", "--", *PROGRAM],
            "--nccl=DEBUG is not NAME=VALUE",
        ),
        (
            ["slurm", "--env=TORCH_NCCL_X=1", "--workdir=w", "--", *PROGRAM],
            "no effect here: PyTorch's",
        ),
        (
            ["slurm", "--env=RANK=1", "--workdir=w", "--", *PROGRAM],
            "--env=RANK=1 has no effect here",
        ),
        (["slurm", "--job_name=a\n#SBATCH --x", "--workdir=w", "--", *PROGRAM], "has a line break"),
        (["slurm", "--workdir=w", "--", *PROGRAM, "a\nb"], "has a line break"),
        (
            ["slurm", "--from=/nowhere", "--workdir=w", "--", *PROGRAM],
            "--from=/nowhere: No such file",
        ),
        (
            ["slurm", "--out=/nowhere/x", "--workdir=w", "--", *PROGRAM],
            "--out=/nowhere/x cannot be written",
        ),
        (["pbs", "--", *PROGRAM], "invalid choice: 'pbs'"),
        (["slurm", "--exclusiv", "--", *PROGRAM], "unrecognized arguments: --exclusiv"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_mistakes_are_one_line(arguments, text, capsys):
    with pytest.raises(UserError) as error:
        command.main(arguments)
    said = str(error.value)
    assert text in said and "\n" not in said.replace("\\n", "") and not capsys.readouterr().out


def test_times():
    """The forms of `man sbatch`."""
    for text, seconds in {
        "90": 5400,
        "1:30": 90,
        "01:59:00": 7140,
        "1-0": 86400,
        "2-03": 183600,
        "1-02:03": 93780,
        "1-02:03:04": 93784,
    }.items():
        assert parse_time(text) == seconds and parse_time(format_time(seconds)) == seconds
    for text in ("", "1h", "-1", "1-", "1:2:3:4"):
        with pytest.raises(UserError, match="is not a time"):
            parse_time(text)


def test_what_variables_do_here():
    for name in ("NCCL_IB_HCA", "NCCL_DEBUG", "NCCL_NVLS_ENABLE", "FI_PROVIDER", "XLA_FLAGS"):
        assert meaning(name).kept, name
    for name in (
        "TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING", "PYTORCH_CUDA_ALLOC_CONF",
        "CUDA_DEVICE_MAX_CONNECTIONS", "ACCELERATE_LOG_LEVEL", "FSDP_VERSION", "NVTE_FUSED_ATTN",
        "TOKENIZERS_PARALLELISM", "MASTER_ADDR", "RANK", "JAX_COORDINATOR_IP",
    ):  # fmt: skip
        assert not meaning(name).kept, name
    assert meaning("MY_OWN") is None


def test_the_page_has_every_variable():
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    table = page.partition("## Environment variables")[2]
    for patterns, kept, _ in MEANINGS:
        row = next((r for r in table.splitlines() if r.startswith(f"| `{patterns[0]}`")), None)
        assert row, patterns[0]
        assert all(f"`{p}`" in row for p in patterns), row
        assert (re.split(r"\s*\|\s*", row)[2] == "kept") == kept, row
    assert all(f"template {kind}" in page for kind in KINDS)
