"""Every option once: its name, type, default, unit and effect.

These frozen dataclasses are what all the code reads. configdict.py makes the `ml_collections.ConfigDict` of them that `configs/*.py` and flags
change, and reads it back; validation.py checks their values.

Model options are Hugging Face `config.json` keys with their Hugging Face meaning; `None` and 0 mean "off" as noted.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from deepseek_jax.config.attention_shape import AttentionShape, attention_shape

IGNORE = -100  # target id of a position that predicts nothing, as in Hugging Face


@dataclass(frozen=True)
class RopeScaling:
    """Hugging Face `rope_scaling`. YaRN: Peng et al. 2023, arXiv:2309.00071."""

    type: str = "default"  # default | linear (positions divided by factor) | yarn | llama3 (by wavelength, Llama 3.1)
    factor: float = 1.0  # context extension: target length / original_max_position_embeddings
    original_max_position_embeddings: int = 4096  # context length before the extension, in tokens
    beta_fast: float = 32.0  # rotations above which a frequency is kept as it is
    beta_slow: float = 1.0  # rotations below which a frequency is divided by `factor`
    mscale: float = 0.0  # 0: not given. cos and sin are scaled by m(mscale) / m(mscale_all_dim)
    mscale_all_dim: float = (
        0.0  # 0: not given. The softmax scale of MLA is multiplied by m(mscale_all_dim)^2
    )
    attention_factor: float = (
        0.0  # yarn: cos and sin are scaled by this; 0: by what mscale and mscale_all_dim give
    )
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_max_position_embeddings / this are divided by `factor`
    high_freq_factor: float = 4.0  # llama3: wavelengths below original_max_position_embeddings / this stay; between, both are mixed


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, in the keys of a Hugging Face `config.json`, DeepSeek's where families differ."""

    vocab_size: int = 320  # rows of the embedding; token ids run from 0 to vocab_size - 1
    hidden_size: int = 256
    intermediate_size: int = 768  # SwiGLU width of the dense layers
    moe_intermediate_size: int = (
        192  # SwiGLU width of one routed expert; the shared experts have n_shared times this
    )
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    q_lora_rank: int | None = (
        None  # rank of the query compression; None or 0 projects queries directly (V2-Lite, Moonlight)
    )
    kv_lora_rank: int = 128  # rank of the joint key-value compression: what a decoding cache holds, with the rope part
    qk_nope_head_dim: int = 32  # width per head of the part of q and k that carries no position
    qk_rope_head_dim: int = 16  # width per head of the rotated part; its key is shared by all heads
    v_head_dim: int = 32
    num_key_value_heads: int | None = (
        None  # heads of keys and values of grouped-query attention (Llama, Qwen, GLM, Mixtral); None or 0: MLA
    )
    head_dim: int | None = (
        None  # grouped-query attention: width of a head; None or 0: hidden_size / num_attention_heads
    )
    attention_bias: bool = False  # grouped-query attention: q, k and v have biases
    attention_out_bias: bool = False  # grouped-query attention: the output projection has a bias
    use_qk_norm: bool = (
        False  # grouped-query attention: RMSNorm of every head's q and k, before rotation (Qwen3)
    )
    partial_rotary_factor: float = (
        1.0  # grouped-query attention: share of head_dim that is rotated (GLM: 0.5)
    )
    first_k_dense_replace: int = 1  # the first k layers are dense
    n_routed_experts: int = 16
    n_shared_experts: int = 1  # 0: none
    num_experts_per_tok: int = 4
    n_group: int = 1  # expert groups for group-limited routing
    topk_group: int = 1  # groups a token may choose from
    topk_method: str = "noaux_tc"  # noaux_tc (V3: selection bias, group score = sum of top two) | greedy | group_limited_greedy (V2: maximum)
    scoring_func: str = "sigmoid"  # sigmoid (V3) | softmax (V2)
    norm_topk_prob: bool = (
        True  # make the chosen experts' weights sum to one, before routed_scaling_factor
    )
    routed_scaling_factor: float = 2.5  # multiplies the routed experts' weights
    aux_loss_alpha: float = 0.0001  # weight of the balance loss; 0: off
    seq_aux: bool = (
        True  # balance loss per sequence (V2 and V3) or over the whole batch of a step (False)
    )
    num_nextn_predict_layers: int = (
        0  # multi-token prediction depth: extra layers that predict tokens further ahead
    )
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleave: bool = True  # rotate neighbouring pairs (DeepSeek) or the two halves
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    max_position_embeddings: int = 4096  # longest sequence the model is meant for, in tokens
    initializer_range: float = (
        0.02  # standard deviation of every initial weight (V2 and V3 use 0.006)
    )
    tie_word_embeddings: bool = False  # the output head is the embedding, transposed

    @property
    def attention_kind(self) -> str:
        """mla or grouped_query: which attention the options describe. Nothing else asks for it by other options."""
        return "mla" if self.num_key_value_heads is None else "grouped_query"

    @property
    def attention_shape(self) -> AttentionShape:
        """The widths of this model's attention, and what divides them."""
        return attention_shape(self)

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.attention_shape.qk_head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of a head's value."""
        return self.attention_shape.value_head_dim

    @property
    def rotary_dim(self) -> int:
        """How much of a head's query and key is rotated."""
        return self.attention_shape.rotary_dim

    @property
    def has_experts(self) -> bool:
        """Whether any layer is an MoE layer; those of multi-token prediction are."""
        return (
            self.num_hidden_layers > self.first_k_dense_replace or self.num_nextn_predict_layers > 0
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis, outermost first. One axis may be -1: it takes the devices that are left."""

    data: int = 1  # batch only under hybrid_shard, whose replicas lie along it (across nodes); other strategies shard over it as over fsdp
    stage: int = 1  # layers over stages, in order; the micro-batches of train.accumulation go through them as a pipeline
    fsdp: int = -1  # what the strategy shards is divided over this axis, over expert and, but for hybrid_shard, over data
    expert: int = 1  # experts are divided over this axis; must divide n_routed_experts
    context: int = 1  # sequence sharding: not in this version, must be 1
    tensor: int = 1  # attention heads, feed-forward and expert widths and the vocabulary are divided over this axis


@dataclass(frozen=True)
class ShardingConfig:
    strategy: str = "full_shard"  # full_shard=zero3 | shard_grad_op=zero2 | zero1 | hybrid_shard | no_shard=ddp, in either case
    min_weight_size: int = 2048  # weights with fewer elements (a layer) stay whole; DeepSpeed: stage3_param_persistence_threshold
    virtual_stages: int = 0  # pieces a stage's blocks are cut in and visited in turn (interleaved); bubbles shrink; 0: chosen
    forward_prefetch: bool = True  # GPU: gather the next layer's weights while this one computes (XLA has one switch for both passes)
    backward_prefetch: str = "pre"  # GPU: pre (gather ahead, reduce behind) | post (reduce gradients while the next layer computes) | none
    limit_all_gathers: bool = True  # GPU: one collective in flight at a time, which bounds memory and does not share links; False: up to 4
    gradient_compression: str = "none"  # of their sum over mesh.data's replicas: none | bfloat16 | int8 (once a step, with error feedback)

    @property
    def canonical(self) -> str:
        """The strategy's FSDP name; zero1 has none and keeps its own."""
        name = self.strategy.lower()
        return STRATEGY_ALIASES.get(name, name)


@dataclass(frozen=True)
class MoeConfig:
    """How tokens meet experts. None of these changes the mathematics, except dropping, the bias update and the z-loss."""

    dispatch: str = "all_to_all"  # all_to_all (send, compute, return) | all_gather (tokens to all devices) | ring (expert pipeline)
    capacity_factor: float = 1.25  # places per round = this x the mean load; overflow costs a round (none on a CPU with all experts), no token
    drop: bool = False  # drop what overflows the places of one round on its device, instead of running more rounds
    drop_policy: str = "probability"  # what drop keeps: probability (=probs; the highest router weights) | position (the earliest tokens)
    bias_update_rate: float = (
        0.001  # step of the selection bias per optimizer step (noaux_tc); 0: fixed bias
    )
    bias_update_fraction: float = (
        1.0  # the bias moves during this fraction of the steps, then is fixed (V3: 14.3/14.8)
    )
    bias_centre: bool = (
        False  # subtract the bias's mean after each update, so that it cannot drift as a whole
    )
    router_z_loss_coef: float = (
        0.0  # weight of mean(logsumexp(router logits)^2), ST-MoE arXiv:2202.08906; 0: off
    )


@dataclass(frozen=True)
class DataConfig:
    path: str = "stdlib"  # stdlib (Python's own sources) | file, folder or glob; several separated by commas
    weights: str = ""  # mixture weights of the comma-separated paths, as "0.7,0.3"; empty: by their size in tokens
    tokenizer: str = "auto"  # auto (the run's, else that of init_from or of the import, else bytes) | bytes | path of a tokenizer.json or tiktoken.model, or of the folder with it
    special_tokens: bool = False  # True: <|im_start|> and the like in the text are the tokenizer's special tokens, eos ends a document; False: text
    document_mask: bool = (
        True  # attention and positions do not cross documents packed into one sequence
    )
    eval_fraction: float = (
        0.01  # share of the documents held out for evaluation, chosen by document; 0: no evaluation
    )
    bin_dtype: str = "uint16"  # dtype of raw .bin token files without a sidecar: uint16 | uint32
    eos_token_id: int = (
        -1
    )  # document separator in token files without a sidecar; -1: the tokenizer's
    on_change: str = "refuse"  # resuming with other data, seed, sequence_length, eval_fraction or mixture: refuse | new_pass (begin a pass over them)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000  # optimizer steps
    batch_size: int = 8  # sequences a step, over the whole mesh
    sequence_length: int = 512  # tokens a sequence
    accumulation: int = 1  # micro-batches a step; divides batch_size
    batch_ramp_start: int = (
        0  # sequences a step at the start, growing linearly to batch_size; 0: no ramp
    )
    batch_ramp_steps: int = 0  # steps over which the batch grows, in whole micro-batches
    dtype: str = "bfloat16"  # compute dtype: bfloat16 | float32 | float16 (with loss scaling, config.fp16); parameters are float32
    accumulation_dtype: str = "float32"  # of the micro-batches' summed gradients: float32 | bfloat16 (2 bytes a parameter, not 4)
    remat: str = "full"  # what a layer keeps for backward: none (all but weights) | dots (matmul results) | full (nothing) | exchange | save:NAME,...
    attention: str = "auto"  # auto (= blocks) | blocks (any device) | cudnn (NVIDIA GPUs from Hopper on, bfloat16; blocks for packed rows, or if cuDNN is too old)
    mtp_loss_weight: float = 0.3  # weight of the multi-token prediction loss (V3: 0.3, then 0.1)
    mtp_loss_weight_final: float = 0.3  # the weight after mtp_switch_fraction of the steps
    mtp_switch_fraction: float = 1.0  # V3: 10/14.8
    max_bad_steps: int = 10  # so many updates skipped in a row for a non-finite loss or gradient, none while the loss scale falls, are the limit
    on_bad_steps: str = "stop"  # at that limit: stop (exit code 3) | rollback (to the last good checkpoint, and on with the data after the bad steps)
    max_rollbacks: int = 3  # more of them stop the run


@dataclass(frozen=True)
class Fp16Config:
    """Loss scaling of train.dtype=float16, in the words of DeepSpeed's `fp16` block. Other dtypes need none."""

    loss_scale: float = 0.0  # a fixed factor for the loss; 0: dynamic, found by the options below
    initial_scale_power: int = 16  # the dynamic scale starts at 2 to this power
    loss_scale_window: int = 1000  # steps without overflow after which the scale doubles
    hysteresis: int = 2  # the scale halves at the overflow of this number since it last doubled, and at every one after that
    min_loss_scale: float = (
        1.0  # the scale never falls below; overflows there count towards train.max_bad_steps
    )


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"  # adamw | adafactor (row and column means, no moments) | muon (orthogonalised momentum; norms, embedding and head: adamw)
    learning_rate: float = 1e-3  # peak
    b1: float = 0.9  # adamw's
    b2: float = 0.95  # adamw's
    eps: float = 1e-8  # adamw's
    moment_dtype: str = "float32"  # adamw's and muon's moments are stored in: float32 | bfloat16 (V3: half the state; computed in float32)
    momentum: float = 0.95  # muon's, Nesterov
    scale_parameter: bool = True  # adafactor: learning_rate is relative to a weight's root mean square (1e-2); False: absolute, as adamw's
    weight_decay: float = 0.1  # on matrices; norms and the selection bias are never decayed
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    schedule: str = (
        "cosine"  # constant | cosine | wsd (warmup-stable-decay) | deepseek_v2 | deepseek_v3
    )
    warmup_steps: int = 100  # linear from 0, at most all steps (V2 and V3: 2000)
    final_fraction: float = 0.1  # last learning rate / peak, for cosine and wsd
    decay_fraction: float = 0.2  # share of the steps that wsd decays over, linearly; for deepseek_v2, that follow the first drop


@dataclass(frozen=True)
class OffloadConfig:
    """What lies in the host's memory (`pinned_host`) while the device does not work on it. It changes memory and time, not the losses."""

    optimizer_state: bool = False  # the optimizer's moments; the update brings them to the device one layer at a time (DeepSpeed: offload_optimizer)
    parameters: bool = False  # float32 weights and gradients of stacked layers: forward, backward and update bring one at a time (offload_param)
    activations: str = ""  # names as in remat=save:NAME,NAME: what a layer keeps for backward on the host; needs remat=full or save:; empty: none


@dataclass(frozen=True)
class EvalConfig:
    every_steps: int = 250  # 0: only at the end
    batches: int = 16  # held-out batches an evaluation reads, at most
    sample_prompt: str = (
        "def "  # prompt of the sample shown at the end of training; empty: no sample
    )
    sample_tokens: int = 160  # its length


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 250  # 0: only at the end
    every_minutes: float = 0.0  # also after this many minutes since the last one; 0: only by steps
    keep: int = 3  # newest checkpoints kept; 0: all
    keep_best: int = (
        0  # beside them the N of lowest held-out loss, which is then measured at each checkpoint
    )
    keep_every: int = 0  # and those of every Nth step; 0: none
    kind: str = "sharded"  # sharded: every process its shards, asynchronously; full: whole tensors in safetensors; local: on each process's disk
    async_checkpointing: bool = True  # train on while a checkpoint is written; False: wait, so that a kill costs one interval at most, never that and a save
    dir: str = ""  # folder of the checkpoints; "": WORKDIR/checkpoints; gs:// and s3:// are taken as they are
    take_over: bool = (
        False  # go on from the checkpoints in dir though the run of another workdir wrote them
    )
    local_dir: str = ""  # of kind local: a folder on each host's own disk


@dataclass(frozen=True)
class WatchdogConfig:
    """What ends a run that does not move any more, with exit code 4 or 6, so that a launcher can start it again."""

    heartbeat_timeout: float = 60.0  # several processes: seconds without a sign of life after which one is lost; a killed one is noticed at once
    step_timeout: float = -1.0  # seconds that a step may take (compiling and saving not counted) before it counts as hung; 0: any; -1: 20 medians, at least 600


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 10  # metrics row every N steps
    spike_deviations: float = 10.0  # a loss so many robust deviations above the median of the last 100 is logged as a spike with its data; 0: none
    tensorboard: bool = True  # write TensorBoard events to WORKDIR/tensorboard
    peak_tflops: float = 0.0  # a device's peak TFLOP/s in the compute dtype, for the utilisation metric; 0: known from the GPU's name


@dataclass(frozen=True)
class CompileConfig:
    cache_dir: str = ""  # folder of compiled programs, for the next start; "": $XDG_CACHE_HOME/deepseek_jax or ~/.cache/deepseek_jax; off: none


@dataclass(frozen=True)
class ProfileConfig:
    start: int = 0  # first step to trace into WORKDIR/profile, and then to print where its time went; 0: no profile
    steps: int = 3  # how many to trace, from there on


@dataclass(frozen=True)
class Config:
    seed: int = 0  # of the weights and of the data order
    init_from: str = ""  # folder of a Hugging Face checkpoint to begin with; its config.json sets config.model; "": random weights
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fp16: Fp16Config = field(default_factory=Fp16Config)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def to_json(self) -> dict[str, Any]:
        """Nested dicts of plain values: `from_config_dict` reads them back."""
        return dataclasses.asdict(self)

    @property
    def micro_batch(self) -> int:
        """Sequences in one forward and backward pass, over the whole mesh."""
        return self.train.batch_size // self.train.accumulation

    @property
    def pipelined_blocks(self) -> int:
        """Layers that mesh.stage divides: the MoE layers, or the dense ones where there are no others.

        Dense layers in front of MoE layers belong to the entrance, with the embedding: stages share them by micro-batches.
        """
        m = self.model
        return m.num_hidden_layers - m.first_k_dense_replace or m.num_hidden_layers


# What remat=save:NAME,NAME may keep, and offload.activations may send to the host's memory; bytes a token and layer in items of the compute
# dtype, and what backward need not do again. D hidden_size, N heads, F width of the dense MLP or of the shared experts together, f that of a
# routed expert, K experts a token, c capacity_factor, X devices on mesh.expert.
REMAT_NAMES = (
    "layer_input",  # D: what every remat keeps for a layer; there is nothing to spare, but its memory to offload
    "mla_latent",  # kv_lora_rank + qk_rope_head_dim + q_lora_rank: the down-projections
    "attention",  # N v_head_dim, and N float32: attention itself, all but its products for backward
    "mlp_gate_up",  # 2 F: two of the three matmuls of dense MLP and shared experts
    "mlp_hidden",  # F: their activation function
    "exchange",  # K c D (all_to_all) or X D (all_gather, ring), where X > 1: the tokens' way to the experts
    "experts_hidden",  # 2 K c f: two of the three matmuls of the routed experts, in the first round
)
# Options that name files or folders, with the words among their values that name none; `paths.py` makes them absolute.
PATH_OPTIONS = {
    "init_from": (),
    "data.path": ("stdlib",),
    "data.tokenizer": ("auto", "bytes"),
    "checkpoint.dir": (),
    "checkpoint.local_dir": (),
    "compile.cache_dir": ("off",),
}
PATH_LISTS = ("data.path",)  # those that name several, separated by commas
STRATEGIES = ("full_shard", "shard_grad_op", "zero1", "hybrid_shard", "no_shard")
STRATEGY_ALIASES = {"zero3": "full_shard", "zero2": "shard_grad_op", "ddp": "no_shard"}

GRADIENT_COMPRESSIONS = ("none", "bfloat16", "int8")
DTYPES = ("float32", "bfloat16", "float16")  # of weights and computation
CHECKPOINT_KINDS = ("sharded", "full", "local")


def value_of(config: Config, name: str) -> Any:
    """An option by its name: "train.steps"."""
    section, _, key = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, key)


def replaced(config: Config, name: str, value: Any) -> Config:
    """The options with another value of one: "train.steps"."""
    section, _, key = name.rpartition(".")
    part = dataclasses.replace(getattr(config, section) if section else config, **{key: value})
    return dataclasses.replace(config, **{section: part}) if section else part
