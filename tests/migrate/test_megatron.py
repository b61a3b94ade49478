"""Megatron-LM and Megatron-Bridge: learning rates by their formulas, batch, mesh, experts, refusals."""

import math

import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.train.schedules import learning_rate
from tests.support.migration import migrate

PEAK, LAST, STEPS = 3e-4, 3e-5, 60
# 1e-6 of the peak: ours are float32, whose numbers are 6e-8 of themselves apart, and theirs float64.
TOLERANCE = 1e-6 * PEAK
DENSE = {
    "num-layers": 2,
    "hidden-size": 64,
    "ffn-hidden-size": 128,
    "num-attention-heads": 4,
    "seq-length": 32,
    "max-position-embeddings": 32,
    "vocab-size": 250,
    "normalization": "RMSNorm",
    "swiglu": "",
    "disable-bias-linear": "",
    "position-embedding-type": "rope",
    "attention-dropout": 0.0,
    "hidden-dropout": 0.0,
    "micro-batch-size": 2,
    "global-batch-size": 32,
    "train-iters": STEPS,
    "lr": PEAK,
    "min-lr": LAST,
    "data-path": "/data/my_text_document",
}
EXPERTS = {
    "num-experts": 8,
    "moe-ffn-hidden-size": 32,
    "moe-router-topk": 2,
    "moe-aux-loss-coeff": 0.01,
}


def megatron(gpus=8, without=(), **more):
    """A command line of pretrain_gpt.py, migrated; `_` for `-`."""
    flags = {**DENSE, **{k.replace("_", "-"): v for k, v in more.items()}}
    words = [f"--{k} {v}".strip() for k, v in flags.items() if k not in without]
    return migrate(command=f"torchrun --nproc_per_node={gpus} pretrain_gpt.py {' '.join(words)}")


def rates(config, steps=STEPS):
    schedule = learning_rate(config)
    return np.array([float(schedule(i)) for i in range(steps)])


def megatrons(step, style, warmup, init=0.0, decay=STEPS, wsd=0, shape=""):
    """get_lr of megatron/core/optimizer_param_scheduler.py, written out."""
    if warmup and step <= warmup:
        return init + (PEAK - init) * step / warmup
    if style == "constant":
        return PEAK
    if step > decay:
        return LAST
    if style == "inverse-square-root":
        return max(LAST, PEAK * math.sqrt(max(warmup, 1)) / math.sqrt(max(step, 1)))
    ratio = (step - warmup) / (decay - warmup)
    share = {"linear": 1 - ratio, "cosine": 0.5 * (math.cos(math.pi * ratio) + 1)}.get(style, 1.0)
    if style == "WSD" and step > decay - wsd:
        left = (step - (decay - wsd)) / wsd
        share = {
            "linear": 1 - left,
            "cosine": 0.5 * (math.cos(math.pi * left) + 1),
            "exponential": 2 * 0.5**left - 1,
            "minus_sqrt": 1 - math.sqrt(left),
        }[shape]
    return LAST + share * (PEAK - LAST)


@pytest.mark.parametrize(
    ("style", "warmup", "init", "decay", "shape"),
    [
        ("linear", 0, 0.0, STEPS, ""),
        ("linear", 6, 1e-5, 40, ""),
        ("cosine", 6, 0.0, STEPS, ""),
        ("cosine", 6, 0.0, 45, ""),
        ("constant", 6, 0.0, STEPS, ""),
        ("WSD", 6, 0.0, STEPS, "linear"),
        ("WSD", 6, 0.0, STEPS, "cosine"),
        ("WSD", 6, 0.0, STEPS, "exponential"),
        ("WSD", 6, 0.0, STEPS, "minus_sqrt"),
    ],
)
def test_learning_rates_are_megatrons(style, warmup, init, decay, shape):
    more = {"lr_decay_style": style, "lr_warmup_iters": warmup}
    if init:
        more["lr_warmup_init"] = init
    if decay != STEPS:
        more["lr_decay_iters"] = decay
    if shape:
        more |= {"lr_wsd_decay_style": shape, "lr_wsd_decay_iters": 15}
    found = megatron(**more)
    wanted = [megatrons(i, style, warmup, init, decay, 15, shape) for i in range(STEPS)]
    np.testing.assert_allclose(rates(found.config), wanted, rtol=0, atol=TOLERANCE)


