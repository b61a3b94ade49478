"""The architecture, in the keys of a Hugging Face `config.json` with their meaning there."""

from dataclasses import dataclass

from deepseek_jax.config.attention_shape import AttentionShape, attention_shape
from deepseek_jax.config.option import Alias, option, section
from deepseek_jax.config.sections.rope import RopeScaling

INT32 = 2**31 - 1  # sizes that must fit XLA's 32-bit indices
GROUPED_QUERY = "Grouped-query attention:"


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, in the keys of a Hugging Face `config.json`, DeepSeek's where families differ."""

    vocab_size: int = option(
        320,
        "Rows of the embedding; token ids run from 0 to vocab_size - 1.",
        unit="ids",
        at_least=1,
        at_most=INT32,
        changes_shapes=True,
    )
    hidden_size: int = option(
        256,
        "Width of the residual stream.",
        at_least=1,
        at_most=INT32,
        changes_shapes=True,
        aliases={"nemo": "emb_dim"},
    )
    intermediate_size: int = option(
        768,
        "SwiGLU width of the dense layers.",
        at_least=1,
        at_most=INT32,
        changes_shapes=True,
        aliases={"nemo": "ffn_hidden_size"},
    )
    moe_intermediate_size: int = option(
        192,
        "SwiGLU width of one routed expert; the shared experts have n_shared_experts times this.",
        at_least=1,
        changes_shapes=True,
        aliases={"nemo": ("expert_dim", "moe_ffn_hidden_size")},
    )
    num_hidden_layers: int = option(
        6,
        "Layers, without those of multi-token prediction.",
        unit="layers",
        at_least=1,
        changes_shapes=True,
        aliases={"nemo": ("n_layers", "num_layers")},
    )
    num_attention_heads: int = option(
        8, "Heads of the queries.", unit="heads", at_least=1, changes_shapes=True
    )
    q_lora_rank: int | None = option(
        None,
        "Rank of the query compression; None projects queries directly (V2-Lite, Moonlight).",
        at_least=1,
        changes_shapes=True,
    )
    kv_lora_rank: int = option(
        128,
        "Rank of the joint key-value compression: what a decoding cache holds, with the rotated part.",
        at_least=1,
        changes_shapes=True,
    )
    qk_nope_head_dim: int = option(
        32,
        "Width per head of the part of q and k that carries no position.",
        at_least=1,
        changes_shapes=True,
        aliases={"nemo": "qk_head_dim"},
    )
    qk_rope_head_dim: int = option(
        16,
        "Width per head of the rotated part; its key is shared by all heads.",
        at_least=1,
        changes_shapes=True,
        aliases={"nemo": "qk_pos_emb_head_dim"},
    )
    v_head_dim: int = option(32, "Width of a head's value.", at_least=1, changes_shapes=True)
    num_key_value_heads: int | None = option(
        None,
        "Heads of keys and values of grouped-query attention (Llama, Qwen, GLM, Mixtral); None: MLA.",
        unit="heads",
        at_least=1,
        changes_shapes=True,
        aliases={"nemo": "num_query_groups"},
    )
    head_dim: int | None = option(
        None,
        f"{GROUPED_QUERY} width of a head; None: hidden_size / num_attention_heads.",
        at_least=1,
        changes_shapes=True,
        aliases={"nemo": "kv_channels"},
    )
    attention_bias: bool = option(
        False,
        f"{GROUPED_QUERY} q, k and v have biases.",
        changes_shapes=True,
        aliases={"nemo": "add_qkv_bias"},
    )
    attention_out_bias: bool = option(
        False, f"{GROUPED_QUERY} the output projection has a bias.", changes_shapes=True
    )
    use_qk_norm: bool = option(
        False,
        f"{GROUPED_QUERY} RMSNorm of every head's q and k, before rotation (Qwen3).",
        changes_shapes=True,
        aliases={"nemo": "qk_layernorm"},
    )
    partial_rotary_factor: float = option(
        1.0,
        f"{GROUPED_QUERY} share of head_dim that is rotated (GLM: 0.5).",
        above=0,
        at_most=1,
        example=0.5,
        changes_shapes=False,
        aliases={"nemo": "rotary_percent"},
    )
    first_k_dense_replace: int = option(
        1, "The first k layers are dense.", unit="layers", at_least=0, changes_shapes=True
    )
    n_routed_experts: int = option(
        16,
        "Routed experts of an MoE layer.",
        unit="experts",
        at_least=1,
        at_most=INT32,
        changes_shapes=True,
        aliases={
            "nemo": ("num_experts", "num_moe_experts"),
            "hf": ("num_experts", "num_local_experts"),
        },
    )
    n_shared_experts: int = option(
        1,
        "Experts of an MoE layer that every token goes through.",
        unit="experts",
        at_least=0,
        special={0: "none"},
        changes_shapes=True,
    )
    num_experts_per_tok: int = option(
        4,
        "Routed experts per token.",
        unit="experts",
        at_least=1,
        changes_shapes=False,
        aliases={"nemo": ("top_k", "moe_router_topk")},
    )
    n_group: int = option(
        1,
        "Groups of experts for group-limited routing.",
        unit="groups",
        at_least=1,
        changes_shapes=False,
        aliases={"nemo": "moe_router_num_groups"},
    )
    topk_group: int = option(
        1,
        "Groups that a token may choose experts from.",
        unit="groups",
        at_least=1,
        changes_shapes=False,
        aliases={"nemo": "moe_router_group_topk"},
    )
    topk_method: str = option(
        "noaux_tc",
        "How experts are chosen.",
        choices={
            "noaux_tc": "V3: with a selection bias; the score of a group is the sum of its top two",
            "greedy": "the highest scores",
            "group_limited_greedy": "V2: the score of a group is its maximum",
        },
        changes_shapes=True,
        aliases=[Alias("noaux_tc", nemo="moe_router_enable_expert_bias: true")],
    )
    scoring_func: str = option(
        "sigmoid",
        "What makes scores of the router's logits.",
        choices={"sigmoid": "V3", "softmax": "V2"},
        changes_shapes=False,
        aliases={"nemo": "moe_router_score_function"},
    )
    norm_topk_prob: bool = option(
        True,
        "Make the chosen experts' weights sum to one, before routed_scaling_factor.",
        changes_shapes=False,
    )
    routed_scaling_factor: float = option(
        2.5,
        "Multiplies the routed experts' weights.",
        above=0,
        example=1.0,
        changes_shapes=False,
        aliases={"nemo": "moe_router_topk_scaling_factor"},
    )
    aux_loss_alpha: float = option(
        0.0001,
        "Weight of the balance loss.",
        at_least=0,
        special={0: "off"},
        changes_shapes=False,
        aliases=[
            Alias(
                nemo="moe_aux_loss_coeff",
                note="the sum over MoE layers, 1 each where the load is even",
            ),
            Alias(
                hf="router_aux_loss_coef",
                note="about theirs x experts per token / MoE layers, with `--config.model.seq_aux=False`: "
                "that of transformers' Mixtral and Qwen3-MoE is one mean over all layers",
            ),
        ],
    )
    seq_aux: bool = option(
        True,
        "The balance loss is per sequence (V2 and V3); False: over the whole batch of a step.",
        changes_shapes=False,
        aliases=[
            Alias(True, nemo="moe_router_load_balancing_type: seq_aux_loss"),
            Alias(False, nemo="moe_router_load_balancing_type: aux_loss"),
        ],
    )
    num_nextn_predict_layers: int = option(
        0,
        "Depth of multi-token prediction: extra layers that predict tokens further ahead.",
        unit="layers",
        at_least=0,
        changes_shapes=True,
        aliases={"nemo": "mtp_num_layers"},
    )
    rms_norm_eps: float = option(
        1e-6,
        "Added to the mean square of RMSNorm.",
        at_least=0,
        changes_shapes=False,
        aliases={"nemo": "layernorm_epsilon"},
    )
    rope_theta: float = option(
        10000.0,
        "Base of the rotary frequencies.",
        above=1,
        example=10000,
        changes_shapes=False,
        aliases={"nemo": "rotary_base"},
    )
    rope_interleave: bool = option(
        True,
        "Rotate neighbouring pairs (DeepSeek); False: the two halves.",
        changes_shapes=False,
        aliases={"nemo": "rotary_interleaved"},
    )
    rope_scaling: RopeScaling = section(RopeScaling)
    max_position_embeddings: int = option(
        4096,
        "Longest sequence the model is meant for.",
        unit="tokens",
        at_least=1,
        changes_shapes=False,
    )
    initializer_range: float = option(
        0.02,
        "Standard deviation of every initial weight (V2 and V3: 0.006).",
        at_least=0,
        changes_shapes=False,
        aliases={"nemo": "init_method_std"},
    )
    shared_core_rank: int = option(
        0,
        "Rank of what turns one core into each routed expert, (I + U_out V_out^T) core (I + U_in V_in^T) for "
        "each projection: core, U and V are what is stored and trained.",
        at_least=0,
        changes_shapes=True,
        special={0: "every expert has weights of its own"},
        aliases={"hf": "compression_config.rank"},
    )
    tie_word_embeddings: bool = option(
        False,
        "The output head is the embedding, transposed.",
        changes_shapes=True,
        aliases={"nemo": "share_embeddings_and_output_weights"},
    )

    @property
    def attention_kind(self) -> str:
        """mla or grouped_query: the attention that the options describe, asked for here alone."""
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
