"""All config.json files of tests/files/hf_configs: each is read, or refused by what changes the
computation."""

import json
import os

import jax
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.hf import configuration
from deepseek_jax.inference.loaded import config_for
from deepseek_jax.model.count import count
from deepseek_jax.model.layout import abstract_model
from tests.support import FILES

FOLDER = os.path.join(FILES, "hf_configs")

# Accepted: 10^9 parameters as the publishers state them (names of models, cards, headers of their safetensors
# files), to the digits given; embedding and head count, multi-token prediction layers do not.
ACCEPTED = {
    "InferSim--qwen3-235B-A22B_config": "235",
    "InferSim--qwen3-30B-A3B_config": "30.5",
    "LLMServingSim--Llama-3.1-70B": "70.6",
    "LLMServingSim--Llama-3.1-8B": "8.03",
    "LLMServingSim--Qwen3-30B-A3B-Instruct-2507": "30.5",
    "LLMServingSim--Qwen3-32B": "32.8",
    "Qwen--Qwen3-0.6B": "0.6",
    "Qwen--Qwen3-235B-A22B-FP8": "235",
    "Qwen--Qwen3-235B-A22B": "235",
    "Qwen--Qwen3-30B-A3B-FP8": "30.5",
    "Qwen--Qwen3-32B-FP8": "32.8",
    "Qwen--Qwen3-32B": "32.8",
    "Qwen--Qwen3-Coder-480B-A35B-Instruct": "480",
    "deepseek-ai--DeepSeek-R1": "671",
    "deepseek-ai--DeepSeek-V3": "671",
    "maxtext--deepseek2_16b": "15.7",
    "maxtext--deepseek3_671b": "671",
    "maxtext--llama31_405b": "406",
    "maxtext--llama31_70b": "70.6",
    "maxtext--llama31_8b": "8.03",
    "maxtext--mixtral_8x7b": "46.7",
    "maxtext--qwen25_14b": "14.8",
    "maxtext--qwen25_7b": "7.62",
    "maxtext--qwen3_0_6b": "0.6",
    "maxtext--qwen3_14b": "14.8",
    "maxtext--qwen3_235b_a22b_thinking_2507": "235",
    "maxtext--qwen3_30b_a3b_base": "30.5",
    "maxtext--qwen3_30b_a3b_thinking_2507": "30.5",
    "maxtext--qwen3_4b": "4.02",
    "maxtext--qwen3_8b": "8.19",
    "maxtext--qwen3_coder_480b_a35b": "480",
    "meta-llama--Meta-Llama-3.1-405B": "406",
    "meta-llama--Meta-Llama-3.1-8B": "8.03",
    "mistralai--Mixtral-8x22B-v0.1": "141",
    "mistralai--Mixtral-8x7B-v0.1": "46.7",
    "mlc--codellama_13b": "13.0",
    "mlc--codellama_34b": "33.7",
    "mlc--codellama_7b": "6.74",
    "mlc--llama2_13b": "13.0",
    "mlc--llama2_70b": "69.0",
    "mlc--llama3_1_70b": "70.6",
    "mlc--llama3_1_8b": "8.03",
    "mlc--llama3_2_1b": "1.24",
    "mlc--mistral_7b_v03": "7.25",
    "mlc--qwen2.5_3b": "3.09",
    "mlc--qwen2_1_5b": "1.54",
    "mlc--qwen2_7b": "7.62",
    "mlc--qwen3_1.7b": "1.7",
    "mlc--smollm2_135m": "0.135",
    "mlc--smollm2_360m": "0.362",
    "mlc--smollm_1_7b": "1.71",
    "mlc--smollm_360m": "0.362",
    "mlc--tinyllama_1b_chat_v0.4": "1.10",
    "moonshotai--Kimi-K2-Instruct": "1026",
    "nvidia--Qwen3-235B-A22B-NVFP4": "235",
    "real--DeepSeek-R1-0528-Qwen3-8B": "8.19",
    "real--DeepSeek-V2-Lite-Chat-tf5.7": "15.7",
    "real--Moonlight-16B-A3B-Instruct": "16.0",
    # Not their publishers' files: the first leaves q_lora_rank out, which transformers and DeepSeek's class
    # then take for 1536 (V2-Lite says null, 15.7); the second ties the embedding of a model that has 1.84
    # with a head of its own.
    "mlc--deepseek_v2_lite": "15.7+0.04",
    "mlc--qwen2": "1.84-0.31",
}
# Refused: the word that must appear, the key or the model_type that changes the computation.
REFUSED = {
    "Qwen--Qwen3-32B-FP8-Static-PerTensor": "quant_method",  # one scale a tensor
    "mlc--mistral_7b": "sliding_window",  # 4096 of 32768 positions
    "XiaomiMiMo--MiMo-7B-Base": "'mimo'",
    "XiaomiMiMo--MiMo-V2-Flash": "'mimo_v2_flash'",
    "LLMServingSim--Phi-mini-MoE-instruct": "'phimoe'",
    "MiniMaxAI--MiniMax-M3": "'minimax_m3'",
    "moonshotai--Kimi-K3": "'kimi_k3'",
    "nvidia--Gemma-4-26B-A4B-NVFP4": "'gemma4'",
    "nvidia--Llama-3_3-Nemotron-Super-49B-v1": "'nemotron-nas'",
    "InferSim--qwen3-next-80B-A3B_config": "'qwen3_next'",
    "mlc--qwen2moe": "'qwen2_moe'",
    "maxtext--olmo3_7b": "'olmo3'",
    "sgl-project--DeepSeek-V4-Pro-FP8": "'deepseek_ref'",
    "Qwen--Qwen3.5-27B": "'qwen3_5'",
    "Qwen--Qwen3-VL-235B-A22B-Instruct": "'qwen3_vl_moe'",
} | {
    name: f"'{kind}'"
    for kind, names in {
        "deepseek_v32": "InferSim--deepseek_v3.2_config nvidia--DeepSeek-V3.2-NVFP4",
        "deepseek_v4": "deepseek-ai--DeepSeek-V4-Flash deepseek-ai--DeepSeek-V4-Pro "
        "nvidia--DeepSeek-V4-Flash-NVFP4 nvidia--DeepSeek-V4-Pro-NVFP4",
        "minimax_m2": "MiniMaxAI--MiniMax-M2.7 nvidia--MiniMax-M2.5-NVFP4 nvidia--MiniMax-M2.7-NVFP4",
        "qwen3_vl": "Qwen--Qwen3-VL-2B-Instruct Qwen--Qwen3-VL-32B-Instruct Qwen--Qwen3-VL-32B-Thinking "
        "Qwen--Qwen3-VL-4B-Instruct",
        "qwen3_5_moe": "Qwen--Qwen3.5-122B-A10B Qwen--Qwen3.5-35B-A3B nvidia--Qwen3.5-122B-A10B-NVFP4 "
        "nvidia--Qwen3.6-35B-A3B-NVFP4",
        "gpt_oss": "maxtext--gpt_oss_120b openai--gpt-oss-120b",
        "olmo2": "mlc--olmo2_13b mlc--olmo2_7b",
        "llama4": "meta-llama--Llama-4-Maverick-17B-128E-Instruct meta-llama--Llama-4-Scout-17B-16E-Instruct",
        "kimi_k25": "moonshotai--Kimi-K2.5 nvidia--Kimi-K2.5-NVFP4 nvidia--Kimi-K2.6-NVFP4 "
        "nvidia--Kimi-K2.7-Code-NVFP4",
        "glm_moe_dsa": "nvidia--GLM-5.1-NVFP4 nvidia--GLM-5.2-NVFP4 zai-org--GLM-5 zai-org--GLM-5.1 "
        "zai-org--GLM-5.1-FP8 zai-org--GLM-5.2-FP8",
        "nemotron_h": "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4 "
        "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8 "
        "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16 "
        "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-FP8 "
        "nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4 nvidia--Nemotron-H-56B-Base-8K",
        "step3p7": "stepfun-ai--Step-3.7-Flash stepfun-ai--Step-3.7-Flash-FP8",
    }.items()
    for name in names.split()
}


