"""What keys of Megatron-core's TransformerConfig say that hang together: attention, experts, routing.

Sources: megatron/core/transformer/transformer_config.py, moe/moe_utils.py and multi_latent_attention.py of
Megatron-LM.
"""

import ast

from deepseek_jax.errors import UserError
from deepseek_jax.migrate.handlers import (
    as_bool,
    as_float,
    as_int,
    as_text,
    is_off,
    option,
    wrong,
)
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry
from deepseek_jax.migrate.tool import Handler


def whole(m: Migration, key: str, default: int = 0) -> int:
    """A whole number that the sources give to a canonical key; `default`: they do not."""
    entry = m.entry(key)
    return default if entry is None or entry.value is None else as_int(entry)


def flag(m: Migration, key: str, default: bool = False) -> bool:
    """Whether the sources turn a canonical key on; `default`: they do not say."""
    entry = m.entry(key)
    return default if entry is None or entry.value is None else as_bool(entry)


def yes_no(name: str, inverted: bool = False) -> Handler:
    """An option that is True where the entry is, or where it is not."""
    return option(name, lambda entry: as_bool(entry) != inverted)


def of_latent_attention(name: str) -> Handler:
    """An option of multi-head latent attention; of other attention the key says nothing."""
    told = option(name)

    def handle(m: Migration, entry: Entry) -> None:
        if flag(m, "multi_latent_attention"):
            told(m, entry)
        else:
            m.no_effect(entry, "it is of multi-head latent attention, which is off")

    return handle


def of_other_attention(name: str) -> Handler:
    """An option of grouped-query attention; of latent attention the key says nothing."""
    told = option(name)

    def handle(m: Migration, entry: Entry) -> None:
        if flag(m, "multi_latent_attention"):
            m.no_effect(entry, "latent attention has widths of its own")
        else:
            told(m, entry)

    return handle


def norm_of_queries(m: Migration, entry: Entry) -> None:
    """qk_layernorm: of latent attention it norms the latents, as DeepSeek does; else each head."""
    if not flag(m, "multi_latent_attention"):
        m.tell(entry, "model.use_qk_norm", as_bool(entry))
    elif as_bool(entry):
        m.no_effect(entry, "latents are normed here, too")
    else:
        m.refuse(entry, "latent attention norms its latents here", "Set it to true")


def has_experts(m: Migration) -> bool:
    """Whether the files describe a model with experts."""
    return bool(whole(m, "num_experts") or whole(m, "num_moe_experts"))


def of_experts(handler: Handler) -> Handler:
    """A key of routing and experts, which says nothing about a dense model."""

    def handle(m: Migration, entry: Entry) -> None:
        if m.entry("num_layers") and not has_experts(m):
            m.no_effect(entry, "the model has no experts")
        else:
            handler(m, entry)

    return handle


MOST_LAYERS = 10_000


def layer_pattern(entry: Entry, layers: int) -> list[int]:
    """Which layers have experts, of "([0]*3+[1]*11)", [0, 1, 1] or 1.

    Raises:
      UserError: it is none of these.
    """
    if layers > MOST_LAYERS:
        raise UserError(f"num_layers={layers} is not at most {MOST_LAYERS}. Correct it there.")
    if isinstance(entry.value, int):
        return (
            [int(i % entry.value == 0) for i in range(layers)] if entry.value > 0 else [0] * layers
        )
    text = as_text(entry).strip()
    try:
        found = _items(ast.parse(text, mode="eval").body) if len(text) <= MOST_LAYERS else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        found = None
    if isinstance(found, int):
        return [int(i % found == 0) for i in range(layers)]
    if found is None or not set(found) <= {0, 1}:
        raise wrong(entry, "a pattern of layers such as ([0]*3+[1]*11)")
    return found


