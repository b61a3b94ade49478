"""Accelerate's file, DeepSpeed's and launchers: alone, and beside a recipe."""

import json

import pytest

from deepseek_jax.errors import UserError
from tests.support.migration import migrate, of_files

RECIPE = "output_dir: out\nmax_steps: 10\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 4\n"
ACCELERATE = "compute_environment: LOCAL_MACHINE\nnum_processes: 16\nnum_machines: 2\n"


@pytest.mark.parametrize(
    "keys, wanted",
    [
        ("distributed_type: MULTI_GPU", {"sharding.strategy": "no_shard"}),
        ("distributed_type: FSDP", {"sharding.strategy": "full_shard"}),
        (
            "distributed_type: FSDP\nfsdp_config: {fsdp_sharding_strategy: 2}",
            {"sharding.strategy": "shard_grad_op"},
        ),
        (
            "distributed_type: FSDP\nfsdp_config: {fsdp_sharding_strategy: HYBRID_SHARD}",
            {"sharding.strategy": "hybrid_shard", "mesh.data": 2, "mesh.fsdp": 8},
        ),
        (
            "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: false}",
            {"sharding.strategy": "shard_grad_op"},
        ),
        (
            "distributed_type: FSDP\nfsdp_config:\n  fsdp_offload_params: 'true'\n"
            "  fsdp_activation_checkpointing: true",
            {"offload.parameters": True, "offload.optimizer_state": True, "train.remat": "full"},
        ),
        ("distributed_type: DEEPSPEED", {"sharding.strategy": "shard_grad_op"}),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu}",
            {"sharding.strategy": "full_shard", "offload.optimizer_state": True},
        ),
        (
            "distributed_type: FSDP\nfsdp_config: {}\nparallelism_config:\n"
            "  parallelism_config_dp_replicate_size: 2\n  parallelism_config_dp_shard_size: 4\n"
            "  parallelism_config_tp_size: 2",
            {"sharding.strategy": "hybrid_shard", "mesh.data": 2, "mesh.fsdp": 4, "mesh.tensor": 2},
        ),
        ("distributed_type: FSDP\nmixed_precision: fp16", {"train.dtype": "float16"}),
    ],
)
def test_accelerate(keys, wanted):
    done = migrate(RECIPE, f"{ACCELERATE}{keys}\n", tools="hf5")
    assert done.config, done.lists.refused
    for option, value in wanted.items():
        assert done.option(option) == value, option
    d = 16 // done.config.mesh.tensor
    assert done.option("train.batch_size") == 2 * 4 * d


@pytest.mark.parametrize(
    "keys, refused",
    [
        ("distributed_type: XLA", "distributed_type"),
        ("mixed_precision: fp8", "mixed_precision"),
        ("use_cpu: true", "use_cpu"),
        (
            "parallelism_config: {parallelism_config_cp_size: 2}",
            "parallelism_config.parallelism_config_cp_size",
        ),
        ("fsdp_config: {fsdp_ignored_modules: head}", "fsdp_config.fsdp_ignored_modules"),
        ("fsdp_config: {fsdp_nonsense: 1}", "fsdp_config.fsdp_nonsense"),
        (
            "deepspeed_config: {offload_param_device: nvme, zero_stage: 3}",
            "deepspeed_config.offload_param_device",
        ),
        (
            "deepspeed_config: {deepspeed_config_file: ds.json}",
            "deepspeed_config.deepspeed_config_file",
        ),
    ],
)
def test_what_accelerate_has_and_we_have_not(keys, refused):
    kind = "" if "distributed_type" in keys else "distributed_type: FSDP\n"
    done = migrate(RECIPE, f"{ACCELERATE}{kind}{keys}\n", tools="hf5")
    assert refused in done.refused()


def test_flags_of_accelerate_launch():
    line = (
        "accelerate launch --use_fsdp --num_processes 8 --mixed_precision bf16 "
        "--fsdp_sharding_strategy FULL_SHARD --fsdp_forward_prefetch true --fsdp_offload_params false "
        "train.py --max_steps 10 --learning_rate 1e-4"
    )
    c = migrate(command=line).config
    assert (c.sharding.strategy, c.train.dtype, c.train.batch_size) == (
        "full_shard",
        "bfloat16",
        64,
    )
    file = f"{ACCELERATE}distributed_type: FSDP\nmixed_precision: fp16\n"
    done = migrate(file, command=line)
    assert done.config.train.dtype == "bfloat16" and "wins" in done.why("mixed_precision")


def test_accelerate_alone_says_what_it_does_not_say():
    done = migrate(f"{ACCELERATE}distributed_type: FSDP\n")
    assert done.config and any("give the recipe" in note for note in done.m.notes)


# ---- DeepSpeed
BATCH = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
}


@pytest.mark.parametrize("left_out", [*BATCH, None])
def test_any_two_of_the_three_batch_sizes(left_out):
    """deepspeed/runtime/config.py: the third follows; here on 8 GPUs."""
    given = {k: v for k, v in BATCH.items() if k != left_out} | {"zero_optimization": {"stage": 1}}
    c = migrate(json.dumps(given), devices=8).config
    assert (c.train.batch_size, c.train.accumulation) == (64, 4)
    assert c.sharding.strategy == "zero1"


