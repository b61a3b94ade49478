"""--template: the file beside the new config that starts the run on a cluster."""

import re
import subprocess

import pytest
import yaml

from deepseek_jax.cli.command import exit_code
from deepseek_jax.migrate import __main__ as command

RECIPE = """\
model_name_or_path: org/model
dataset_name: org/chats
per_device_train_batch_size: 2
num_train_epochs: 2
warmup_ratio: 0.1
output_dir: out/My_Run.1
"""
SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=old
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --partition=h100
#SBATCH --time=1-00:00:00
export NCCL_DEBUG=INFO
export WANDB_API_KEY=secret
srun torchrun --nnodes=2 --nproc_per_node=8 sft.py --config recipe.yaml
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "old.sbatch").write_text(SCRIPT)
    return tmp_path


def call(*argv):
    return exit_code("migrate", lambda: command.main(list(argv)))


def written(here):
    return {p.name for p in here.iterdir()} - {"recipe.yaml", "old.sbatch"}


def test_slurm(here, capsys):
    """Hosts and GPUs of --devices, names of the run, options of the user, flags that the model needs."""
    given = ["recipe.yaml", "--devices=16", "--out=mine.py"]
    assert call(*given, "--template=slurm --partition=h100 --time=1-0 --nccl=DEBUG=INFO") == 0
    text = (here / "mine.sbatch").read_text()
    for line in (
        "--job-name=My_Run.1",
        "--nodes=2",
        "--gres=gpu:8",
        "--partition=h100",
        "--time=1-00:00:00",
    ):
        assert f"#SBATCH {line}\n" in text, text
    for word in ("train.py", "--config=mine.py", "--workdir=out/My_Run.1", "NCCL_DEBUG=INFO",
                 "--config.model.aux_loss_alpha=0.0"):  # fmt: skip
        assert word in text, word
    assert subprocess.run(["bash", "-n", "mine.sbatch"], check=False).returncode == 0
    out = capsys.readouterr().out
    assert "Written: mine.py\n" in out
    assert "Written: mine.sbatch, to be started by: sbatch mine.sbatch" in out
    assert call(*given, "--template=slurm") == 0, "its own file is written anew"
    assert "h100" not in (here / "mine.sbatch").read_text()


def test_from_the_script_that_is_migrated(here, capsys):
    """Partition, time and variables of the old file; its command and its secrets are not taken."""
    assert call("old.sbatch", "--out=mine.py", "--template=slurm") == 0
    text = (here / "mine.sbatch").read_text()
    for line in ("--job-name=My_Run.1", "--nodes=2", "--partition=h100", "--time=1-00:00:00"):
        assert f"#SBATCH {line}\n" in text, text
    assert "NCCL_DEBUG=INFO" in text and "torchrun" not in text and "secret" not in text
    assert "a secret: export it before sbatch" in capsys.readouterr().err
    assert call("old.sbatch", "--out=mine.py", "--template=ssh --hosts=a,me@b") == 0
    assert "h100" not in (here / "mine.sh").read_text()


def test_kubernetes(here):
    pods = "--image=registry/image:1 --workdir=/runs/v3"
    given = ["recipe.yaml", "--devices=16", "--gpus_per_node=4", "--out=mine.py"]
    assert call(*given, f"--template=jobset {pods}") == 0
    document = yaml.safe_load((here / "mine.jobset.yaml").read_text())
    (workers,) = document["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert document["metadata"]["name"] == "my-run-1" and job["parallelism"] == 4
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert {"--config=mine.py", "--workdir=/runs/v3"} <= set(container["command"])
    assert call(*given, f"--template=rayjob {pods} --job_name=mine --out=ray.yaml") == 0
    spec = yaml.safe_load((here / "ray.yaml").read_text())["spec"]
    assert {"--num_workers=4", "--gpus_per_worker=4", "--name=v3"} <= set(
        spec["entrypoint"].split()
    )


def test_ssh(here):
    given = ["recipe.yaml", "--devices=16", "--out=mine.py"]
    assert call(*given, "--template=ssh --hosts=node0,node1") == 0
    text = (here / "mine.sh").read_text()
    assert re.search(r"hosts=\(\s+node0\s+node1\s+\)", text) and "--config=mine.py" in text
    assert (here / "mine.sh").stat().st_mode & 0o100


@pytest.mark.parametrize(
    "template, named",
    [
        ("pbs", "no kind of file. Choose of slurm"),
        ("", "no kind of file"),
        ("slurm 'x", "No closing quotation"),
        ("slurm -- other.py", "behind -- is that of the migration"),
        ("jobset", "--image is missing"),
        ("slurm --image=i", "--image=i has no effect for slurm"),
        ("ssh --hosts=a,b,c", "starts 3 hosts with 8 GPUs each, and the migrated run has 16"),
        ("slurm --nodes=4", "starts 4 hosts with 8 GPUs each, and the migrated run has 16"),
        ("slurm --out=recipe.yaml", "would overwrite recipe.yaml"),
        ("slurm --out=no/where", "in a folder that does not exist"),
        ("slurm --time=soon", "is not a time"),
    ],
)
def test_a_mistake_writes_nothing(here, capsys, template, named):
    assert call("recipe.yaml", "--devices=16", "--out=mine.py", f"--template={template}") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and named in err, err
    assert not written(here)


def test_somebody_elses_file_stays(here, capsys):
    (here / "mine.sbatch").write_text("#!/bin/bash\nmine\n")
    given = ["recipe.yaml", "--devices=8", "--out=mine.py"]
    assert call(*given, "--template=slurm") == 2
    assert "mine.sbatch" in capsys.readouterr().err and written(here) == {"mine.sbatch"}
    assert call(*given, "--template=slurm --out=mine.sbatch") == 0, "it is named"
    for more in (["--devices=9", "--gpus_per_node=2", "--out=mine.py"], ["--devices=8"]):
        assert call("recipe.yaml", *more, "--template=slurm") == 2
    assert call("recipe.yaml", "--devices=8", "--out=mine.yaml") == 2
    assert "Name it mine.py" in capsys.readouterr().err
