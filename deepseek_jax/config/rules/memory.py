"""Rules between what is sharded, kept for backward, compressed and offloaded. parallel/mesh.py checks what
needs devices.
"""

from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError


def check(config: Config) -> None:
    """Raises UserError: the first options that do not go together."""
    s = config.sharding
    if s.gradient_compression != "none" and s.canonical in ("full_shard", "shard_grad_op"):
        raise UserError(
            f"config.sharding.gradient_compression={s.gradient_compression} is of the sum over replicas, but "
            f"config.sharding.strategy={s.strategy} has none: it divides gradients over mesh.data. "
            f"Set config.sharding.strategy=hybrid_shard, or gradient_compression=none."
        )
    if config.offload.parameters:
        _check_offloaded_parameters(config)
    if config.offload.activations:
        _check_offloaded_activations(config)


def _check_offloaded_parameters(config: Config) -> None:
    strategy, stages = config.sharding.strategy, config.mesh.stage
    if config.esft.experts:
        raise UserError(
            f"config.offload.parameters=True and config.esft.experts={config.esft.experts}: the experts that "
            "learn are written among all of them on the device. Set config.offload.parameters=False."
        )
    if config.sharding.canonical in ("shard_grad_op", "zero1"):
        raise UserError(
            f"config.offload.parameters=True and config.sharding.strategy={strategy}: that strategy "
            "keeps every weight "
            "whole on every device. Set config.sharding.strategy=full_shard, or "
            "config.offload.parameters=False."
        )
    if stages != 1:
        raise UserError(
            f"config.offload.parameters=True and config.mesh.stage={stages}: a pipeline brings all its "
            "layers to their "
            f"stages at once. Set config.mesh.stage=1, or config.offload.parameters=False."
        )
    if config.train.remat == "none":
        raise UserError(
            "config.offload.parameters=True and config.train.remat=none: without recomputation the "
            "layers' weights all stay "
            "on the device for backward. Set config.train.remat to full or save:..., or "
            "config.offload.parameters=False."
        )
    for name, value, wanted in (
        ("train.dtype", config.train.dtype, "bfloat16 or float32"),
        ("train.accumulation_dtype", config.train.accumulation_dtype, "float32"),
        ("sharding.gradient_compression", config.sharding.gradient_compression, "none"),
    ):
        if value not in wanted.split(" or "):
            raise UserError(
                f"config.offload.parameters=True and config.{name}={value}: gradients in the host's "
                "memory cannot be "
                f"converted there. Set config.{name} to {wanted}, or config.offload.parameters=False."
            )


def _check_offloaded_activations(config: Config) -> None:
    activations, remat = config.offload.activations, config.train.remat
    if remat in ("none", "dots", "exchange"):
        raise UserError(
            f"config.offload.activations={activations} and config.train.remat={remat}: what is offloaded "
            "is named in place "
            "of what is recomputed. Set config.train.remat to full, or to save:... for what stays on "
            "the device."
        )
    saved = remat.removeprefix("save:").split(",")
    if both := [name for name in activations.split(",") if name in saved]:
        raise UserError(
            f"config.offload.activations={activations} and config.train.remat={remat} both name "
            f"{both[0]}, which can only be "
            f"in one place. Leave it out of one of them."
        )
