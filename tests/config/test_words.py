"""docs/words.md follows from the table of options, and has the words that people come with."""

import pytest

from deepseek_jax.config import __main__ as command
from deepseek_jax.config import suggestions, words
from deepseek_jax.config.option import SYSTEMS
from deepseek_jax.config.options import OPTIONS, Config, replaced
from tests.support import ROOT

COMMITTED = ROOT / "docs" / "words.md"


def test_the_committed_file_is_current(tmp_path):
    assert COMMITTED.read_text(encoding="utf-8") == words.table(), f"run: {words.MAKE}"
    assert command.main(["words", f"--out={tmp_path}/words.md"]) == 0
    assert (tmp_path / "words.md").read_text(encoding="utf-8") == words.table()


def test_what_the_words_stand_for_can_be_set():
    for o, alias, system, word in words.each_alias():
        assert system in SYSTEMS and word
        if alias.value is not None:
            replaced(Config(), o.name, alias.value)
            o.check(alias.value)
            assert type(alias.value) is o.type
        for name, value in alias.also.items():
            OPTIONS[name].check(value)


@pytest.mark.parametrize(
    "word",
    [
        *("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD", "strategy: ddp"),
        *(
            "expert_model_parallel_size",
            "pipeline_model_parallel_size",
            "tensor_model_parallel_size",
        ),
        *("stage3_param_persistence_threshold", "SIZE_BASED_WRAP", "fsdp_sync_module_states"),
        *("SHARDED_STATE_DICT", "FULL_STATE_DICT", "LOCAL_STATE_DICT", "save_total_limit"),
        *("gradient_checkpointing", "offload_optimizer", "offload_param", "fsdp_offload_params"),
        *("bf16_compress_hook", "communication_data_type", "zero_quantized_gradients"),
        *("per_device_train_batch_size", "mixed_precision: bf16", "initial_scale_power"),
        *(
            "grad_accum_dtype",
            "adafactor",
            "bf16_optimizer_states",
            "max_grad_norm",
            "torch.profiler",
        ),
        *("moe_token_dispatcher_type: alltoall", "moe_expert_capacity_factor", "moe_z_loss_coeff"),
        *(
            "router_aux_loss_coef",
            "moe_router_bias_update_rate",
            "mtp_loss_scaling_factor",
            "emb_dim",
        ),
        *(
            "from_pretrained",
            "apply_chat_template",
            "lm_eval",
            "torchrun --max_restarts",
            "YAML files",
            "device: nvme",
            "move unused experts to CPU",
        ),
    ],
)
def test_the_words_people_come_with(word):
    assert word in words.table()


@pytest.mark.parametrize(
    "key, said",
    [
        ("zero_optimization.offload_param.nvme_path", "offload.parameters=True: the host's memory"),
        ("offload_optimizer_nvme_path", "offload.optimizer_state=True"),
        (
            "zero_optimization.offload_optimizer.device",
            "cpu (DeepSpeed) is config.offload.optimizer_state here",
        ),
        ("model.offload_unused_experts", "one layer at a time is on the device"),
        ("optimizer.lr_scheduler_type", "is config.optimizer.schedule here"),
        ("train.warmup_ratio", "is config.optimizer.warmup_fraction here"),
        ("optimizer.beta1", "beta1 (Hugging Face) is config.optimizer.first_moment here"),
        ("train.save_strategy", "is config.checkpoint.every_epochs=1.0 here"),
    ],
)
def test_what_a_word_typed_as_an_option_says(key, said):
    assert said in suggestions.suggestion(key)
