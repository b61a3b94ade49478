"""Options drawn at random: small models on up to eight devices, for fuzz_options.py.

Sizes are small, many of them one, and most of them multiples of what the mesh divides them by; AS_DRAWN
of the choices do not look at the others, so that validation has something to refuse.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.config.options import (
    REMAT_NAMES,
    STRATEGIES,
    Config,
    DataConfig,
    Fp16Config,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OffloadConfig,
    OptimizerConfig,
    RopeScaling,
    ShardingConfig,
    TrainConfig,
    of,
)
from deepseek_jax.parallel.mesh import AXES

DEVICES = 8
AS_DRAWN = 0.3


def differing(config: Config) -> str:
    """The options that are not the defaults, as flags."""

    def flags(section: Any, default: Any, where: str) -> list[str]:
        out = []
        for field in dataclasses.fields(section):
            value, usual = getattr(section, field.name), getattr(default, field.name)
            if dataclasses.is_dataclass(value):
                out += flags(value, usual, f"{where}.{field.name}")
            elif value != usual:
                out.append(f"--{where}.{field.name}={value}")
        return out

    return " ".join(flags(config, Config(), "config"))


def draw(seed: int, case: int) -> Config:
    """The options of one case. Not all of them fit together."""
    rng = np.random.default_rng([seed, case])

    def chance(share):
        return rng.random() < share

    def pick(*values):
        return values[int(rng.integers(len(values)))]

    def size(*sizes: int, of: int = 1) -> int:
        """One of the sizes, mostly made a multiple."""
        return pick(*sizes) if chance(AS_DRAWN / 3) else pick(*sizes) * of

    devices = int(rng.integers(1, DEVICES + 1)) if chance(AS_DRAWN) else pick(1, 2, 4, 8)
    mesh = MeshConfig(
        **dict.fromkeys(AXES, 1)
        | _factors(devices, ("data", "stage", "fsdp", "expert", "tensor"), rng)
    )
    ways = (
        mesh.data * mesh.fsdp * mesh.expert
    )  # of a batch; of a dense weight, times stage and tensor
    divided = ways * mesh.stage * mesh.tensor
    grouped = chance(0.4)
    heads = size(1, 1, 2, 3, 4, of=mesh.tensor)
    width = size(1, 1, 2, 8, of=divided)
    depth = pick(0, 0, 0, 1, 2)
    layers, dense = pick(1, 1, 2, 3, 5), pick(0, 0, 1, 1, 2, 5)
    group = pick(1, 1, 2, 4)
    experts = size(1, 1, 2, 3, 4, of=mesh.expert * group)
    groups, method = pick(1, group), pick("noaux_tc", "greedy", "group_limited_greedy")
    reachable = max(1, experts * groups // group)
    model = ModelConfig(
        vocab_size=size(1, 2, 17, 64, of=mesh.tensor),
        hidden_size=size(1, 2, 8, 24, 32, of=divided),
        intermediate_size=size(1, 2, 24, of=mesh.tensor),
        moe_intermediate_size=size(1, 2, 12, of=mesh.tensor),
        num_hidden_layers=layers,
        first_k_dense_replace=min(dense, layers),
        num_attention_heads=heads,
        q_lora_rank=None if grouped else pick(None, 1, 12),
        kv_lora_rank=pick(1, 8, 16),
        qk_nope_head_dim=width,
        v_head_dim=pick(1, 1, 3) * width,
        qk_rope_head_dim=1
        if chance(0.05)
        else 2 * pick(1, 1, 2, 4) * (1 if chance(AS_DRAWN) else divided),
        num_key_value_heads=pick(1, heads, max(1, heads // 2), mesh.tensor) if grouped else None,
        head_dim=1 if grouped and chance(0.05) else pick(None, 2, 4, 8) if grouped else None,
        attention_bias=grouped and chance(0.3),
        attention_out_bias=grouped and chance(0.3),
        use_qk_norm=grouped and chance(0.3),
        partial_rotary_factor=pick(1.0, 1.0, 0.5) if grouped else 1.0,
        n_routed_experts=experts,
        num_experts_per_tok=pick(1, 2, experts) if chance(AS_DRAWN) else pick(1, reachable),
        n_shared_experts=pick(0, 1, 2),
        n_group=group,
        topk_group=groups,
        topk_method=method,
        scoring_func=pick("sigmoid", "softmax"),
        norm_topk_prob=chance(0.7),
        aux_loss_alpha=pick(0.0, 0.01),
        seq_aux=chance(0.6),
        num_nextn_predict_layers=depth,
        rms_norm_eps=pick(1e-6, 0.1),
        rope_interleave=chance(0.7),
        tie_word_embeddings=chance(0.3),
        rope_scaling=RopeScaling(
            type=pick("default", "default", "linear", "yarn", "llama3"),
            factor=pick(1.0, 4.0),
            mscale=pick(0.0, 1.0),
            mscale_all_dim=pick(0.0, 1.0),
        ),
    )
    accumulation = pick(1, 1, 2, 3)
    micro = size(1, 1, 2, of=ways)
    batch = micro * accumulation
    ramp = chance(0.2)
    dtype = pick("float32", "bfloat16", "float16")
    names = ",".join(rng.permutation(REMAT_NAMES)[: int(rng.integers(1, 4))].tolist())
    offload = OffloadConfig(
        optimizer_state=chance(0.15),
        parameters=chance(0.1),
        activations=str(pick(*REMAT_NAMES)) if chance(0.1) else "",
    )
    train = TrainConfig(
        steps=pick(1, 40),
        batch_size=batch,
        sequence_length=pick(1, 2, 7, 16, 65, 300) if chance(0.5) else depth + pick(1, 1, 16),
        accumulation=accumulation,
        batch_ramp_start=micro if ramp else 0,
        batch_ramp_steps=int(ramp) * 3,
        dtype=dtype,
        accumulation_dtype=pick("float32", "bfloat16") if accumulation > 1 else "float32",
        remat=pick("none", "dots", "full", "full", "exchange", f"save:{names}"),
        mtp_switch_fraction=pick(0.0, 1.0),
    )
    moe = MoeConfig(
        dispatch=pick("all_to_all", "all_gather", "ring"),
        capacity_factor=pick(0.01, 1.25, 100.0),
        drop=chance(0.2),
        drop_policy=pick("probability", "position"),
        bias_update_rate=pick(0.0, 0.001),
        bias_centre=chance(0.3),
        router_z_loss_coef=pick(0.0, 0.001),
    )
    strategy = pick(*STRATEGIES)
    compressible = (
        mesh.data > 1 and mesh.stage == 1 and strategy not in ("full_shard", "shard_grad_op")
    )
    sharding = ShardingConfig(
        strategy=strategy,
        min_weight_size=pick(0, 0, 1, 100, 1000, 2048, 10**8),
        virtual_stages=pick(0, 0, 1, 2) if mesh.stage > 1 else pick(0, 1),
        gradient_compression=pick("none", "bfloat16", "int8")
        if compressible or chance(0.05)
        else "none",
    )
    optimizer = OptimizerConfig(
        name=pick("adamw", "adafactor", "muon", "lion", "sgd"),
        grad_clip=pick(0.0, 1.0),
        weight_decay=pick(0.0, 0.1),
        schedule=pick(*of("optimizer.schedule").choices),
        warmup_steps=pick(0, 100),
    )
    own: dict[str, Any] = {"moment_dtype": pick("float32", "bfloat16")}
    if optimizer.name == "adafactor":
        own = {
            "scale_parameter": chance(0.5),
            "first_moment": pick(0.0, 0.9),
            "min_dim_size_to_factor": pick(1, 8, 128),
        }
    elif optimizer.name == "sgd":
        own = {"momentum": pick(0.0, 0.9)}
    optimizer = dataclasses.replace(optimizer, **own)
    fp16 = Fp16Config(loss_scale=pick(0.0, 128.0)) if dtype == "float16" else Fp16Config()
    return Config(
        seed=case,
        model=model,
        mesh=mesh,
        sharding=sharding,
        moe=moe,
        data=DataConfig(),
        train=train,
        fp16=fp16,
        optimizer=optimizer,
        offload=offload,
    )


def _factors(devices: int, axes: Sequence[str], rng: np.random.Generator) -> dict[str, int]:
    """The devices as a product over some of the axes."""
    out = dict.fromkeys(axes, 1)
    for prime in (2, 3, 5, 7):
        while devices % prime == 0:
            out[axes[int(rng.integers(len(axes)))]] *= prime
            devices //= prime
    return out
