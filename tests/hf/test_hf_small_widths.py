"""One head, one key-value head and a rope width of two against transformers: logits and greedy tokens."""

import jax
import numpy as np
import pytest

from deepseek_jax import hf
from deepseek_jax.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
conversion = pytest.importorskip("tests.support.conversion")
hf_variants = pytest.importorskip("tests.support.hf_variants")

SHAPES = dict(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
)
MLA = dict(
    SHAPES,
    moe_intermediate_size=12,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    kv_lora_rank=10,
    q_lora_rank=14,
    qk_nope_head_dim=6,
    v_head_dim=6,
    n_shared_experts=1,
)
GLM = dict(
    SHAPES,
    moe_intermediate_size=12,
    n_routed_experts=8,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    n_shared_experts=1,
)
MODELS = {
    "llama, one key-value head": ("llama", dict(SHAPES, num_key_value_heads=1)),
    "deepseek_v3, one head, rope 2": (
        "deepseek_v3",
        dict(MLA, num_attention_heads=1, num_key_value_heads=1, qk_rope_head_dim=2),
    ),
    "deepseek_v3, rope 2, halves": (
        "deepseek_v3",
        dict(MLA, num_key_value_heads=2, qk_rope_head_dim=2, rope_interleave=False),
    ),
    "glm4_moe, one head, 2 of 4 rotated": (
        "glm4_moe",
        dict(
            GLM, num_attention_heads=1, num_key_value_heads=1, head_dim=4, partial_rotary_factor=0.5
        ),
    ),
    "qwen3, head width 2, YaRN": (
        "qwen3",
        dict(
            SHAPES,
            num_key_value_heads=1,
            head_dim=2,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=10000.0,
                factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
    ),
}
SLOW = (
    "llama, one key-value head",  # qwen3 has one, too
    "deepseek_v3, rope 2, halves",
    "glm4_moe, one head, 2 of 4 rotated",
)


def saved(name, folder):
    kind, keys = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **keys)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    hf_variants.randomise(model, 0)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MODELS]
)
def test_logits_and_greedy_tokens_are_those_of_transformers(name, tmp_path):
    """Float32 sums in another order: within 1e-5 of the largest logit; tokens equal."""
    theirs = saved(name, tmp_path)
    ours = hf.load(str(tmp_path))
    ids = np.random.default_rng(1).integers(2, 64, (1, 11))
    theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        logits = theirs(torch.as_tensor(ids)).logits.numpy()
        tokens = theirs.generate(
            torch.as_tensor(ids),
            attention_mask=torch.ones(1, 11, dtype=torch.long),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )[0, 11:].tolist()
    conversion.assert_close(np.asarray(ours(ids)), logits, 1e-5, "logits")
    assert ours.generate(ids[0].tolist(), 6, stop_ids=()) == tokens


@pytest.mark.slow
def test_over_a_mesh(tmp_path):
    """One head cannot be divided, but may lie whole beside experts and rows that are."""
    name = "deepseek_v3, one head, rope 2"
    saved(name, tmp_path)
    one, mesh = (
        hf.load(str(tmp_path)),
        hf.load(str(tmp_path), mesh=jax.make_mesh((2, 2), ("fsdp", "expert"))),
    )
    prompts = [[5, 9, 11], [3] * 7]
    assert mesh.generate(prompts, 6, stop_ids=()) == one.generate(prompts, 6, stop_ids=())
    with pytest.raises(
        UserError, match="num_attention_heads=1 is not divisible by the tensor mesh axis"
    ):
        hf.load(str(tmp_path), mesh=jax.make_mesh((2,), ("tensor",)))
