"""Every command line and config of five guides that our users follow: they migrate, validate and say why.

The guides: FSDP training of DeepSeek models; NeMo migration; FSDP for distillation (conf/distillation,
Trainer); FSDP beside DeepSpeed (open-r1, accelerate launch); large models with DeepSpeed and FSDP (Ray).
Their figures and words are quoted as they stand there.
"""

import json

import pytest

from deepseek_jax.errors import UserError
from tests.support.migration import loaded, migrate

# ---- FSDP for distillation: transformers' Trainer
DISTILLATION = """\
training:
  # FSDP settings
  fsdp: "full_shard"
  fsdp_config:
    fsdp_transformer_layer_cls_to_wrap: ["Qwen3MoeDecoderLayer"]
    fsdp_backward_prefetch: "backward_pre"
    fsdp_forward_prefetch: false
    fsdp_auto_wrap_policy: "TRANSFORMER_BASED_WRAP"
    fsdp_state_dict_type: "FULL_STATE_DICT"
    fsdp_offload_params: false  # We have enough GPU memory

  # Memory optimization
  gradient_checkpointing: true
  bf16: true

  # Batch settings
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 8

  # Other settings
  learning_rate: 5e-5
  num_train_epochs: 3
  save_steps: 500
  logging_steps: 10
"""
ONE_NODE = "torchrun --nproc_per_node=8 scripts/run_distillation.py"
NODE_0 = """\
#!/bin/bash
export NCCL_DEBUG=INFO
export NCCL_IB_DISABLE=0

torchrun \\
    --nproc_per_node=8 \\
    --nnodes=2 \\
    --node_rank=0 \\
    --master_addr=192.168.1.100 \\
    --master_port=29500 \\
    scripts/run_distillation.py
"""


def test_the_complete_fsdp_example(tmp_path):
    """8 A100: 2 x 8 x 8 sequences per step, 5e-5 falling linearly to 0, AdamW as the Trainer has it."""
    done = migrate(DISTILLATION, command=ONE_NODE)
    c = loaded(str(tmp_path / "distillation.py"), done)
    assert c == done.config
    assert (c.objective, c.train.batch_size, c.train.accumulation) == ("distill", 128, 8)
    assert (c.train.epochs, c.train.steps, c.train.dtype, c.train.remat) == (
        3.0,
        0,
        "bfloat16",
        "full",
    )
    o = c.optimizer
    assert (o.learning_rate, o.schedule, o.final_fraction, o.warmup_steps) == (
        5e-5,
        "linear",
        0.0,
        0,
    )
    assert (o.b1, o.b2, o.eps, o.weight_decay, o.grad_clip) == (0.9, 0.999, 1e-8, 0.0, 1.0)
    s = c.sharding
    assert (s.strategy, s.backward_prefetch, s.forward_prefetch) == ("full_shard", "pre", False)
    assert (c.checkpoint.every_steps, c.checkpoint.keep, c.log.every_steps) == (500, 0, 10)
    assert c.data.eval_fraction == 0 and c.moe.bias_update_rate == 0 and c.seed == 42
    # the Trainer of transformers 4 reads neither of the two
    assert "does not read it" in done.why("training.fsdp_config.fsdp_state_dict_type")
    assert "full_shard offload" in done.why("training.fsdp_config.fsdp_offload_params")
    assert "one layer" in done.why("training.fsdp_config.fsdp_transformer_layer_cls_to_wrap")
    assert any("transformers 4, by its keys" in note for note in done.m.notes)
    assert "--config.model.aux_loss_alpha=0.0" in done.launch


def test_two_nodes():
    done = migrate(DISTILLATION, command=NODE_0)
    assert done.config.train.batch_size == 2 * 8 * 16 and done.config.mesh.data == 1
    assert "on each of 2 hosts, one process for its 8 GPUs" in done.launch
    assert "means the same" in done.why("env.NCCL_DEBUG")
    assert "--coordinator_address" in done.why("master_addr")
    # the form with a place to fill in
    line = NODE_0.replace("192.168.1.100", "<NODE0_IP>").replace("export NCCL_DEBUG=INFO\n", "")
    assert migrate(DISTILLATION, command=line).config == done.config


