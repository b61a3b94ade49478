"""Which weights of a model LoRA can adapt, and which of them `config.lora.target_modules` names."""

from deepseek_jax.config.sections.lora import ALL_LINEAR, names
from deepseek_jax.config.sections.model import ModelConfig

SAVED = ("embed_tokens", "lm_head")  # what config.lora.modules_to_save may name
MLP = ("gate_proj", "up_proj", "down_proj")
EXPERTS = "mlp.experts"


def linear_maps(model: ModelConfig) -> tuple[str, ...]:
    """Paths of the linear maps in a layer, as a Hugging Face model has them, without an expert's number:
    "self_attn.q_proj", "mlp.experts.down_proj". The router is none of them.
    """
    if model.attention_kind == "mla":
        queries = ("q_a_proj", "q_b_proj") if model.q_lora_rank else ("q_proj",)
        attention = (*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    else:
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    out = [f"self_attn.{name}" for name in attention]
    if model.first_k_dense_replace:
        out += [f"mlp.{name}" for name in MLP]
    if model.num_hidden_layers > model.first_k_dense_replace:
        if model.n_shared_experts:
            out += [f"mlp.shared_experts.{name}" for name in MLP]
        out += [f"{EXPERTS}.{name}" for name in MLP]
    return tuple(out)


def matches(path: str, name: str) -> bool:
    """Whether a name is a linear map's: the end of its path, or that of all routed experts."""
    ends = f".{path}".endswith(f".{name}")
    return ends or (path.startswith(f"{EXPERTS}.") and f".{EXPERTS}".endswith(f".{name}"))


def is_target(path: str, target_modules: str) -> bool:
    """Whether `config.lora.target_modules` names a linear map."""
    if target_modules == ALL_LINEAR:
        return True
    return any(matches(path, name) for name in names(target_modules))


def targets(model: ModelConfig, target_modules: str) -> tuple[str, ...]:
    """The linear maps that are adapted, in the order of `linear_maps`."""
    return tuple(path for path in linear_maps(model) if is_target(path, target_modules))
