"""Shell scripts as people have them: the command in them, and what SLURM is told."""

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.migrate import script
from tests.support.migration import of_files

RECIPE = "model_name_or_path: org/m\ndataset_name: org/d\nper_device_train_batch_size: 2\nmax_length: 128\n"
# In the form of open-r1's slurm/train.slurm.
SLURM = """\
#!/bin/bash
#SBATCH --job-name=open_r1
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --gres=gpu:8
set -x -e
CONFIG_FILE=recipe.yaml
NNODES=$SLURM_NNODES
WORLD_SIZE=$(($NNODES*8))
MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)
export NCCL_DEBUG=INFO
export LAUNCHER="accelerate launch --num_machines $NNODES --num_processes 16 \\
  --main_process_ip $MASTER_ADDR --machine_rank $SLURM_PROCID --max_restarts 1 --tee 3"
export CMD="src/open_r1/sft.py --config $CONFIG_FILE"
srun --wait=60 --nodes=2 bash -c "$LAUNCHER $CMD" 2>&1
"""
# In the form of Megatron-LM's examples.
ARRAYS = """\
NUM_NODES=${NNODES:-2}
DISTRIBUTED_ARGS=(
    --nproc_per_node 8
    --nnodes $NUM_NODES
)
MODEL_ARGS=(
    --num-layers 12  # of them
    # --not-this
    --hidden-size 512
)
echo torchrun starts
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py "${MODEL_ARGS[@]}" \\
    --save $1
"""


def test_a_script_of_slurm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "train.slurm").write_text(SLURM)
    done = of_files(["train.slurm"])
    assert done.option("train.batch_size") == 2 * 16
    assert "on each of 2 hosts, one process for its 8 GPUs" in done.launch
    assert "the scheduler reads it" in done.why("sbatch.job_name")
    assert done.became("sbatch.nodes") and "means the same" in done.why("env.NCCL_DEBUG")


def test_variables_and_arrays():
    found = script.read(ARRAYS, "train.sh").command
    assert " ".join(found.split()) == (
        "torchrun --nproc_per_node 8 --nnodes 2 pretrain_gpt.py --num-layers 12 --hidden-size 512 --save $1"
    )
    assert script.expanded("${A:-x} $B ${C}", {"B": "y"}) == "x y ${C}"


def test_nothing_is_run(tmp_path):
    marker = tmp_path / "marker"
    text = f"X=$(touch {marker})\nY=`touch {marker}`\npython train.py --a $X --b $Y\n"
    assert "--a $X --b $Y" in script.read(text, "x.sh").command and not marker.exists()
    with pytest.raises(UserError, match="no line starts training"):
        script.read("#!/bin/bash\npip install x\n# torchrun a.py\n", "x.sh")