@pytest.mark.parametrize(
    "word, strategy, data",
    [
        ("full_shard", "full_shard", 1),
        ("shard_grad_op", "shard_grad_op", 1),
        ("hybrid_shard", "hybrid_shard", 2),
        ("no_shard", "no_shard", 1),
    ],
)
def test_strategies(word, strategy, data):
    """hybrid_shard: within a node, replicas across nodes."""
    done = migrate(f'training:\n  fsdp: "{word}"\n', command=NODE_0)
    c = done.config
    assert (c.sharding.strategy, c.mesh.data) == (strategy, data)
    assert c.mesh.fsdp == (8 if data == 2 else -1)
    flag = migrate(
        command=f'torchrun --nproc_per_node=8 scripts/run_distillation.py distillation.training.fsdp="{word}"'
    )
    assert flag.config.sharding.strategy == strategy


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_loop_over_batch_sizes(size):
    override = f"distillation.training.per_device_train_batch_size={size}"
    done = migrate(DISTILLATION, command=f"{ONE_NODE} {override}")
    assert done.config.train.batch_size == size * 8 * 8
    if size != 2:
        assert override.partition("=")[0] in done.why("training.per_device_train_batch_size")


@pytest.mark.parametrize(
    "block, became, why",
    [
        (
            'fsdp_auto_wrap_policy: "SIZE_BASED_WRAP"\n    fsdp_min_num_params: 1e8',
            {},
            "min_weight_size",
        ),
        ('fsdp_backward_prefetch: "backward_post"', {"sharding.backward_prefetch": "post"}, ""),
        ("fsdp_backward_prefetch: null", {"sharding.backward_prefetch": "none"}, ""),
        ("fsdp_forward_prefetch: true", {"sharding.forward_prefetch": True}, ""),
        ("fsdp_sync_module_states: true", {}, "its own shards"),
        ("fsdp_offload_params: true", {}, "full_shard offload"),
        ('fsdp_state_dict_type: "SHARDED_STATE_DICT"', {}, "does not read it"),
        ('fsdp_state_dict_type: "LOCAL_STATE_DICT"', {}, "does not read it"),
    ],
)
def test_blocks_of_fsdp_config(block, became, why):
    done = migrate(f'training:\n  fsdp: "full_shard"\n  fsdp_config:\n    {block}\n', devices=8)
    for option, value in became.items():
        assert done.option(option) == value
    last = block.split("\n")[-1].split(":")[0].strip()
    if why:
        assert why in done.why(f"training.fsdp_config.{last}")
    assert done.config


def test_its_block_with_a_key_twice():
    """Both options of the wrapping policy stand in one block there."""
    block = (
        'training:\n  fsdp: full_shard\n  fsdp_config:\n    fsdp_auto_wrap_policy: "TRANSFORMER_BASED_WRAP"\n'
        '    fsdp_auto_wrap_policy: "SIZE_BASED_WRAP"\n    fsdp_min_num_params: 1e8\n'
    )
    done = migrate(block, devices=8)
    assert [why for e, why in done.lists.no_effect if "stands again at 0.yaml:5" in why]


def test_its_other_settings():
    text = (
        "training:\n  gradient_checkpointing: true\n  fsdp: full_shard\n  bf16: true\n  fp16: false\n"
        "  per_device_train_batch_size: 1\n  gradient_accumulation_steps: 64\n  save_total_limit: 2\n"
        "  dataloader_pin_memory: true\n  dataloader_num_workers: 4\n"
    )
    c = migrate(text, devices=8).config
    assert (c.train.batch_size, c.train.accumulation, c.checkpoint.keep) == (512, 64, 2)


# ---- FSDP beside DeepSpeed: open-r1 and Accelerate
FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP

fsdp_config:
  fsdp_sharding_strategy: FULL_SHARD  # ZeRO-3 equivalent
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_forward_prefetch: true
  fsdp_backward_prefetch: BACKWARD_PRE
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_sync_module_states: true
  fsdp_use_orig_params: true
  fsdp_activation_checkpointing: false