def _items(node: ast.expr) -> list[int] | int:
    """Lists of whole numbers, their sums and repetitions: nothing is evaluated but these."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.List(elts=elts):
            return [
                e.value for e in elts if isinstance(e, ast.Constant) and isinstance(e.value, int)
            ]
        case ast.Tuple(elts=elts):
            return [
                e.value for e in elts if isinstance(e, ast.Constant) and isinstance(e.value, int)
            ]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _items(left), _items(right)
            if isinstance(first, list) and isinstance(second, list):
                return first + second
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            first, second = _items(left), _items(right)
            if isinstance(first, list) and isinstance(second, int):
                if len(first) * second <= MOST_LAYERS:
                    return first * second
    raise ValueError("no pattern")


def layers_with_experts(m: Migration, entry: Entry) -> None:
    """moe_layer_freq: dense layers first, then layers with experts."""
    if entry.value is None:
        m.no_effect(entry, "null is the default")
        return
    layers = whole(m, "num_layers")
    pattern = layer_pattern(entry, layers)
    dense = pattern.index(1) if 1 in pattern else len(pattern)
    if 0 in pattern[dense:] or (layers and len(pattern) != layers):
        m.refuse(
            entry,
            "layers with experts follow dense ones here, and do not take turns with them",
            "Set it to a pattern as ([0]*3+[1]*11), of as many items as there are layers",
        )
        return
    m.tell(entry, "model.first_k_dense_replace", dense)


def shared_expert(m: Migration, entry: Entry) -> None:
    """moe_shared_expert_intermediate_size: of all shared experts together."""
    width = whole(m, "moe_ffn_hidden_size", whole(m, "ffn_hidden_size"))
    total = as_int(entry) if entry.value is not None else 0
    if not width or total % width:
        m.refuse(
            entry,
            f"shared experts are a multiple of a routed expert's width here, which is {width}",
            "Set it to a multiple of moe_ffn_hidden_size",
        )
        return
    m.tell(entry, "model.n_shared_experts", total // width)


def capacity(m: Migration, entry: Entry) -> None:
    """moe_expert_capacity_factor: set, it drops tokens."""
    if is_off(entry.value):
        m.no_effect(entry, "nothing is dropped")
        return
    m.tell(entry, "moe.capacity_factor", as_float(entry))
    m.tell(entry, "moe.drop", True)


def drop_policy(m: Migration, entry: Entry) -> None:
    """moe_token_drop_policy."""
    if is_off(m.value("moe_expert_capacity_factor")):
        m.no_effect(entry, "nothing is dropped without moe_expert_capacity_factor")
        return
    m.tell(entry, "moe.drop_policy", as_text(entry).replace("probs", "probability"))


def score_before_choice(m: Migration, entry: Entry) -> None:
    """moe_router_pre_softmax: the softmax is over all experts, and the chosen weights stay as they are."""
    if m.value("moe_router_score_function", "softmax") != "softmax":
        m.no_effect(entry, "it is of softmax scores")
    else:
        m.tell(entry, "model.norm_topk_prob", not as_bool(entry))


def expert_bias(m: Migration, entry: Entry) -> None:
    """moe_router_enable_expert_bias."""
    if as_bool(entry):
        m.tell(entry, "model.topk_method", "noaux_tc")
    else:
        m.no_effect(entry, "experts are chosen by their scores alone")


def bias_update_rate(m: Migration, entry: Entry) -> None:
    """moe_router_bias_update_rate: of the expert bias."""
    if flag(m, "moe_router_enable_expert_bias"):
        m.tell(entry, "moe.bias_update_rate", as_float(entry))
    else:
        m.no_effect(entry, "there is no expert bias")


def groups(m: Migration, entry: Entry) -> None:
    """moe_router_group_topk: how many groups.

    Megatron scores a group by its best topk / group_topk experts; V3 by two, V2 by one.
    """
    if entry.value is None:
        m.no_effect(entry, "null is the default")
        return
    chosen, best = as_int(entry), 2 if flag(m, "moe_router_enable_expert_bias") else 1
    if whole(m, "moe_router_topk", 2) // max(chosen, 1) != best:
        m.refuse(
            entry,
            f"a group's score is the sum of its best {best} here, and there of moe_router_topk / group_topk",
            f"Set moe_router_topk to {best * chosen}",
        )
        return
    m.tell(entry, "model.topk_group", chosen)


def yarn_factor(m: Migration, entry: Entry) -> None:
    """rotary_scaling_factor of latent attention: YaRN."""
    if not flag(m, "multi_latent_attention"):
        m.no_effect(entry, "it is of multi-head latent attention, which is off")
        return
    m.tell(entry, "model.rope_scaling.factor", as_float(entry))
    if as_float(entry) > 1 and m.value("rope_type", "yarn") in (None, "yarn"):
        m.tell(entry, "model.rope_scaling.type", "yarn")


def stretched(m: Migration, entry: Entry) -> None:
    """seq_len_interpolation_factor: positions are divided by it."""
    if is_off(entry.value):
        m.no_effect(entry, "it is off")
        return
    m.tell(entry, "model.rope_scaling.type", "linear")
    m.tell(entry, "model.rope_scaling.factor", as_float(entry))


def scaled_as_llama3(m: Migration, entry: Entry) -> None:
    """use_rope_scaling: by wavelength, as of Llama 3.1 (RotaryEmbedding._apply_scaling)."""
    if is_off(entry.value):
        m.no_effect(entry, "it is off")
        return
    factor = m.entry("rope_scaling_factor")
    m.tell(entry, "model.rope_scaling.type", "llama3")
    m.tell(entry, "model.rope_scaling.factor", as_float(factor) if factor else 8.0)
    m.tell(entry, "model.rope_scaling.low_freq_factor", 1.0)
    m.tell(entry, "model.rope_scaling.high_freq_factor", 4.0)
    m.tell(entry, "model.rope_scaling.original_max_position_embeddings", 8192)


def query_groups(m: Migration, entry: Entry) -> None:
    """num_query_groups: heads of keys and values. NeMo's null: as many as of queries."""
    if flag(m, "multi_latent_attention"):
        m.no_effect(entry, "latent attention has no heads of keys and values")
    elif not entry.value:
        m.no_effect(entry, "as many as num_attention_heads")
    else:
        m.tell(entry, "model.num_key_value_heads", as_int(entry))


def mtp_weight(m: Migration, entry: Entry) -> None:
    """mtp_loss_scaling_factor: the same to the end."""
    m.tell(entry, "train.mtp_loss_weight", as_float(entry))
    m.tell(entry, "train.mtp_loss_weight_final", as_float(entry))
