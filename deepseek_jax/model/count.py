"""Parameters and floating point operations of a model, from its shapes alone."""

import math
from typing import NamedTuple

from flax import nnx

from deepseek_jax.config.options import ModelConfig
from deepseek_jax.model.lora import is_factor


class Count(NamedTuple):
    total: int  # parameters of the main model: with embedding and head, without MTP layers
    active: int  # those that one token uses: all but the experts it was not sent to
    mtp: int  # parameters of the MTP layers, which share embedding and head
    flops_per_token: float  # forward and backward, see `count`

    def beside(self, frozen: "Count") -> "Count":
        """Of a model that learns from a frozen one, which has a forward pass only: a third of its FLOPs."""
        return self._replace(flops_per_token=self.flops_per_token + frozen.flops_per_token / 3)


def count(config: ModelConfig, params: nnx.State, sequence_length: int) -> Count:
    """Counts a model's parameters and its training FLOPs per token.

    FLOPs are 6 per active matmul weight (2 forward, 4 backward; embedding look-up, norms, router
    and recomputation not counted, the head counted, once more for every MTP depth) plus causal
    attention, counted once: 3 * layers * heads * (query width + value width) * sequence_length.

    Args:
      config: the model's options.
      params: arrays or shapes of `model.transformer.Transformer`. Factors of LoRA are in the FLOPs only, of
        which a weight of the base has 4.
      sequence_length: in tokens, which attention depends on.
    """
    total = mtp = idle = not_matmul = mtp_active = adapters = 0
    for path, variable in nnx.to_flat_state(params):
        name, size = "/".join(map(str, path)), math.prod(variable.get_value().shape)
        ahead = name.startswith("mtp/")
        unused = 0
        if "/experts/" in name:
            unused = size - size * config.num_experts_per_tok // config.n_routed_experts
        if is_factor(path):
            adapters += size - unused
            continue
        if ahead:
            mtp += size
            mtp_active += size - unused
        else:
            total += size
            idle += unused
        if (
            "norm" in name
            or "/gate/" in name
            or name.endswith("_proj/bias")
            or (name.startswith("embed_tokens") and not config.tie_word_embeddings)
        ):
            not_matmul += size
    depth = config.num_nextn_predict_layers
    matmul = total - idle + mtp_active - not_matmul + depth * config.vocab_size * config.hidden_size
    width = config.qk_head_dim + config.value_head_dim
    attention = (
        (config.num_hidden_layers + depth) * config.num_attention_heads * width * sequence_length
    )
    # The gradients of a base's weights are not made.
    products = 4.0 * matmul + 6.0 * adapters if adapters else 6.0 * matmul
    return Count(total, total - idle, mtp, products + 3.0 * attention)