num_processes: 8  # 8 GPUs
mixed_precision: bf16
"""
RECIPE = """\
model_name_or_path: open-r1/Qwen2.5-Math-7B-RoPE-300k
torch_dtype: bfloat16
dataset_name: open-r1/Mixture-of-Thoughts
dataset_config: all
eos_token: <|im_end|>
bf16: true
eval_strategy: 'no'
gradient_accumulation_steps: 8
gradient_checkpointing: true
learning_rate: 4.0e-05
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
packing: false
max_grad_norm: 0.2
max_length: 32768
max_steps: -1
num_train_epochs: 5
per_device_train_batch_size: 2
save_strategy: epoch
save_total_limit: 1
seed: 42
warmup_ratio: 0.03
"""
ZERO3 = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  zero_stage: 3
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: true
  zero3_save_16bit_model: true
num_processes: 8
mixed_precision: bf16
"""
SFT = (
    "accelerate launch --config_file fsdp_config.yaml src/open_r1/sft.py "
    "--config recipes/config_distill.yaml"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the files lie that the commands name."""
    for name, text in {
        "fsdp.yaml": FSDP,
        "fsdp_config.yaml": FSDP.replace("  fsdp_use_orig_params: true\n", ""),
        "fsdp_full_shard.yaml": FSDP,
        "fsdp_shard_grad_op.yaml": FSDP.replace("FULL_SHARD", "SHARD_GRAD_OP"),
        "zero3.yaml": ZERO3,
        "recipes/config_distill.yaml": RECIPE,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_basic_fsdp_training(folder):
    """The recipe and Accelerate's file are read where the command names them."""
    done = migrate(command=f"{SFT} --output_dir ./sft_fsdp")
    c = loaded(str(folder / "mine.py"), done)
    assert (c.objective, c.train.batch_size, c.train.accumulation, c.train.epochs) == (
        "sft",
        128,
        8,
        5.0,
    )
    assert (c.train.sequence_length, c.sft.packing, c.sft.eos_token) == (
        32768,
        "none",
        "<|im_end|>",
    )
    assert c.sft.assistant_only_loss == "false"  # TRL trains all tokens of a chat
    o = c.optimizer
    assert (o.schedule, o.final_fraction, o.warmup_fraction) == ("cosine", 0.1, 0.03)
    assert (o.grad_clip, o.learning_rate) == (0.2, 4e-5)
    assert (c.sharding.strategy, c.sharding.forward_prefetch, c.checkpoint.kind) == (
        "full_shard",
        True,
        "full",
    )
    assert (c.checkpoint.every_steps, c.checkpoint.every_epochs, c.checkpoint.keep) == (0, 1.0, 1)
    assert "--workdir=./sft_fsdp" in done.launch and "hf download open-r1/Qwen2.5" in done.launch


@pytest.mark.parametrize(
    "file, strategy", [("fsdp_full_shard", "full_shard"), ("fsdp_shard_grad_op", "shard_grad_op")]
)
def test_different_sharding_strategies(folder, file, strategy):
    """`--max_steps 100` alone, without a recipe: TRL's words are not there, and Trainer's defaults count."""
    done = migrate(
        command=f"accelerate launch --config_file {file}.yaml src/open_r1/sft.py --max_steps 100"
    )
    assert (done.config.sharding.strategy, done.config.train.steps) == (strategy, 100)


def test_fsdp_and_zero3(folder):
    """The guide's exercise: the same steps by FSDP and by ZeRO-3 are the same run here."""
    line = "accelerate launch --config_file {}.yaml src/open_r1/sft.py --max_steps 100 --output_dir ./sft_{}"
    fsdp = migrate(command=line.format("fsdp", "fsdp")).config
    zero3 = migrate(command=line.format("zero3", "zero3")).config
    for section in ("train", "optimizer", "mesh", "sft", "data", "model"):
        assert getattr(fsdp, section) == getattr(zero3, section), section
    assert fsdp.sharding.strategy == zero3.sharding.strategy == "full_shard"


def test_prefetching_off(folder):
    (folder / "fsdp_no_prefetch.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nfsdp_config:\n"
        "  fsdp_sharding_strategy: FULL_SHARD\n  fsdp_forward_prefetch: false  # Disabled\n"
        "  fsdp_backward_prefetch: NO_PREFETCH  # Disabled\nnum_processes: 8\nmixed_precision: bf16\n"
    )
    done = migrate(
        command="accelerate launch --config_file fsdp_no_prefetch.yaml src/open_r1/sft.py --max_steps 100"
    )
    s = done.config.sharding
    assert (s.forward_prefetch, s.backward_prefetch) == (False, "none")


def test_mixing_fsdp_and_deepspeed_is_refused(folder):
    """The guide's wrong example: --config_file fsdp.yaml with --deepspeed zero3.yaml."""
    line = "accelerate launch --config_file fsdp.yaml src/open_r1/sft.py --deepspeed zero3.yaml --max_steps 9"
    done = migrate(command=line)
    assert done.refused()


def test_size_based_wrapping_in_accelerates_file():
    text = FSDP.replace("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP\n  min_num_params: 1e9")
    assert "one layer" in migrate(text).why("fsdp_config.min_num_params")


# ---- Ray: DeepSpeed's dict and FSDP by prepare_model
RAY = {
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "weight_decay": 0.01}},
    "fp16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none"},
        "offload_param": {"device": "none"},
    },
    "gradient_accumulation_steps": 4,
    "train_micro_batch_size_per_gpu": 2,
}