def read(name):
    with open(os.path.join(FOLDER, f"{name}.json"), encoding="utf-8") as f:
        return json.load(f)


def parameters(m):
    """Of all tensors but those of multi-token prediction, by the papers' formulas."""
    d, heads = m.hidden_size, m.num_attention_heads
    if m.num_key_value_heads is None:
        rope, nope, v, latent = m.qk_rope_head_dim, m.qk_nope_head_dim, m.v_head_dim, m.kv_lora_rank
        width, rank = heads * (nope + rope), m.q_lora_rank
        attention = d * width if rank is None else d * rank + rank + rank * width
        attention += d * (latent + rope) + latent + latent * heads * (nope + v) + heads * v * d
    else:
        q, kv = heads * m.head_dim, m.num_key_value_heads * m.head_dim
        attention = d * (2 * q + 2 * kv) + m.use_qk_norm * 2 * m.head_dim
        attention += m.attention_bias * (q + 2 * kv) + m.attention_out_bias * d
    dense = 3 * d * m.intermediate_size
    sparse = (
        3 * d * m.moe_intermediate_size * (m.n_routed_experts + m.n_shared_experts)
        + d * m.n_routed_experts
    )
    layers, first = m.num_hidden_layers, m.first_k_dense_replace
    embeddings = d * m.vocab_size * (2 - m.tie_word_embeddings)
    return layers * (attention + 2 * d) + first * dense + (layers - first) * sparse + embeddings + d


