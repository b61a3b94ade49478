"""The one validation: everything that can be checked without looking at devices, data or the workdir."""

import math
from typing import Any

from deepseek_jax.config import REMAT_NAMES, STRATEGIES, STRATEGY_ALIASES, Config, Model, UserError


def validate(config: Config) -> None:
    """Checks all that needs no device, file or workdir.

    Raises:
      UserError: names the first wrong option, its value and the repair.
    """
    m, t, o = config.model, config.train, config.optimizer
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config.seed={config.seed} is not a 32-bit number. Set it between 0 and {2**32 - 1}.")
    _validate_model(m)
    _choice("config.sharding.strategy", config.sharding.strategy.lower(), (*STRATEGIES, *STRATEGY_ALIASES))
    _choice("config.moe.dispatch", config.moe.dispatch, ("all_to_all", "all_gather", "ring"))
    _choice("config.moe.drop_policy", config.moe.drop_policy, ("probability", "probs", "position"))
    if not config.moe.capacity_factor > 0 or math.isinf(config.moe.capacity_factor):
        raise UserError(f"config.moe.capacity_factor={config.moe.capacity_factor} gives no places. Set it above 0, for instance 1.25.")
    _at_least(config.moe, "moe", 0, "bias_update_rate", "router_z_loss_coef")
    _at_least(config.sharding, "sharding", 0, "min_weight_size", "virtual_stages")
    if config.mesh.context != 1:
        raise UserError(f"config.mesh.context={config.mesh.context} is not in this version. Set config.mesh.context=1.")
    _at_least(t, "train", 1, "steps", "batch_size", "sequence_length", "accumulation", "max_bad_steps")
    _at_least(t, "train", 0, "batch_ramp_start", "batch_ramp_steps", "mtp_loss_weight", "mtp_loss_weight_final")
    for section, where, names in ((m, "model", ("vocab_size", "hidden_size", "intermediate_size", "n_routed_experts")),
                                  (t, "train", ("batch_size", "sequence_length"))):
        for name in names:
            if getattr(section, name) >= 2**31:
                raise UserError(f"config.{where}.{name}={getattr(section, name)} does not fit 32 bits. Set it below {2**31}.")
    if bool(t.batch_ramp_start) != bool(t.batch_ramp_steps):
        raise UserError(f"config.train.batch_ramp_start={t.batch_ramp_start} and config.train.batch_ramp_steps={t.batch_ramp_steps} go together. "
                        f"Set both, or both to 0 for no ramp.")
    _divides(t.accumulation, "config.train.accumulation", t.batch_size, "config.train.batch_size")
    if t.batch_ramp_start:
        micro = config.micro_batch
        if t.batch_ramp_start % micro or t.batch_ramp_start > t.batch_size:
            raise UserError(f"config.train.batch_ramp_start={t.batch_ramp_start} is not a multiple of the micro-batch ({micro} sequences = "
                            f"batch_size {t.batch_size} / accumulation {t.accumulation}) up to batch_size. Set it to a multiple of {micro}.")
    if t.sequence_length > m.max_position_embeddings:
        raise UserError(f"config.train.sequence_length={t.sequence_length} is above config.model.max_position_embeddings="
                        f"{m.max_position_embeddings}. Lower the first or raise the second.")
    if t.sequence_length <= m.num_nextn_predict_layers:
        raise UserError(f"config.train.sequence_length={t.sequence_length} leaves no target for config.model.num_nextn_predict_layers="
                        f"{m.num_nextn_predict_layers}. Raise the first.")
    _choice("config.train.dtype", t.dtype, ("bfloat16", "float32"))
    _choice("config.train.attention", t.attention, ("auto", "blocks", "cudnn"))
    if t.attention == "cudnn":
        _validate_cudnn(m, t.dtype)
    if t.remat.startswith("save:"):
        for name in t.remat.removeprefix("save:").split(","):
            _choice("config.train.remat=save:", name, REMAT_NAMES)
    else:
        _choice("config.train.remat", t.remat, ("none", "full", "exchange", "save:NAME,NAME..."))
    _choice("config.optimizer.name", o.name, ("adamw",))
    _choice("config.optimizer.schedule", o.schedule, ("constant", "cosine", "wsd", "deepseek_v2", "deepseek_v3"))
    if not (math.isfinite(o.learning_rate) and o.learning_rate > 0):
        raise UserError(f"config.optimizer.learning_rate={o.learning_rate} is not a positive finite number. Set it to, for instance, 1e-3.")
    for where, section, name in (("optimizer", o, "decay_fraction"), ("optimizer", o, "final_fraction"), ("train", t, "mtp_switch_fraction"),
                                 ("moe", config.moe, "bias_update_fraction")):
        if not 0 <= getattr(section, name) <= 1:
            raise UserError(f"config.{where}.{name}={getattr(section, name)} is not a share. Set it between 0 and 1.")
    _at_least(o, "optimizer", 0, "b1", "b2", "eps", "weight_decay", "grad_clip", "warmup_steps")
    for name in ("b1", "b2"):
        if getattr(o, name) >= 1:
            raise UserError(f"config.optimizer.{name}={getattr(o, name)} must be below 1. Set it to, for instance, 0.9.")
    _choice("config.checkpoint.kind", config.checkpoint.kind, ("sharded",))
    _choice("config.data.bin_dtype", config.data.bin_dtype, ("uint16", "uint32"))
    if not 0 <= config.data.eval_fraction < 1:
        raise UserError(f"config.data.eval_fraction={config.data.eval_fraction} is not a share. Set it between 0 (no evaluation) and 1.")
    _at_least(config.eval, "eval", 0, "every_steps", "batches", "sample_tokens")
    _at_least(config.checkpoint, "checkpoint", 0, "every_steps", "keep")
    _at_least(config.log, "log", 1, "every_steps")
    _at_least(config.log, "log", 0, "peak_tflops")


