"""NeMo 1 and the words of the NeMo guide: learning rates by their formulas, what is divided, data."""

import math

import numpy as np
import pytest

from configs import distributed
from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.config.options import OPTIONS, value_of
from deepseek_jax.train.schedules import learning_rate
from tests.support.migration import migrate, of_files

PEAK, LAST, STEPS = 3e-4, 3e-5, 60
# 1e-6 of the peak: ours are float32, whose numbers are 6e-8 of themselves apart, and theirs float64.
TOLERANCE = 1e-6 * PEAK


def rates(config, steps=STEPS):
    schedule = learning_rate(config)
    return np.array([float(schedule(i)) for i in range(steps)])


NEMO = f"""
trainer: {{devices: 8, num_nodes: 1, precision: bf16, max_steps: {STEPS}, val_check_interval: 20,
          limit_val_batches: 4, log_every_n_steps: 1, gradient_clip_val: 1.0}}
exp_manager: {{exp_dir: runs/nemo, create_wandb_logger: false,
              checkpoint_callback_params: {{monitor: val_loss, save_top_k: 5, mode: min}}}}
model:
  {{micro_batch_size: 2, global_batch_size: 32, encoder_seq_length: 32, max_position_embeddings: 32,
   num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, num_query_groups: 2,
   vocab_size: 256, hidden_dropout: 0.0, attention_dropout: 0.0, normalization: rmsnorm, bias: false,
   activation: fast-swiglu, position_embedding_type: rope, tensor_model_parallel_size: 2,
   optim: {{name: distributed_fused_adam, lr: {PEAK}, weight_decay: 0.1, betas: [0.9, 0.95],
           sched: {{name: CosineAnnealing, warmup_steps: 6, constant_steps: CONSTANT, min_lr: {LAST}}}}},
   data: {{data_prefix: [1.0, /data/a, 2.0, /data/b], splits_string: "900,50,50", seq_length: 32,
          reset_position_ids: true, reset_attention_mask: true}}}}
"""


def nemos(step, constant):
    """CosineAnnealing of nemo/core/optim/lr_scheduler.py, written out."""
    if constant == 0:
        if step <= 6:
            return PEAK * (step + 1) / 7
        share = 0.5 * (1 + math.cos(math.pi * (step - 6) / (STEPS - 6)))
        return LAST + share * (PEAK - LAST)
    decay = STEPS - constant - 6
    if step <= 6:
        return PEAK * step / 6
    if step > 6 + decay:
        return LAST
    return LAST + 0.5 * (math.cos(math.pi * (step - 6) / decay) + 1) * (PEAK - LAST)


@pytest.mark.parametrize("constant", [0, 20])
def test_learning_rates_are_nemos(constant):
    found = migrate(NEMO.replace("CONSTANT", str(constant)))
    wanted = [nemos(i, constant) for i in range(STEPS)]
    np.testing.assert_allclose(rates(found.config), wanted, rtol=0, atol=TOLERANCE)


