"""Rules between the options of steps, batch and numbers."""

from deepseek_jax.config.options import Config, of
from deepseek_jax.config.rules.common import divides, without_effect
from deepseek_jax.errors import UserError

OF_DYNAMIC_SCALE = (
    "fp16.initial_scale_power",
    "fp16.loss_scale_window",
    "fp16.hysteresis",
    "fp16.min_loss_scale",
)


def check(config: Config) -> None:
    """Raises UserError: the first options that do not go together."""
    t = config.train
    if not t.steps and not t.epochs and not config.distill.stages:
        raise UserError(
            "config.train.steps=0 and config.train.epochs=0.0: a run needs an end. Set "
            "config.train.steps, or config.train.epochs to the passes over the data."
        )
    if config.mesh.context != 1:
        raise UserError(
            f"config.mesh.context={config.mesh.context} is not in this version. Set config.mesh.context=1."
        )
    if t.on_bad_steps == "stop":
        without_effect(
            config,
            ["train.max_rollbacks"],
            "with config.train.on_bad_steps=stop",
            "config.train.on_bad_steps=rollback",
        )
    _check_batch(config)
    _check_sequence(config)
    _check_loss_scale(config)
    _check_accumulation_dtype(config)
    _check_attention(config)
    _check_fp8(config)
    if config.data.special_tokens and config.data.tokenizer == "bytes":
        raise UserError(
            "config.data.special_tokens=True has no effect with config.data.tokenizer=bytes, "
            "which has none that text could spell. "
            "Set config.data.tokenizer to a tokenizer.json, or special_tokens=False."
        )
    if t.steps and config.profile.start > t.steps and not config.distill.stages:
        raise UserError(
            f"config.profile.start={config.profile.start} is after the last step, "
            f"config.train.steps={t.steps}. Lower it."
        )


def _check_batch(config: Config) -> None:
    t = config.train
    if bool(t.batch_ramp_start) != bool(t.batch_ramp_steps):
        raise UserError(
            f"config.train.batch_ramp_start={t.batch_ramp_start} and "
            f"config.train.batch_ramp_steps={t.batch_ramp_steps} go "
            f"together. Set both, or both to 0 for no ramp."
        )
    divides(config, "train.accumulation", "train.batch_size")
    micro = config.micro_batch
    if t.batch_ramp_start % micro or t.batch_ramp_start > t.batch_size:
        raise UserError(
            f"config.train.batch_ramp_start={t.batch_ramp_start} is not a multiple of the micro-batch "
            f"({micro} sequences = "
            f"batch_size {t.batch_size} / accumulation {t.accumulation}) up to batch_size. Set it to a "
            f"multiple of {micro}."
        )


def _check_sequence(config: Config) -> None:
    t, m = config.train, config.model
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
            f"config.train.sequence_length={t.sequence_length} leaves no target for "
            "config.model.num_nextn_predict_layers="
            f"{m.num_nextn_predict_layers}. Raise the first."
        )


def _check_loss_scale(config: Config) -> None:
    f, dtype = config.fp16, config.train.dtype
    if dtype != "float16":
        without_effect(
            config,
            ("fp16.loss_scale", *OF_DYNAMIC_SCALE),
            f"with config.train.dtype={dtype}, which needs no loss scale",
            "config.train.dtype=float16",
        )
    if f.loss_scale:
        without_effect(
            config,
            OF_DYNAMIC_SCALE,
            f"with the fixed config.fp16.loss_scale={f.loss_scale}",
            "config.fp16.loss_scale=0 for a dynamic scale",
        )
    if f.min_loss_scale > 2.0**f.initial_scale_power:
        raise UserError(
            f"config.fp16.min_loss_scale={f.min_loss_scale} is above the first scale, 2 to the power of "
            f"config.fp16.initial_scale_power={f.initial_scale_power}. Set it to "
            f"{2.0**f.initial_scale_power:g} or less."
        )


def _check_accumulation_dtype(config: Config) -> None:
    t = config.train
    if t.accumulation_dtype == of("train.accumulation_dtype").default:
        return
    if t.accumulation == 1:
        raise UserError(
            f"config.train.accumulation_dtype={t.accumulation_dtype} has no effect with "
            "config.train.accumulation=1: one "
            "micro-batch needs no buffer. Set config.train.accumulation_dtype=float32, or more "
            "micro-batches."
        )
    if config.mesh.stage != 1:
        raise UserError(
            f"config.train.accumulation_dtype={t.accumulation_dtype} has no effect with config.mesh.stage="
            f"{config.mesh.stage}: stages add up the gradients of micro-batches in their backward pass. "
            f"Set config.train.accumulation_dtype=float32."
        )


def _check_fp8(config: Config) -> None:
    fp8, dtype = config.train.fp8, config.train.dtype
    if fp8 == "none":
        without_effect(
            config,
            ["moe.fp8_dispatch"],
            "with config.train.fp8=none: tokens would lose bits that products keep",
            "config.train.fp8=row",
        )
        return
    if not config.model.has_experts:
        without_effect(
            config,
            ["train.fp8"],
            "on a model without routed experts",
            "config.model.n_routed_experts",
        )
    if dtype == "float16":
        raise UserError(
            f"config.train.fp8={fp8} and config.train.dtype=float16: a row's scale does not fit the range of "
            f"float16. Set config.train.dtype=bfloat16, or config.train.fp8=none."
        )
    if config.lora.r and config.lora.base_dtype in ("int8", "nf4"):
        raise UserError(
            f"config.train.fp8={fp8} and config.lora.base_dtype={config.lora.base_dtype}: weights would be "
            f"rounded twice. Set config.lora.base_dtype=bfloat16, or config.train.fp8=none."
        )


def _check_attention(config: Config) -> None:
    """What cuDNN's kernel can do."""
    m, repair = config.model, "Set config.train.attention=auto."
    if config.train.attention != "cudnn":
        return
    if m.attention_kind != "mla":
        raise UserError(
            f"config.train.attention=cudnn is of multi-head latent attention in this version, and "
            f"config.model.num_key_value_heads={m.num_key_value_heads}. {repair}"
        )
    if config.train.dtype != "bfloat16":
        raise UserError(
            "config.train.attention=cudnn computes in bfloat16, and "
            f"config.train.dtype={config.train.dtype}. {repair}"
        )
    for name, width in (
        ("qk_nope_head_dim + qk_rope_head_dim", m.qk_nope_head_dim + m.qk_rope_head_dim),
        ("v_head_dim", m.v_head_dim),
    ):
        if width % 8 or width > 256:
            raise UserError(
                "config.train.attention=cudnn takes head widths that are multiples of 8 up to 256, and "
                f"config.model.{name} "
                f"is {width}. {repair}"
            )
