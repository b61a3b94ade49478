"""What each kind of attention makes of a model's options: widths of heads, and which widths meshes divide.

Checks, counting and Hugging Face conversion need these facts without the model. A new kind of
attention is one function here, a name in `ModelConfig.attention_kind`, and one file in
model/attention/ that computes it.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionShape:
    """Facts about the attention of one model. A width is (option or product of options, its value)."""

    qk_head_dim: int  # width of a head's query and key
    value_head_dim: int  # width of a head's value
    rotary_dim: int  # how much of a head's query and key is rotated
    key_value_heads: int  # heads of keys and values, as attention computes with them
    # The tensor axis must divide these, besides num_attention_heads.
    tensor_widths: tuple[tuple[str, int], ...] = ()
    # Widths of weights from a rank to heads: tensor and the axes that weights are divided over must
    # divide them.
    lora_widths: tuple[tuple[str, int], ...] = ()
    # Options of another kind, which may have any value and change nothing.
    unread: tuple[str, ...] = ()


def attention_shape(model: Any) -> AttentionShape:
    """The facts of a `ModelConfig`, whose module imports this one."""
    return _SHAPES[model.attention_kind](model)


def _mla(m: Any) -> AttentionShape:
    heads = f"num_attention_heads={m.num_attention_heads}"
    qk_head_dim = m.qk_nope_head_dim + m.qk_rope_head_dim
    kv_width = m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim)
    lora_widths = [(f"{heads} x (qk_nope_head_dim + v_head_dim)", kv_width)]
    if m.q_lora_rank:
        q_width = m.num_attention_heads * qk_head_dim
        lora_widths.append((f"{heads} x (qk_nope_head_dim + qk_rope_head_dim)", q_width))
    return AttentionShape(
        qk_head_dim=qk_head_dim,
        value_head_dim=m.v_head_dim,
        rotary_dim=m.qk_rope_head_dim,
        key_value_heads=m.num_attention_heads,
        lora_widths=tuple(lora_widths),
    )


def _grouped_query(m: Any) -> AttentionShape:
    head_dim = m.head_dim or m.hidden_size // m.num_attention_heads
    return AttentionShape(
        qk_head_dim=head_dim,
        value_head_dim=head_dim,
        rotary_dim=int(head_dim * m.partial_rotary_factor),
        key_value_heads=m.num_key_value_heads,
        tensor_widths=(("num_key_value_heads", m.num_key_value_heads),),
        unread=(
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "rope_interleave",
        ),
    )


_SHAPES = {"mla": _mla, "grouped_query": _grouped_query}