def test_nemo():
    found = migrate(NEMO.replace("CONSTANT", "0"))
    c = found.config
    assert (c.mesh.tensor, c.mesh.fsdp, c.sharding.strategy) == (2, -1, "zero1")
    assert (c.train.batch_size, c.train.accumulation) == (32, 32 // (2 * 4))
    assert (c.model.num_key_value_heads, c.model.head_dim) == (2, 16)
    assert (c.data.path, c.data.weights) == ("/data/a,/data/b", "1.0,2.0")
    assert c.data.split == "900,50,50"
    assert c.data.document_mask
    assert c.checkpoint.keep_best == 5
    assert "--workdir=runs/nemo" in found.launch


def test_nemo_says_what_is_divided_in_three_places():
    text = NEMO.replace("CONSTANT", "0").replace(
        "precision: bf16", "precision: bf16, strategy: ddp"
    )
    assert migrate(text).config.sharding.strategy == "zero1"
    fsdp = text.replace("model:\n  {", "model:\n  {fsdp: true, fsdp_sharding_strategy: grad, ")
    assert migrate(fsdp).config.sharding.strategy == "shard_grad_op"


def test_nemo_by_parts_of_the_launcher(tmp_path):
    """Files of the launcher name their own keys from the root of the whole: ${training.model.x}."""
    text = NEMO.replace("CONSTANT", "0").replace(
        "seq_length: 32,\n", 'seq_length: "${training.model.encoder_seq_length}",\n'
    )
    path = tmp_path / "training.yaml"
    path.write_text(text, encoding="utf-8")
    assert of_files([str(path)]).config.train.sequence_length == 32


GUIDE = """
trainer: {devices: 4, precision: bf16, strategy: ddp, max_steps: 10000}
model: {vocab_size: 50257, emb_dim: 1024, n_layers: 24, num_experts: 16, top_k: 2, expert_dim: 4096,
        expert_model_parallel_size: 4, tensor_model_parallel_size: 1, pipeline_model_parallel_size: 1}
"""


def test_the_guides_excerpt():
    found = migrate(GUIDE)
    c = found.config
    assert found.m.readings[0].title == "the NeMo guide"
    assert (c.model.hidden_size, c.model.num_hidden_layers, c.model.moe_intermediate_size) == (
        1024,
        24,
        4096,
    )
    assert (c.model.n_routed_experts, c.model.num_experts_per_tok) == (16, 2)
    assert (c.mesh.expert, c.train.steps, c.sharding.strategy) == (4, 10_000, "no_shard")
    assert c.model.attention_kind == "mla"


def test_the_guides_excerpt_is_our_distributed_config():
    """What the guide's file has where its excerpt is silent, configs/distributed.py has as well."""
    theirs = migrate(GUIDE).config
    ours = from_config_dict(distributed.get_config())
    names = set(OPTIONS) - {"sharding.strategy", "data.path"}  # ddp there; no data there
    differ = {n: (value_of(ours, n), value_of(theirs, n)) for n in names}
    assert {n for n, (a, b) in differ.items() if a != b} == set()


NEMO2 = """
model:
  _target_: nemo.collections.llm.gpt.model.base.GPTModel
  config: {_target_: megatron.core.transformer.transformer_config.CLASS, num_layers: 2, hidden_size: 64,
           ffn_hidden_size: 128, num_attention_heads: 4, multi_latent_attention: true, kv_lora_rank: 32,
           q_lora_rank: 48, qk_head_dim: 16, qk_pos_emb_head_dim: 8, v_head_dim: 16, qk_layernorm: true,
           normalization: RMSNorm, gated_linear_unit: true, add_bias_linear: false,
           position_embedding_type: rope, hidden_dropout: 0.0, attention_dropout: 0.0, vocab_size: 256,
           num_moe_experts: 4, moe_ffn_hidden_size: 32, moe_layer_freq: [0, 1]}
trainer:
  _target_: nemo.lightning.pytorch.trainer.Trainer
  devices: 8
  max_steps: 60
  plugins: [{_target_: nemo.lightning.MegatronMixedPrecision, precision: bf16-mixed}]
  strategy: {_target_: nemo.lightning.MegatronStrategy, expert_model_parallel_size: 2}
data: {_target_: nemo.collections.llm.gpt.data.pre_training.PreTrainingDataModule, paths: [/data/a],
       seq_length: 32, micro_batch_size: 1, global_batch_size: 16, split: "99,1,0"}
optim:
  config: {_target_: megatron.core.optimizer.optimizer_config.OptimizerConfig, lr: 3.0e-4, adam_beta2: 0.95}
  lr_scheduler: {_target_: nemo.lightning.pytorch.optim.lr_scheduler.CosineAnnealingScheduler,
                 warmup_steps: 6, constant_steps: 0, min_lr: 3.0e-5}
"""


def test_nemo_2():
    found = migrate(NEMO2.replace("CLASS", "MLATransformerConfig"))
    c = found.config
    assert found.m.readings[0].title == "NeMo 2"
    assert (c.mesh.expert, c.sharding.strategy, c.train.dtype) == (2, "zero1", "bfloat16")
    assert (c.train.batch_size, c.train.accumulation) == (16, 2)
    assert (c.model.first_k_dense_replace, c.model.n_routed_experts) == (1, 4)
    assert (c.model.rope_scaling.type, c.model.rope_scaling.factor) == ("yarn", 40.0)
    wanted = [nemos(i, 0) for i in range(STEPS)]
    np.testing.assert_allclose(rates(c), wanted, rtol=0, atol=TOLERANCE)


def test_nemo_2_sizes_that_are_in_python():
    found = migrate(NEMO2.replace("CLASS", "DeepSeekV3Config"))
    assert found.refused() == {"model.config._target_"}