def test_samples_are_steps_of_the_batch():
    found = megatron(
        without=("train-iters",),
        train_samples=32 * 100,
        lr_decay_samples=32 * 80,
        lr_warmup_samples=32 * 10,
    )
    assert found.option("train.steps") == 100
    assert found.option("optimizer.schedule_steps") == 80
    assert found.option("optimizer.warmup_steps") == 10


def test_batch_and_mesh():
    """D = world / (TP x PP); micro-batches = global / (micro x D); EP divides D."""
    found = megatron(
        gpus=16,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
        use_distributed_optimizer="",
        bf16="",
        **{k.replace("-", "_"): v for k, v in EXPERTS.items()},
    )
    c = found.config
    assert (c.mesh.tensor, c.mesh.stage, c.mesh.expert, c.mesh.fsdp) == (2, 2, 2, -1)
    assert (c.train.batch_size, c.train.accumulation) == (32, 32 // (2 * 4))
    assert c.sharding.strategy == "zero1"
    assert c.train.dtype == "bfloat16"
    assert c.model.vocab_size == 256  # 250, padded to a multiple of 128 x TP 2
    assert found.became("vocab-size") == {"model.vocab_size"}


def test_what_silence_means():
    c = megatron().config
    assert c.optimizer.schedule == "linear"
    assert (c.optimizer.b2, c.optimizer.weight_decay, c.optimizer.grad_clip) == (0.999, 0.01, 1.0)
    assert c.train.dtype == "float32"
    assert c.train.remat == "none"
    assert c.sharding.strategy == "no_shard"
    assert c.model.tie_word_embeddings
    assert not c.data.document_mask
    assert c.model.num_key_value_heads == 4
    assert not c.model.rope_interleave
    assert c.seed == 1234


def test_a_gated_width_that_nobody_gives():
    """validate_args: int((4 h x 2 / 3) / 64) x 64 under --swiglu."""
    found = megatron(without=("ffn-hidden-size",), hidden_size=256)
    assert found.option("model.intermediate_size") == int(4 * 256 * 2 / 3 / 64) * 64


def test_rotary_positions_as_of_llama_31():
    scaling = megatron(use_rope_scaling="", rope_scaling_factor=16).config.model.rope_scaling
    assert (scaling.type, scaling.factor) == ("llama3", 16.0)
    assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.0, 4.0)


@pytest.mark.parametrize(
    ("left_out", "key"),
    [
        ("normalization", "normalization"),
        ("swiglu", "swiglu"),
        ("disable-bias-linear", "disable_bias_linear"),
        ("position-embedding-type", "position_embedding_type"),
        ("attention-dropout", "attention_dropout"),
        ("hidden-dropout", "hidden_dropout"),
    ],
)
def test_what_silence_means_and_is_not_here_is_refused(left_out, key):
    found = megatron(without=(left_out,))
    assert found.refused() == {key}
    assert "by default" in found.m.absent[0].where


def test_an_absent_key_can_be_allowed():
    words = " ".join(f"--{k} {v}".strip() for k, v in DENSE.items() if k != "hidden-dropout")
    found = migrate(
        command=f"torchrun --nproc_per_node=8 pretrain_gpt.py {words}", allow=["hidden_dropout"]
    )
    assert found.config is not None
    assert [e.key for e, _ in found.lists.left_out] == ["hidden_dropout"]


