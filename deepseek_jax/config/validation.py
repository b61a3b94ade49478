"""The one validation: everything that can be checked without looking at devices, data or the workdir."""

import math
from typing import Any

from deepseek_jax.config.options import (
    CHECKPOINT_KINDS,
    DTYPES,
    GRADIENT_COMPRESSIONS,
    REMAT_NAMES,
    STRATEGIES,
    STRATEGY_ALIASES,
    Config,
    Fp16Config,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from deepseek_jax.errors import UserError


def validate(config: Config) -> None:
    """Checks all that needs no device, file or workdir.

    Raises:
      UserError: names the first wrong option, its value and the repair.
    """
    m, t, o = config.model, config.train, config.optimizer
    if not 0 <= config.seed < 2**32:
        raise UserError(
            f"config.seed={config.seed} is not a 32-bit number. Set it between 0 and {2**32 - 1}."
        )
    _validate_model(m)
    _choice(
        "config.sharding.strategy",
        config.sharding.strategy.lower(),
        (*STRATEGIES, *STRATEGY_ALIASES),
    )
    _choice(
        "config.sharding.backward_prefetch",
        config.sharding.backward_prefetch,
        ("pre", "post", "none"),
    )
    _validate_compression(config)
    _choice("config.moe.dispatch", config.moe.dispatch, ("all_to_all", "all_gather", "ring"))
    _choice("config.moe.drop_policy", config.moe.drop_policy, ("probability", "probs", "position"))
    if not config.moe.capacity_factor > 0 or math.isinf(config.moe.capacity_factor):
        raise UserError(
            f"config.moe.capacity_factor={config.moe.capacity_factor} gives no places. Set it above 0, for instance 1.25."
        )
    _at_least(config.moe, "moe", 0, "bias_update_rate", "router_z_loss_coef")
    _at_least(config.sharding, "sharding", 0, "min_weight_size", "virtual_stages")
    if config.mesh.context != 1:
        raise UserError(
            f"config.mesh.context={config.mesh.context} is not in this version. Set config.mesh.context=1."
        )
    _at_least(
        t, "train", 1, "steps", "batch_size", "sequence_length", "accumulation", "max_bad_steps"
    )
    _choice("config.train.on_bad_steps", t.on_bad_steps, ("stop", "rollback"))
    _at_least(t, "train", 1, "max_rollbacks")
    if t.max_rollbacks != TrainConfig().max_rollbacks and t.on_bad_steps == "stop":
        raise UserError(
            f"config.train.max_rollbacks={t.max_rollbacks} has no effect with config.train.on_bad_steps=stop. "
            f"Set config.train.on_bad_steps=rollback, or max_rollbacks={TrainConfig().max_rollbacks}."
        )
    _at_least(config.watchdog, "watchdog", 1, "heartbeat_timeout")
    _at_least(config.watchdog, "watchdog", -1, "step_timeout")
    if -1 < config.watchdog.step_timeout < 0:
        raise UserError(
            f"config.watchdog.step_timeout={config.watchdog.step_timeout} is no time. Set it to seconds, to 0 for none, or to -1."
        )
    _at_least(config.log, "log", 0, "spike_deviations")
    _at_least(
        t,
        "train",
        0,
        "batch_ramp_start",
        "batch_ramp_steps",
        "mtp_loss_weight",
        "mtp_loss_weight_final",
    )
    for section, where, names in (
        (m, "model", ("vocab_size", "hidden_size", "intermediate_size", "n_routed_experts")),
        (t, "train", ("batch_size", "sequence_length")),
    ):
        for name in names:
            if getattr(section, name) >= 2**31:
                raise UserError(
                    f"config.{where}.{name}={getattr(section, name)} does not fit 32 bits. Set it below {2**31}."
                )
    if bool(t.batch_ramp_start) != bool(t.batch_ramp_steps):
        raise UserError(
            f"config.train.batch_ramp_start={t.batch_ramp_start} and config.train.batch_ramp_steps={t.batch_ramp_steps} go together. "
            f"Set both, or both to 0 for no ramp."
        )
    _divides(t.accumulation, "config.train.accumulation", t.batch_size, "config.train.batch_size")
    if t.batch_ramp_start:
        micro = config.micro_batch
        if t.batch_ramp_start % micro or t.batch_ramp_start > t.batch_size:
            raise UserError(
                f"config.train.batch_ramp_start={t.batch_ramp_start} is not a multiple of the micro-batch ({micro} sequences = "
                f"batch_size {t.batch_size} / accumulation {t.accumulation}) up to batch_size. Set it to a multiple of {micro}."
            )
    if t.sequence_length > m.max_position_embeddings:
        raise UserError(
            f"config.train.sequence_length={t.sequence_length} is above config.model.max_position_embeddings="
            f"{m.max_position_embeddings}. Lower the first or raise the second."
        )
    # jax 0.11 and newer lose the layout of an array of one number, in gradients too.
    if config.micro_batch * t.sequence_length == 1:
        raise UserError(
            f"config.train.sequence_length=1 with batch_size {t.batch_size} / accumulation "
            f"{t.accumulation} = 1 sequence trains on one token at a time, which JAX cannot lay "
            f"out. Set config.train.sequence_length to 2 or more."
        )
    if t.sequence_length <= m.num_nextn_predict_layers:
        raise UserError(
            f"config.train.sequence_length={t.sequence_length} leaves no target for config.model.num_nextn_predict_layers="
            f"{m.num_nextn_predict_layers}. Raise the first."
        )
    _choice("config.train.dtype", t.dtype, DTYPES)
    _validate_loss_scale(config)
    _validate_accumulation(config)
    _choice("config.train.attention", t.attention, ("auto", "blocks", "cudnn"))
    if t.attention == "cudnn":
        _validate_cudnn(m, t.dtype)
    if t.remat.startswith("save:"):
        for name in t.remat.removeprefix("save:").split(","):
            _choice("config.train.remat=save:", name, REMAT_NAMES)
    else:
        _choice(
            "config.train.remat", t.remat, ("none", "dots", "full", "exchange", "save:NAME,NAME...")
        )
    _validate_offload(config)
    _validate_optimizer(o)
    _choice(
        "config.optimizer.schedule",
        o.schedule,
        ("constant", "cosine", "wsd", "deepseek_v2", "deepseek_v3"),
    )
    if not (math.isfinite(o.learning_rate) and o.learning_rate > 0):
        raise UserError(
            f"config.optimizer.learning_rate={o.learning_rate} is not a positive finite number. Set it to, for instance, 1e-3."
        )
    for where, section, name in (
        ("optimizer", o, "decay_fraction"),
        ("optimizer", o, "final_fraction"),
        ("train", t, "mtp_switch_fraction"),
        ("moe", config.moe, "bias_update_fraction"),
    ):
        if not 0 <= getattr(section, name) <= 1:
            raise UserError(
                f"config.{where}.{name}={getattr(section, name)} is not a share. Set it between 0 and 1."
            )
    _at_least(
        o,
        "optimizer",
        0,
        "b1",
        "b2",
        "momentum",
        "eps",
        "weight_decay",
        "grad_clip",
        "warmup_steps",
    )
    for name in ("b1", "b2", "momentum"):
        if getattr(o, name) >= 1:
            raise UserError(
                f"config.optimizer.{name}={getattr(o, name)} must be below 1. Set it to, for instance, 0.9."
            )
    _validate_checkpoint(config)
    if config.data.special_tokens and config.data.tokenizer == "bytes":
        raise UserError(
            "config.data.special_tokens=True has no effect with config.data.tokenizer=bytes, "
            "which has none that text could spell. "
            "Set config.data.tokenizer to a tokenizer.json, or special_tokens=False."
        )
    _choice("config.data.bin_dtype", config.data.bin_dtype, ("uint16", "uint32"))
    _choice("config.data.on_change", config.data.on_change, ("refuse", "new_pass"))
    if not 0 <= config.data.eval_fraction < 1:
        raise UserError(
            f"config.data.eval_fraction={config.data.eval_fraction} is not a share. Set it between 0 (no evaluation) and 1."
        )
    _at_least(config.eval, "eval", 0, "every_steps", "batches", "sample_tokens")
    _at_least(config.profile, "profile", 0, "start")
    _at_least(config.profile, "profile", 1, "steps")
    if config.profile.start > t.steps:
        raise UserError(
            f"config.profile.start={config.profile.start} is after the last step, config.train.steps={t.steps}. Lower it."
        )
    _at_least(config.log, "log", 1, "every_steps")
    _at_least(config.log, "log", 0, "peak_tflops")


def _validate_checkpoint(config: Config) -> None:
    c = config.checkpoint
    _choice("config.checkpoint.kind", c.kind, CHECKPOINT_KINDS)
    _at_least(c, "checkpoint", 0, "every_steps", "every_minutes", "keep", "keep_best", "keep_every")
    if not math.isfinite(c.every_minutes):
        raise UserError(
            f"config.checkpoint.every_minutes={c.every_minutes} is no time. Set it to 0 for none, or to a number of minutes."
        )
    for name in ("keep_best", "keep_every"):
        if getattr(c, name) and not c.keep:
            raise UserError(
                f"config.checkpoint.{name}={getattr(c, name)} has no effect with config.checkpoint.keep=0, which keeps all. "
                f"Set config.checkpoint.keep to how many of the newest stay, or {name}=0."
            )
    if c.keep_best and not (config.data.eval_fraction and config.eval.batches):
        raise UserError(
            f"config.checkpoint.keep_best={c.keep_best} needs held-out text, but config.data.eval_fraction="
            f"{config.data.eval_fraction} and config.eval.batches={config.eval.batches}. Set both above 0, or keep_best=0."
        )
    if c.kind == "local" and not c.local_dir:
        raise UserError(
            "config.checkpoint.kind=local and config.checkpoint.local_dir='': it needs a folder on each host's own disk. "
            "Set config.checkpoint.local_dir, or config.checkpoint.kind=sharded."
        )
    if c.take_over and not c.dir:
        raise UserError(
            "config.checkpoint.take_over=True has no effect without config.checkpoint.dir, the "
            "folder to take over. Set both, or neither."
        )
    if "://" in c.local_dir:
        raise UserError(
            f"config.checkpoint.local_dir={c.local_dir} is remote. Name a folder on each host's own disk, or set checkpoint.dir instead."
        )


def _validate_compression(config: Config) -> None:
    """What needs no mesh; parallel/mesh.py checks the axes."""
    s = config.sharding
    _choice("config.sharding.gradient_compression", s.gradient_compression, GRADIENT_COMPRESSIONS)
    if s.gradient_compression != "none" and s.canonical in ("full_shard", "shard_grad_op"):
        raise UserError(
            f"config.sharding.gradient_compression={s.gradient_compression} is of the sum over replicas, but "
            f"config.sharding.strategy={s.strategy} has none: it divides gradients over mesh.data. "
            f"Set config.sharding.strategy=hybrid_shard, or gradient_compression=none."
        )


def _validate_optimizer(o: OptimizerConfig) -> None:
    _choice("config.optimizer.name", o.name, ("adamw", "adafactor", "muon"))
    _choice("config.optimizer.moment_dtype", o.moment_dtype, ("float32", "bfloat16"))
    default = OptimizerConfig()
    for name, users in (
        ("b1", ("adamw", "muon")),
        ("b2", ("adamw", "muon")),
        ("eps", ("adamw", "muon")),
        ("moment_dtype", ("adamw", "muon")),
        ("momentum", ("muon",)),
        ("scale_parameter", ("adafactor",)),
    ):
        if o.name not in users and getattr(o, name) != getattr(default, name):
            raise UserError(
                f"config.optimizer.{name}={getattr(o, name)} has no effect with config.optimizer.name={o.name}. "
                f"Set it to {getattr(default, name)}, its default, or config.optimizer.name={users[0]}."
            )
    # A moment changes by (1 - b) of itself a step; bfloat16's numbers are up to 2^-7 of themselves apart, and half of that rounds to nothing.
    for name in ("b1", "b2", *(("momentum",) if o.name == "muon" else ())):
        if o.moment_dtype == "bfloat16" and 1 - getattr(o, name) <= 2**-8:
            raise UserError(
                f"config.optimizer.{name}={getattr(o, name)} and config.optimizer.moment_dtype=bfloat16: a moment would change too "
                f"little in a step to be stored in 8 bits, and never fall. Set {name} below {1 - 2**-8:.4f}, or moment_dtype to float32."
            )


def _validate_loss_scale(config: Config) -> None:
    f, default = config.fp16, Fp16Config()
    _at_least(f, "fp16", 0, "loss_scale", "initial_scale_power")
    _at_least(f, "fp16", 1, "loss_scale_window", "hysteresis", "min_loss_scale")
    for name in (
        "loss_scale",
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "min_loss_scale",
    ):
        value, usual = getattr(f, name), getattr(default, name)
        if value != usual and config.train.dtype != "float16":
            raise UserError(
                f"config.fp16.{name}={value} has no effect with config.train.dtype={config.train.dtype}, which needs no loss scale. "
                f"Set it to {usual}, its default, or config.train.dtype=float16."
            )
        if value != usual and name != "loss_scale" and f.loss_scale:
            raise UserError(
                f"config.fp16.{name}={value} has no effect with the fixed config.fp16.loss_scale={f.loss_scale}. "
                f"Set it to {usual}, its default, or config.fp16.loss_scale=0 for a dynamic scale."
            )
    if f.initial_scale_power > 32:
        raise UserError(
            f"config.fp16.initial_scale_power={f.initial_scale_power} is above 32, where the scale ends. Set it to 32 or less."
        )
    if f.min_loss_scale > 2.0**f.initial_scale_power:
        raise UserError(
            f"config.fp16.min_loss_scale={f.min_loss_scale} is above the first scale, 2 to the power of config.fp16.initial_scale_power="
            f"{f.initial_scale_power}. Set it to {2.0**f.initial_scale_power:g} or less."
        )


def _validate_accumulation(config: Config) -> None:
    t = config.train
    _choice("config.train.accumulation_dtype", t.accumulation_dtype, ("float32", "bfloat16"))
    if t.accumulation_dtype == "float32":
        return
    if t.accumulation == 1:
        raise UserError(
            f"config.train.accumulation_dtype={t.accumulation_dtype} has no effect with config.train.accumulation=1: one micro-batch "
            f"needs no buffer. Set config.train.accumulation_dtype=float32, or more micro-batches."
        )
    if config.mesh.stage != 1:
        raise UserError(
            f"config.train.accumulation_dtype={t.accumulation_dtype} has no effect with config.mesh.stage={config.mesh.stage}: stages "
            f"add up the gradients of micro-batches in their backward pass. Set config.train.accumulation_dtype=float32."
        )


def _validate_offload(config: Config) -> None:
    o, remat, stages, strategy = (
        config.offload,
        config.train.remat,
        config.mesh.stage,
        config.sharding.strategy,
    )
    if o.parameters and config.sharding.canonical in ("shard_grad_op", "zero1"):
        raise UserError(
            f"config.offload.parameters=True and config.sharding.strategy={strategy}: that strategy keeps every weight whole on every "
            f"device. Set config.sharding.strategy=full_shard, or config.offload.parameters=False."
        )
    if o.parameters and stages != 1:
        raise UserError(
            f"config.offload.parameters=True and config.mesh.stage={stages}: a pipeline brings all its layers to their stages at once. "
            f"Set config.mesh.stage=1, or config.offload.parameters=False."
        )
    if o.parameters and remat == "none":
        raise UserError(
            "config.offload.parameters=True and config.train.remat=none: without recomputation the layers' weights all stay on the "
            "device for backward. Set config.train.remat to full or save:..., or config.offload.parameters=False."
        )
    for name, value, wanted in (
        ("train.dtype", config.train.dtype, "bfloat16 or float32"),
        ("train.accumulation_dtype", config.train.accumulation_dtype, "float32"),
        ("sharding.gradient_compression", config.sharding.gradient_compression, "none"),
    ):
        if o.parameters and value not in wanted.split(" or "):
            raise UserError(
                f"config.offload.parameters=True and config.{name}={value}: gradients in the host's memory cannot be converted there. "
                f"Set config.{name} to {wanted}, or config.offload.parameters=False."
            )
    if not o.activations:
        return
    names = o.activations.split(",")
    for name in names:
        _choice("config.offload.activations", name, REMAT_NAMES)
    if remat in ("none", "dots", "exchange"):
        raise UserError(
            f"config.offload.activations={o.activations} and config.train.remat={remat}: what is offloaded is named in place of what is "
            f"recomputed. Set config.train.remat to full, or to save:... for what stays on the device."
        )
    if both := [name for name in names if name in remat.removeprefix("save:").split(",")]:
        raise UserError(
            f"config.offload.activations={o.activations} and config.train.remat={remat} both name {both[0]}, which can only be in one "
            f"place. Leave it out of one of them."
        )


def _validate_model(m: ModelConfig) -> None:
    _at_least(
        m,
        "model",
        1,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "max_position_embeddings",
    )
    _at_least(
        m,
        "model",
        0,
        "first_k_dense_replace",
        "n_shared_experts",
        "aux_loss_alpha",
        "num_nextn_predict_layers",
        "rms_norm_eps",
        "initializer_range",
    )
    _choice("config.model.scoring_func", m.scoring_func, ("sigmoid", "softmax"))
    _choice(
        "config.model.topk_method", m.topk_method, ("noaux_tc", "greedy", "group_limited_greedy")
    )
    _choice(
        "config.model.rope_scaling.type",
        m.rope_scaling.type,
        ("default", "linear", "yarn", "llama3"),
    )
    if m.qk_rope_head_dim % 2:
        raise UserError(
            f"config.model.qk_rope_head_dim={m.qk_rope_head_dim} is odd, but rotation works on pairs. Set it to an even number."
        )
    _validate_grouped_query(m)
    if m.first_k_dense_replace > m.num_hidden_layers:
        raise UserError(
            f"config.model.first_k_dense_replace={m.first_k_dense_replace} is above config.model.num_hidden_layers="
            f"{m.num_hidden_layers}. Set it to {m.num_hidden_layers} or less."
        )
    _divides(m.n_group, "config.model.n_group", m.n_routed_experts, "config.model.n_routed_experts")
    if m.topk_group > m.n_group:
        raise UserError(
            f"config.model.topk_group={m.topk_group} is above config.model.n_group={m.n_group}. Set it to {m.n_group} or less."
        )
    reachable = (
        m.n_routed_experts
        if m.topk_method == "greedy"
        else m.topk_group * (m.n_routed_experts // m.n_group)
    )
    if m.num_experts_per_tok > reachable:
        raise UserError(
            f"config.model.num_experts_per_tok={m.num_experts_per_tok} is above the {reachable} experts a token may choose from "
            f"(n_routed_experts={m.n_routed_experts}, topk_group={m.topk_group} of n_group={m.n_group}). Set it to {reachable} or less."
        )
    if m.topk_method == "noaux_tc" and m.n_group > 1 and m.n_routed_experts // m.n_group < 2:
        raise UserError(
            f"config.model.n_group={m.n_group} leaves one expert a group, but topk_method=noaux_tc sums the top two. "
            f"Set n_group to at most {m.n_routed_experts // 2}."
        )
    if not (math.isfinite(m.rope_theta) and m.rope_theta > 1):
        raise UserError(
            f"config.model.rope_theta={m.rope_theta} is not a finite number above 1. Set it to, for instance, 10000."
        )
    if not (math.isfinite(m.routed_scaling_factor) and m.routed_scaling_factor > 0):
        raise UserError(
            f"config.model.routed_scaling_factor={m.routed_scaling_factor} is not a positive finite number. "
            f"Set it to, for instance, 1.0."
        )
    r = m.rope_scaling
    _at_least(r, "model.rope_scaling", 1, "factor", "original_max_position_embeddings")
    _at_least(r, "model.rope_scaling", 0, "mscale", "mscale_all_dim", "attention_factor")
    if r.type == "llama3" and not (
        math.isfinite(r.high_freq_factor) and 0 < r.low_freq_factor < r.high_freq_factor
    ):
        raise UserError(
            f"config.model.rope_scaling.low_freq_factor={r.low_freq_factor} and high_freq_factor={r.high_freq_factor} are not two "
            f"positive numbers, the first below the second. Set them to, for instance, 1 and 4."
        )
    if not (math.isfinite(r.beta_fast) and 0 < r.beta_slow <= r.beta_fast):
        raise UserError(
            f"config.model.rope_scaling.beta_fast={r.beta_fast} and beta_slow={r.beta_slow} are not two positive "
            f"numbers, the first at least the second. Set them to, for instance, 32 and 1."
        )


def _validate_grouped_query(m: ModelConfig) -> None:
    _at_least(m, "model", 1, "num_key_value_heads", "head_dim")
    if m.attention_kind != "grouped_query":
        default = ModelConfig()
        for name in (
            "head_dim",
            "attention_bias",
            "attention_out_bias",
            "use_qk_norm",
            "partial_rotary_factor",
        ):
            if getattr(m, name) != getattr(default, name):
                raise UserError(
                    f"config.model.{name}={getattr(m, name)} is of grouped-query attention, and config.model.num_key_value_heads=None "
                    f"means multi-head latent attention. Set num_key_value_heads, or {name} to {getattr(default, name)}."
                )
        return
    _divides(
        m.num_key_value_heads,
        "config.model.num_key_value_heads",
        m.num_attention_heads,
        "config.model.num_attention_heads",
    )
    if m.head_dim is None:
        _divides(
            m.num_attention_heads,
            "config.model.num_attention_heads",
            m.hidden_size,
            "config.model.hidden_size",
        )
    if not 0 < m.partial_rotary_factor <= 1 or m.rotary_dim % 2 or not m.rotary_dim:
        raise UserError(
            f"config.model.partial_rotary_factor={m.partial_rotary_factor} rotates {m.rotary_dim} of a head's {m.qk_head_dim} numbers, "
            f"which must be an even number above 0. Set it to, for instance, 1.0 or 0.5, or config.model.head_dim."
        )


def _validate_cudnn(m: ModelConfig, dtype: str) -> None:
    if m.attention_kind != "mla":
        raise UserError(
            f"config.train.attention=cudnn is of multi-head latent attention in this version, and config.model.num_key_value_heads="
            f"{m.num_key_value_heads}. Set config.train.attention=auto."
        )
    if dtype != "bfloat16":
        raise UserError(
            f"config.train.attention=cudnn computes in bfloat16, and config.train.dtype={dtype}. Set config.train.attention=auto."
        )
    for name, width in (
        ("qk_nope_head_dim + qk_rope_head_dim", m.qk_nope_head_dim + m.qk_rope_head_dim),
        ("v_head_dim", m.v_head_dim),
    ):
        if width % 8 or width > 256:
            raise UserError(
                f"config.train.attention=cudnn takes head widths that are multiples of 8 up to 256, and config.model.{name} is {width}. "
                f"Set config.train.attention=auto."
            )


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(
            f"{name}={value!r} is not known. Set {name} to one of: {', '.join(allowed)}."
        )


def _at_least(section: Any, where: str, low: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not (math.isfinite(value) and value >= low):
            raise UserError(
                f"config.{where}.{name}={value} is too small or not finite. Set it to {low:g} or more."
            )


def _divides(small: int, small_name: str, large: int, large_name: str) -> None:
    if large % small:
        raise UserError(
            f"{large_name}={large} is not divisible by {small_name}={small}. Set {small_name} to a divisor of {large}."
        )