def test_the_dict_of_deepspeed_initialize():
    """8 workers, 2 x 4 x 8 sequences per step; no scheduler: a constant rate; AdamW as DeepSpeed has it."""
    done = migrate(json.dumps(RAY), devices=8)
    c = done.config
    assert (c.train.batch_size, c.train.accumulation, c.train.dtype) == (64, 4, "float16")
    assert (c.sharding.strategy, c.offload.optimizer_state, c.offload.parameters) == (
        "full_shard",
        False,
        False,
    )
    o = c.optimizer
    assert (o.name, o.learning_rate, o.weight_decay, o.b2) == ("adamw", 2e-5, 0.01, 0.999)
    assert (o.schedule, o.warmup_steps, o.grad_clip) == ("constant", 0, 1.0)
    with pytest.raises(UserError, match="--devices"):
        migrate(json.dumps(RAY))


def test_cpu_offloading():
    text = """{
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": true},
            "offload_param": {"device": "cpu", "pin_memory": true}
        }
    }"""
    c = migrate(text, devices=8).config
    assert c.offload.optimizer_state and c.offload.parameters and c.train.remat == "full"
    nvme = migrate(text.replace('"cpu", "pin', '"nvme", "pin'), devices=8)
    assert "host's memory" in nvme.why("zero_optimization.offload_param.device")
    allowed = migrate(
        text.replace('"cpu", "pin', '"nvme", "pin'),
        devices=8,
        allow=["zero_optimization.offload_*.device"],
    )
    assert allowed.config and len(allowed.lists.left_out) == 2


# ---- NeMo
NEMO = """\
model:
  vocab_size: 50257
  emb_dim: 1024
  n_layers: 24
  num_experts: 16
  top_k: 2
  expert_dim: 4096
  expert_model_parallel_size: 4  # Distribute experts across 4 GPUs
  tensor_model_parallel_size: 1
  pipeline_model_parallel_size: 1
trainer:
  devices: 4
  precision: bf16
  strategy: ddp
  max_steps: 10000
"""


def test_its_distributed_configuration():
    """16 experts over 4 GPUs. What the guide does not give is as in its file: batch 32 by 2, 1e-4 to 1e-5."""
    done = migrate(
        NEMO, command="python scripts/train_deepseek.py --config deepseek_v3_distributed"
    )
    c = done.config
    m = c.model
    assert (m.vocab_size, m.hidden_size, m.num_hidden_layers) == (50257, 1024, 24)
    assert (m.n_routed_experts, m.num_experts_per_tok, m.moe_intermediate_size) == (16, 2, 4096)
    assert (c.mesh.expert, c.mesh.tensor, c.mesh.stage) == (4, 1, 1)
    assert (c.sharding.strategy, c.train.dtype, c.train.steps) == ("no_shard", "bfloat16", 10_000)
    assert (c.train.batch_size, c.train.accumulation) == (32, 4)
    assert "is read for it" in done.why("config")


def test_its_multi_node_training():
    """32 GPUs by file or by torchrun, which wins over the file's devices."""
    file = NEMO.replace("devices: 4", "devices: 8\n  num_nodes: 4")
    line = "torchrun --nproc_per_node=8 --nnodes=4 scripts/train_deepseek.py"
    both = migrate(file, command=line)
    flags = migrate(NEMO, command=line)
    assert both.config == flags.config and both.config.train.batch_size % 32 == 0
    assert "on each of 4 hosts" in both.launch
    assert "wins" in flags.why("trainer.devices")


def test_a_config_that_is_not_given():
    line = "python scripts/train_deepseek.py --config deepseek_v3_base"
    with pytest.raises(UserError, match="--from="):
        migrate(command=line, devices=1)
    assert migrate(command=line, tools="nemo_guide", devices=1).refused() == {"config"}