def _validate_model(m: Model) -> None:
    _at_least(m, "model", 1, "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
              "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
              "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "max_position_embeddings")
    _at_least(m, "model", 0, "first_k_dense_replace", "n_shared_experts", "aux_loss_alpha", "num_nextn_predict_layers",
              "rms_norm_eps", "initializer_range")
    _choice("config.model.scoring_func", m.scoring_func, ("sigmoid", "softmax"))
    _choice("config.model.topk_method", m.topk_method, ("noaux_tc", "greedy", "group_limited_greedy"))
    _choice("config.model.rope_scaling.type", m.rope_scaling.type, ("default", "yarn"))
    if m.qk_rope_head_dim % 2:
        raise UserError(f"config.model.qk_rope_head_dim={m.qk_rope_head_dim} is odd, but rotation works on pairs. Set it to an even number.")
    if m.first_k_dense_replace > m.num_hidden_layers:
        raise UserError(f"config.model.first_k_dense_replace={m.first_k_dense_replace} is above config.model.num_hidden_layers="
                        f"{m.num_hidden_layers}. Set it to {m.num_hidden_layers} or less.")
    _divides(m.n_group, "config.model.n_group", m.n_routed_experts, "config.model.n_routed_experts")
    if m.topk_group > m.n_group:
        raise UserError(f"config.model.topk_group={m.topk_group} is above config.model.n_group={m.n_group}. Set it to {m.n_group} or less.")
    reachable = m.n_routed_experts if m.topk_method == "greedy" else m.topk_group * (m.n_routed_experts // m.n_group)
    if m.num_experts_per_tok > reachable:
        raise UserError(f"config.model.num_experts_per_tok={m.num_experts_per_tok} is above the {reachable} experts a token may choose from "
                        f"(n_routed_experts={m.n_routed_experts}, topk_group={m.topk_group} of n_group={m.n_group}). Set it to {reachable} or less.")
    if m.topk_method == "noaux_tc" and m.n_group > 1 and m.n_routed_experts // m.n_group < 2:
        raise UserError(f"config.model.n_group={m.n_group} leaves one expert a group, but topk_method=noaux_tc sums the top two. "
                        f"Set n_group to at most {m.n_routed_experts // 2}.")
    if not (math.isfinite(m.rope_theta) and m.rope_theta > 1):
        raise UserError(f"config.model.rope_theta={m.rope_theta} is not a finite number above 1. Set it to, for instance, 10000.")
    if not (math.isfinite(m.routed_scaling_factor) and m.routed_scaling_factor > 0):
        raise UserError(f"config.model.routed_scaling_factor={m.routed_scaling_factor} is not a positive finite number. "
                        f"Set it to, for instance, 1.0.")
    r = m.rope_scaling
    _at_least(r, "model.rope_scaling", 1, "factor", "original_max_position_embeddings")
    _at_least(r, "model.rope_scaling", 0, "mscale", "mscale_all_dim")
    if not (math.isfinite(r.beta_fast) and 0 < r.beta_slow <= r.beta_fast):
        raise UserError(f"config.model.rope_scaling.beta_fast={r.beta_fast} and beta_slow={r.beta_slow} are not two positive "
                        f"numbers, the first at least the second. Set them to, for instance, 32 and 1.")


def _validate_cudnn(m: Model, dtype: str) -> None:
    if dtype != "bfloat16":
        raise UserError(f"config.train.attention=cudnn computes in bfloat16, and config.train.dtype={dtype}. Set config.train.attention=auto.")
    for name, width in (("qk_nope_head_dim + qk_rope_head_dim", m.qk_nope_head_dim + m.qk_rope_head_dim), ("v_head_dim", m.v_head_dim)):
        if width % 8 or width > 256:
            raise UserError(f"config.train.attention=cudnn takes head widths that are multiples of 8 up to 256, and config.model.{name} is {width}. "
                            f"Set config.train.attention=auto.")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value!r} is not known. Set {name} to one of: {', '.join(allowed)}.")


def _at_least(section: Any, where: str, low: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not (math.isfinite(value) and value >= low):
            raise UserError(f"config.{where}.{name}={value} is too small or not finite. Set it to {low:g} or more.")


def _divides(small: int, small_name: str, large: int, large_name: str) -> None:
    if large % small:
        raise UserError(f"{large_name}={large} is not divisible by {small_name}={small}. Set {small_name} to a divisor of {large}.")
