"""Where things lie: the mesh, what is divided over it, and what is offloaded to the host."""

from dataclasses import dataclass

from deepseek_jax.config.option import NAMES, Alias, option
from deepseek_jax.config.sections.training import REMAT_NAMES

DEVICES_LEFT = {-1: "the devices that the other axes leave"}
SECOND_WORDS = {"zero3": "full_shard", "zero2": "shard_grad_op", "ddp": "no_shard"}


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis, outermost first. One axis may be -1: it takes the devices that are left."""

    data: int = option(
        1,
        "Under hybrid_shard the replicas (across nodes), which share the batch only; other strategies "
        "shard over "
        "this axis as over fsdp.",
        unit="devices",
        at_least=1,
        special=DEVICES_LEFT,
        on_resume="free",
    )
    stage: int = option(
        1,
        "Layers over stages, in order; the micro-batches of train.accumulation go through them as a "
        "pipeline.",
        unit="devices",
        at_least=1,
        special=DEVICES_LEFT,
        on_resume="free",
        aliases=[
            Alias(
                nemo="pipeline_model_parallel_size",
                fsdp="block-level sharding",
                note="with `train.accumulation` micro-batches",
            )
        ],
    )
    fsdp: int = option(
        -1,
        "What the strategy shards is divided over this axis, over expert and, but for hybrid_shard, over "
        "data.",
        unit="devices",
        at_least=1,
        special=DEVICES_LEFT,
        on_resume="free",
    )
    expert: int = option(
        1,
        "Experts are divided over this axis; it must divide n_routed_experts.",
        unit="devices",
        at_least=1,
        special=DEVICES_LEFT,
        on_resume="free",
        aliases=[
            Alias(
                nemo="expert_model_parallel_size",
                deepspeed="ep_size",
                fsdp="expert-level sharding",
            )
        ],
    )
    context: int = option(
        1,
        "Sequence sharding: not in this version, must be 1.",
        unit="devices",
        on_resume="free",
        aliases=[Alias(nemo="context_parallel_size", note="1 only in this version")],
    )
    tensor: int = option(
        1,
        "Attention heads, feed-forward and expert widths and the vocabulary are divided over this axis.",
        unit="devices",
        at_least=1,
        special=DEVICES_LEFT,
        on_resume="free",
        aliases={"nemo": "tensor_model_parallel_size"},
    )


@dataclass(frozen=True)
class ShardingConfig:
    """How parameters, gradients and optimizer state are divided, in the words of FSDP and ZeRO."""

    strategy: str = option(
        "full_shard",
        "What is divided over devices.",
        choices={
            "full_shard": "parameters, gradients and optimizer state",
            "shard_grad_op": "gradients and optimizer state",
            "zero1": "optimizer state",
            "hybrid_shard": "as full_shard within a replica; mesh.data holds replicas",
            "no_shard": "nothing",
        },
        synonyms=SECOND_WORDS,
        any_case=True,
        on_resume="free",
        aliases=[
            Alias(
                "full_shard",
                fsdp="FULL_SHARD",
                deepspeed="zero_optimization.stage: 3",
                hf=("fsdp: full_shard", "fsdp_sharding_strategy: FULL_SHARD", "zero_stage: 3"),
                mfc="training.fsdp: full_shard",
                note="the default; also `zero3`",
            ),
            Alias(
                "shard_grad_op",
                fsdp="SHARD_GRAD_OP",
                deepspeed="zero_optimization.stage: 2",
                hf=(
                    "fsdp: shard_grad_op",
                    "fsdp_sharding_strategy: SHARD_GRAD_OP",
                    "zero_stage: 2",
                ),
                note="also `zero2`; as in ZeRO-2, weights are whole between steps, too",
            ),
            Alias("zero1", deepspeed="zero_optimization.stage: 1", hf="zero_stage: 1"),
            Alias(
                "hybrid_shard",
                fsdp="HYBRID_SHARD",
                hf=("fsdp: hybrid_shard", "fsdp_sharding_strategy: HYBRID_SHARD"),
                note="full shard within a node, replicas across: "
                "with `--config.mesh.data=NODES --config.mesh.fsdp=GPUS_PER_NODE`",
            ),
            Alias(
                "no_shard",
                fsdp=("NO_SHARD", "DistributedDataParallel"),
                deepspeed="zero_optimization.stage: 0",
                nemo="strategy: ddp",
                hf=("fsdp: no_shard", "fsdp_sharding_strategy: NO_SHARD"),
                note="also `ddp`",
            ),
        ],
    )
    min_weight_size: int = option(
        2048,
        "Weights with fewer elements per layer stay whole.",
        unit="elements",
        at_least=0,
        on_resume="free",
        aliases=[
            Alias(
                deepspeed="zero_optimization.stage3_param_persistence_threshold",
                note="smaller weights stay whole",
            )
        ],
    )
    virtual_stages: int = option(
        0,
        "Virtual stages per stage, visited in turn (interleaved pipeline); more of them shrink the bubble.",
        unit="virtual stages",
        at_least=0,
        special={0: "chosen"},
        on_resume="free",
        aliases=[
            Alias(nemo="virtual_pipeline_model_parallel_size", note="0: chosen"),
        ],
    )
    forward_prefetch: bool = option(
        True,
        "GPU: gather the next layer's weights while this one computes (XLA has one switch for both passes).",
        on_resume="free",
        aliases=[Alias(fsdp="forward_prefetch", hf="fsdp_forward_prefetch", note="on GPUs")],
    )
    backward_prefetch: str = option(
        "pre",
        "GPU: what of the neighbouring layers is exchanged while one computes backward.",
        choices={
            "pre": "gather ahead, reduce behind",
            "post": "reduce gradients while the next layer computes",
            "none": "nothing",
        },
        on_resume="free",
        aliases=[
            Alias(
                "pre",
                fsdp="BACKWARD_PRE",
                hf="fsdp_backward_prefetch: BACKWARD_PRE",
                note="on GPUs",
            ),
            Alias(
                "post",
                fsdp="BACKWARD_POST",
                hf="fsdp_backward_prefetch: BACKWARD_POST",
                note="on GPUs",
            ),
            Alias("none", hf="fsdp_backward_prefetch: NO_PREFETCH", note="on GPUs"),
        ],
    )
    limit_all_gathers: bool = option(
        True,
        "GPU: one collective in flight at a time, which bounds memory and does not share links; False: "
        "up to 4.",
        on_resume="free",
        aliases=[Alias(fsdp="limit_all_gathers", hf="limit_all_gathers", note="on GPUs")],
    )
    gradient_compression: str = option(
        "none",
        "How gradients are summed over mesh.data's replicas.",
        choices={
            "none": "as they are",
            "bfloat16": "once per step, with error feedback",
            "int8": "once per step, with error feedback",
        },
        aliases=[
            Alias(
                "bfloat16",
                fsdp="bf16_compress_hook",
                note="between the replicas of `no_shard`, `zero1` and `hybrid_shard`, with error "
                "feedback; also `int8`",
            ),
            Alias(
                "int8",
                deepspeed="zero_optimization.zero_quantized_gradients: true",
                also={"sharding.strategy": "hybrid_shard"},
                note="sends int8 between nodes; no counterpart where gradients are divided over `mesh.data`",
            ),
        ],
    )

    @property
    def canonical(self) -> str:
        """The strategy's FSDP name; zero1 has none and keeps its own."""
        name = self.strategy.lower()
        return SECOND_WORDS.get(name, name)


