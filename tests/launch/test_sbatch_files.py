"""sbatch files for other trainers, read: public ones, and forms that sbatch takes."""

import re

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.launch.template import command, from_script, write
from deepseek_jax.launch.template.directives import read
from tests.support import ROOT

FILES = ROOT / "tests" / "files" / "sbatch"
PROGRAM = ("train.py", "--config=configs/v3.py")
# name, nodes, GPUs, CPUs and seconds of each file, read by a person
PUBLIC = {
    "accelerate--submit_multinode_fsdp.sh": ("multinode", 4, 4, 160, 7140),
    "automodel--slurm.sub": ("automodel-job", 8, 8, None, 3600),
    "open-r1--train.slurm": ("open_r1", 1, 8, None, 259200),
    "torchtitan--multinode_trainer.slurm": ("torchtitan_multi_node", 4, 8, 96, None),
}


def script(body: str, *directives: str):
    return from_script(
        "\n".join(["#!/bin/bash", *(f"#SBATCH {d}" for d in directives), body]), PROGRAM
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_public_files(name):
    """What is taken, and that nothing of #SBATCH lines and exports goes unmentioned."""
    text = (FILES / name).read_text(encoding="utf-8")
    found = from_script(text, PROGRAM)
    job = found.job
    read_as = (job.name, job.nodes, job.gpus_per_node, job.cpus_per_node, job.seconds)
    assert read_as == PUBLIC[name]
    lines = [line.number for line in (*found.became, *found.no_effect, *found.left_out)]
    body = read(text)[1]
    for number, line in enumerate(text.splitlines(), 1):
        of_sbatch = line.startswith("#SBATCH ") and number < body
        if of_sbatch or (number >= body and re.match(r"\s*export ", line)):
            assert number in lines, line
    written = write("slurm", job)
    assert from_script(written).job.nodes == job.nodes  # it reads its own
    assert "torchrun" not in written and "MASTER_ADDR=" not in written


def test_what_of_a_public_file_has_no_effect():
    found = from_script((FILES / "open-r1--train.slurm").read_text(encoding="utf-8"))
    names = {line.what.partition("=")[0] for line in found.no_effect}
    assert {
        "NCCL_ASYNC_ERROR_HANDLING",
        "ACCELERATE_LOG_LEVEL",
        "MASTER_ADDR",
        "WORLD_SIZE",
    } <= names
    assert found.missing == ["--nodes (1 is taken)"] and found.job.variables == {}
    found = from_script((FILES / "torchtitan--multinode_trainer.slurm").read_text(encoding="utf-8"))
    assert found.job.variables == {
        "FI_PROVIDER": "efa",
        "NCCL_DEBUG": "WARN",
        "PYTHONFAULTHANDLER": "1",
        "NCCL_SOCKET_IFNAME": "eth0,en,eth,em,bond",
        "NCCL_BUFFSIZE": "2097152",
        "FI_EFA_SET_CUDA_SYNC_MEMOPS": "0",
    }
    # Values that only the nodes know stay lines of the script.
    assert found.job.setup == (
        "export LD_LIBRARY_PATH=/opt/amazon/efa/lib:$LD_LIBRARY_PATH",
        "export LD_LIBRARY_PATH=/usr/local/lib/:$LD_LIBRARY_PATH",
    )
    assert {"LOGLEVEL", "CUDA_LAUNCH_BLOCKING"} == {
        n.what.partition("=")[0] for n in found.no_effect
    }


@pytest.mark.parametrize(
    "directives, fields",
    [
        (["-N4", "--gres=gpu:h100:8"], (4, 8, "h100")),
        (["-N 2-4", "--gres gpu:2,shard:8"], (2, 2, "")),
        (["--nodes=2", "-G 16"], (2, 8, "")),
        (["--nodes=2", "--gpus=a100:8"], (2, 4, "a100")),
        (["--nodes=2", "--ntasks-per-node=4", "--gpus-per-task=2"], (2, 8, "")),
        (["-n 8", "--ntasks-per-node=4", "--gpus-per-node=volta:4"], (2, 4, "volta")),
        (["-N1", "--gres=gpu"], (1, 1, "")),
        (["--nodes=1", "--nodes=3", "--gpus-per-node=1"], (3, 1, "")),  # the last counts
        (["--nodes=2 --gpus-per-node=4 # of eight", "#SBATCH", "#--nodes=9"], (2, 4, "")),
    ],
    ids=str,
)
def test_nodes_and_gpus(directives, fields):
    job = script("srun python train.py", *directives).job
    assert (job.nodes, job.gpus_per_node, job.gpu_type) == fields


def test_as_sbatch_reads():
    """Abbreviated names, quotations, comments; nothing after the first command."""
    text = "\n".join(
        [
            "#!/bin/bash",
            "#SBATCH -J 'a b' --err=e-%j",
            "##SBATCH --nodes=7",
            "#SBATCH --pod=3 --exclusive -q high",
            "",
            "cd here",
            "#SBATCH --nodes=9",
        ]
    )
    found, body = read(text)
    assert [str(d) for d in found] == [
        "--job-name='a b'", "--error=e-%j", "--pod=3", "--exclusive", "--qos=high",
    ]  # fmt: skip
    assert body == 6 and from_script(text).job.nodes == 1
    assert "#SBATCH --job-name='a b'" in write("slurm", from_script(text, PROGRAM).job)
    for wrong, said in (
        ("--job-name='a", "No closing quotation"),
        ("hetjob", "the nodes of this job differ"),
    ):
        with pytest.raises(UserError, match=said):
            script("", wrong)
    placeholder = script("", "--nodes=$NODES", "--gpus-per-node=4")
    assert placeholder.missing == ["--nodes (1 is taken)"] and placeholder.job.gpus_per_node == 4
    assert [line.text for line in placeholder.left_out] == ["sbatch does not expand variables"]
    with pytest.raises(UserError, match="line 2, --nodes=many: not a number"):
        script("", "--nodes=many")
    with pytest.raises(UserError, match="line 2, --time=soon: not a time"):
        script("", "--time=soon")


def test_variables_of_a_script():
    body = "\n".join(
        [
            "GPUS=4",
            "IF=ib0",
            "export NCCL_SOCKET_IFNAME=$IF NCCL_DEBUG='INFO'  # said twice",
            ': "${NCCL_IB_HCA:=mlx5}"',
            "export NCCL_IB_GID_INDEX=${NCCL_IB_GID_INDEX:-3}",
            "export NCCL_TOPO_FILE=$(find / -name topo.xml)",
            "export WANDB_API_KEY=abcdef",
            "export MINE=1 OTHER=2 PYTHONPATH=/theirs",
            "WANDB_PROJECT=this_script_alone",
            "HF_HOME=/cache",
            "export HF_HOME",
            "# export NCCL_P2P_DISABLE=1",
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True srun torchrun --nproc_per_node=$GPUS train.py",
        ]
    )
    found = script(body, "--nodes=2", "--signal=USR1@60", "--array=0-3")
    assert found.job.gpus_per_node == 4 and found.job.nodes == 2
    assert found.job.variables == {
        "NCCL_SOCKET_IFNAME": "ib0",
        "NCCL_DEBUG": "INFO",
        "NCCL_IB_HCA": "mlx5",
        "NCCL_IB_GID_INDEX": "3",
        "HF_HOME": "/cache",
    }
    assert found.job.setup == ("export NCCL_TOPO_FILE=$(find / -name topo.xml)",)
    left = {line.what for line in found.left_out}
    assert {
        "WANDB_API_KEY=...",
        "PYTHONPATH=/theirs",
        "MINE=1",
        "OTHER=2",
        "torchrun",
        "--array=0-3",
    } <= left
    assert "abcdef" not in found.report() and "abcdef" not in write("slurm", found.job)
    assert [line.what for line in found.no_effect] == [
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    ]


def test_the_command_reads_one(tmp_path, capsys):
    """Flags come first; what is SLURM's alone is said and left out elsewhere."""
    old = FILES / "torchtitan--multinode_trainer.slurm"
    arguments = [f"--from={old}", "--workdir=/runs/x", "--", *PROGRAM]
    assert command.main(["slurm", "--nodes=16", *arguments]) == 0
    out, said = capsys.readouterr()
    assert "--nodes=16" in out and "--partition=train" in out and "no effect here:" in said
    assert command.main(["jobset", "--image=i", "--job_name=x", *arguments]) == 0
    out, said = capsys.readouterr()
    assert "completions: 4" in out and "nvidia.com/gpu: 8" in out and "FI_PROVIDER" in out
    assert "--partition=train: SLURM's alone" in said
    with pytest.raises(UserError, match="is the file of --from"):
        copy = tmp_path / "old"
        copy.write_bytes(old.read_bytes())
        command.main(["slurm", f"--from={copy}", f"--out={copy}", "--workdir=w", "--", *PROGRAM])