def test_experts():
    routing = {
        **EXPERTS,
        "moe-layer-freq": "'([0]*1+[1]*1)'",
        "moe-shared-expert-intermediate-size": 64,
        "moe-router-score-function": "sigmoid",
        "moe-router-enable-expert-bias": "",
        "moe-router-load-balancing-type": "seq_aux_loss",
        "moe-router-topk-scaling-factor": 2.5,
        "moe-z-loss-coeff": 1e-3,
    }
    m = megatron(**routing).config
    assert m.model.first_k_dense_replace == 1
    assert (m.model.n_routed_experts, m.model.n_shared_experts) == (8, 2)
    assert (m.model.topk_method, m.model.scoring_func) == ("noaux_tc", "sigmoid")
    assert m.model.seq_aux
    assert m.model.norm_topk_prob
    assert (m.model.routed_scaling_factor, m.moe.router_z_loss_coef) == (2.5, 1e-3)
    assert m.moe.bias_update_rate == 1e-3  # Megatron's default


def test_softmax_before_the_choice_leaves_weights_as_they_are():
    """topk_routing_with_score_function: softmax over all, then the best; or over the best alone."""
    assert megatron(**EXPERTS).config.model.norm_topk_prob
    assert not megatron(**EXPERTS, moe_router_pre_softmax="").config.model.norm_topk_prob


def test_a_capacity_drops_tokens():
    c = megatron(**EXPERTS, moe_expert_capacity_factor=1.0, moe_token_drop_policy="position").config
    assert (c.moe.drop, c.moe.capacity_factor, c.moe.drop_policy) == (True, 1.0, "position")
    assert not megatron(**EXPERTS).config.moe.drop


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"moe-layer-freq": "'([0,1]*1)'", **EXPERTS, "num-layers": 2}, None),
        ({"moe-layer-freq": "'([1,0]*1)'", **EXPERTS}, "moe-layer-freq"),
        ({"moe-layer-freq": "'__import__(1)'", **EXPERTS}, "moe-layer-freq"),
        (
            {"moe-router-load-balancing-type": "sinkhorn", **EXPERTS},
            "moe-router-load-balancing-type",
        ),
        ({"expert-tensor-parallel-size": 2}, "expert-tensor-parallel-size"),
        ({"context-parallel-size": 2}, "context-parallel-size"),
        ({"mock-data": ""}, "mock-data"),
        ({"fp8-format": "hybrid"}, "fp8-format"),
        ({"pretrained-checkpoint": "/ckpt"}, "pretrained-checkpoint"),
    ],
)
def test_refused(more, key):
    assert megatron(**more).refused() == ({key} if key else set())


def test_a_batch_that_is_no_multiple_is_an_error():
    with pytest.raises(UserError, match="32 sequences is no multiple"):
        megatron(gpus=24)


BRIDGE = """
model: {tensor_model_parallel_size: 2, kd_config: {skip_lm_loss: true, logit_kl_temperature: 2.0}}
train: {train_iters: 60, global_batch_size: 8, micro_batch_size: 1}
optimizer: {lr: 3.0e-4, min_lr: 3.0e-5, weight_decay: 0.1}
scheduler: {lr_warmup_iters: 6}
rng: {seed: 7}
"""


def test_bridge():
    """The scheduler's weight decay (0.033 in recipes/common.py) wins over the optimizer's."""
    c = migrate(BRIDGE, devices=8).config
    assert c.objective == "distill"
    assert (c.distill.alpha, c.distill.temperature) == (1.0, 2.0)
    assert c.optimizer.weight_decay == 0.033
    assert (c.train.batch_size, c.train.accumulation, c.seed) == (8, 2, 7)
    wanted = [megatrons(i, "cosine", 6) for i in range(STEPS)]
    np.testing.assert_allclose(rates(c), wanted, rtol=0, atol=TOLERANCE)


def test_bridge_divergence_beside_cross_entropy_is_scaled_there():
    text = BRIDGE.replace("skip_lm_loss: true", "skip_lm_loss: false, kd_loss_scale: 1.0")
    assert migrate(text, devices=8).refused() == {"model.kd_config.kd_loss_scale"}