def test_all_three_say_how_many_gpus():
    assert migrate(json.dumps(BATCH)).config.train.batch_size == 64
    with pytest.raises(UserError, match="which is 80"):
        migrate(json.dumps(BATCH), devices=10)


def test_auto_is_what_the_recipe_says():
    file = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"},
        },
        "zero_optimization": {"stage": 2, "stage3_param_persistence_threshold": "auto"},
    }
    recipe = RECIPE + "bf16: true\nlearning_rate: 3e-4\nadam_beta2: 0.95\nmax_grad_norm: 0.3\n"
    done = migrate(recipe, json.dumps(file), tools="hf5", devices=8)
    c = done.config
    assert (c.train.batch_size, c.train.accumulation, c.train.dtype) == (64, 4, "bfloat16")
    assert (c.optimizer.learning_rate, c.optimizer.b2, c.optimizer.grad_clip) == (3e-4, 0.95, 0.3)
    assert done.became("optimizer.params.betas") == {"optimizer.b1", "optimizer.b2"}
    alone = migrate(json.dumps(file), devices=8)
    assert {"gradient_clipping", "optimizer.params.lr", "bf16.enabled"} <= alone.refused()


def test_values_that_differ_are_refused():
    """As transformers: "Please correct the following DeepSpeed config values that mismatch"."""
    file = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0}
    done = migrate(RECIPE, json.dumps(file), tools="hf5", devices=8)
    assert done.refused() == {"train_micro_batch_size_per_gpu"}
    # "8" is 8
    same = {"train_micro_batch_size_per_gpu": "2", "gradient_clipping": 1.0}
    assert migrate(RECIPE, json.dumps(same), tools="hf5", devices=8).config


def test_a_file_without_clipping():
    """max_grad_norm is not read then."""
    done = migrate(
        RECIPE + "max_grad_norm: 0.2\n",
        '{"zero_optimization": {"stage": 2}}',
        tools="hf5",
        devices=8,
    )
    assert done.config.optimizer.grad_clip == 1.0 and "wins" in done.why("max_grad_norm")
    assert any("max_grad_norm" in note for note in done.m.notes)


def zero(**options):
    return {"zero_optimization": {"stage": 3} | options}


@pytest.mark.parametrize(
    "block, wanted",
    [
        ({"fp16": {"enabled": True, "hysteresis": 3}}, {"fp16.hysteresis": 3}),
        ({"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}, {"optimizer.name": "lion"}),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": False}}, {"train.dtype": "bfloat16"}),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            {"offload.activations": "layer_input"},
        ),
        (zero(stage3_param_persistence_threshold=1e5), {"sharding.min_weight_size": 100000}),
        (
            zero(zero_hpz_partition_size=4),
            {"sharding.strategy": "hybrid_shard", "mesh.data": 2, "mesh.fsdp": 4},
        ),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}, "gradient_accumulation_steps": 2},
            {"train.accumulation_dtype": "bfloat16"},
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, {"mesh.tensor": 2}),
        ({"checkpoint": {"use_node_local_storage": True}}, {"checkpoint.kind": "local"}),
    ],
)
def test_deepspeed(block, wanted):
    done = migrate(json.dumps({"train_micro_batch_size_per_gpu": 1} | block), devices=8)
    assert done.config, done.lists.refused
    for option, value in wanted.items():
        assert done.option(option) == value, option


@pytest.mark.parametrize(
    "block, refused",
    [
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type"),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, "optimizer.params.adam_w_mode"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type"),
        (zero(zero_quantized_weights=True), "zero_optimization.zero_quantized_weights"),
        (zero(offload_param={"device": "nvme"}), "zero_optimization.offload_param.device"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning.enabled"),
        ({"amp": {"enabled": True}}, "amp.enabled"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_deepspeed_has_and_we_have_not(block, refused):
    done = migrate(json.dumps({"train_micro_batch_size_per_gpu": 1} | block), devices=8)
    assert refused in done.refused()


def test_files_that_a_recipe_names(tmp_path, monkeypatch):
    """deepspeed: a path beside the recipe, or the options in place; fsdp_config: a path."""
    (tmp_path / "ds.json").write_text(
        '{"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}'
    )
    (tmp_path / "fsdp.json").write_text('{"backward_prefetch": "backward_post"}')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + "deepspeed: ds.json\n")
    assert (
        of_files([str(recipe)], tools="hf4", devices=8).option("sharding.strategy") == "full_shard"
    )
    recipe.write_text(
        RECIPE + "deepspeed:\n  zero_optimization: {stage: 1}\n  gradient_clipping: auto\n"
    )
    assert of_files([str(recipe)], tools="hf4", devices=8).option("sharding.strategy") == "zero1"
    recipe.write_text(RECIPE + "fsdp: full_shard\nfsdp_config: fsdp.json\n")
    done = of_files([str(recipe)], tools="hf4", devices=8)
    assert done.option("sharding.backward_prefetch") == "post"
    recipe.write_text(RECIPE + "deepspeed: gone.json\n")
    assert of_files([str(recipe)], tools="hf4", devices=8).refused() == {"deepspeed"}