@dataclass(frozen=True)
class OffloadConfig:
    """What lies in the host's memory (`pinned_host`) while the device does not work on it. Losses stay the
    same.
    """

    optimizer_state: bool = option(
        False,
        "The optimizer's moments; the update brings them to the device one layer at a time.",
        on_resume="free",
        aliases=[
            Alias(True, deepspeed="zero_optimization.offload_optimizer.device: cpu"),
        ],
    )
    parameters: bool = option(
        False,
        "float32 weights and gradients of stacked layers; forward, backward and update bring one layer "
        "at a time.",
        on_resume="free",
        aliases=[
            Alias(
                True,
                deepspeed="zero_optimization.offload_param.device: cpu",
                note="one layer at a time on the device",
            ),
            Alias(
                True,
                fsdp="CPUOffload(offload_params=True)",
                hf="fsdp_offload_params: true",
                also={"offload.optimizer_state": True},
                note="its optimizer lies where the parameters do",
            ),
        ],
    )
    activations: str = option(
        "",
        "What a layer keeps for backward on the host; needs train.remat=full or save:NAME,...",
        choices={"": "nothing", NAMES: "names as in train.remat=save:NAME,..."},
        names=REMAT_NAMES,
        on_resume="free",
        aliases=[Alias(fsdp="offload_wrapper", note="activation offloading, by `NAME,...`")],
    )