def test_every_file_has_a_verdict():
    assert {f.removesuffix(".json") for f in os.listdir(FOLDER)} == set(ACCEPTED) | set(REFUSED)
    assert not set(ACCEPTED) & set(REFUSED)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    published, m = ACCEPTED[name], configuration.to_model(read(name))
    value, _, change = published.replace("-", "+-").partition("+")
    digits = len(value.partition(".")[2])
    assert round(parameters(m) / 1e9 - float(change or 0), digits) == pytest.approx(
        float(value), abs=10**-digits / 2
    )


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(UserError) as error:
        configuration.to_model(read(name))
    line = str(error.value)
    assert line.startswith("config.json: ") and REFUSED[name] in line and "\n" not in line
    if REFUSED[name].startswith("'"):
        assert f"model_type={REFUSED[name]}" in line


@pytest.mark.parametrize(
    "name",
    [
        "deepseek-ai--DeepSeek-V3",
        "real--Moonlight-16B-A3B-Instruct",
        "mistralai--Mixtral-8x7B-v0.1",
        "mlc--qwen2.5_3b",
    ],
)
def test_the_model_has_so_many_parameters(name):
    """The formula above, and the arrays that this version makes."""
    m = configuration.to_model(read(name))
    params = abstract_model(config_for(m, None)[0])[1]
    assert count(m, params, 1).total == parameters(m)
    assert count(m, params, 1).mtp == sum(a.size for a in jax.tree.leaves(params)) - parameters(m)


def test_what_they_say():
    """Options that a reader could mistake, against the files and the papers."""
    v3 = configuration.to_model(read("deepseek-ai--DeepSeek-V3"))
    assert (
        v3.n_group,
        v3.topk_group,
        v3.topk_method,
        v3.scoring_func,
        v3.q_lora_rank,
        v3.num_nextn_predict_layers,
    ) == (8, 4, "noaux_tc", "sigmoid", 1536, 1)
    assert (
        v3.rope_scaling.type,
        v3.rope_scaling.factor,
        v3.rope_scaling.mscale,
        v3.rope_scaling.mscale_all_dim,
    ) == ("yarn", 40, 1, 1)
    new, old = (
        configuration.to_model(read(n))
        for n in ("real--DeepSeek-V2-Lite-Chat-tf5.7", "maxtext--deepseek2_16b")
    )
    assert new == old and new.rope_scaling.mscale == 0.707 and new.q_lora_rank is None
    llama = configuration.to_model(read("meta-llama--Meta-Llama-3.1-8B"))
    assert (
        llama.rope_theta,
        llama.rope_scaling.type,
        llama.rope_scaling.factor,
        llama.num_key_value_heads,
    ) == (500000, "llama3", 8, 8)
    coder = configuration.to_model(read("Qwen--Qwen3-Coder-480B-A35B-Instruct"))
    assert (coder.n_routed_experts, coder.n_shared_experts) == (160, 0)
    assert (coder.attention_bias, coder.use_qk_norm) == (False, True)


def test_attn_factor_is_yarns():
    """DeepSeek-R1-0528-Qwen3-8B: the factor makes cos and sin keep their length, as in YaRN's code, vLLM and
    SGLang."""
    m = configuration.to_model(read("real--DeepSeek-R1-0528-Qwen3-8B"))
    assert m.rope_scaling.attention_factor == pytest.approx(1.0, abs=1e-12)
    written = configuration.from_model(m, "qwen3")
    for scaling in (
        written["rope_scaling"],
        written["rope_parameters"],
    ):  # attention_factor: transformers; attn_factor: the others
        assert scaling["attention_factor"] == pytest.approx(1.0, abs=1e-12)
        assert scaling["attn_factor"] == pytest.approx(0.8782488562869419)
    assert configuration.to_model(written) == m
