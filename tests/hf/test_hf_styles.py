"""Exports are read the same by transformers 5, by its older versions and by readers of their time
(DeepSeek's code, vLLM, SGLang)."""

import copy
import json
import os

import pytest

from deepseek_jax.hf import configuration
from deepseek_jax.hf.families import FAMILIES
from deepseek_jax.hf.side_files import merged
from tests.support import FILES

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

DATA = os.path.join(FILES)
SIZES = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=4096,
)
EXPERTS = dict(n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4)
ROPES = {
    "default": {},
    "linear": dict(factor=2.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=1024, beta_fast=16.0, beta_slow=2.0),
    "llama3": dict(
        factor=8.0, low_freq_factor=2.0, high_freq_factor=5.0, original_max_position_embeddings=1024
    ),
}
OLD_THETA = {"mixtral": 1e6, "solar_open": 1e6}


def read(*path):
    with open(os.path.join(DATA, *path), encoding="utf-8") as f:
        return json.load(f)


def exported(config):
    """The config.json of an export of what a checkpoint with this one holds."""
    now = configuration.from_model(configuration.to_model(config), configuration.family_of(config))
    return merged(config, now, now)


def old_rope(config):
    """(theta, rope type, its numbers) by the rule of transformers up to 4.56: rope_theta and rope_scaling at
    the top, nothing else."""
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", scaling.get("type", "default"))
    scaling.pop("type", None)
    return config.get("rope_theta", OLD_THETA.get(config["model_type"], 10000.0)), kind, scaling


def new_rope(config):
    """The same by transformers 5."""
    given = copy.deepcopy(config)  # it writes into what it is given
    rope = dict(transformers.AutoConfig.for_model(**given).rope_parameters)
    rope.pop("type", None)
    rope.pop("partial_rotary_factor", None)
    return rope.pop("rope_theta"), rope.pop("rope_type"), rope


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_what_transformers_5_wrote(kind, rope):
    """Every family's config.json as it saves it, exported again: both readers see one model."""
    experts = {} if FAMILIES[kind].dense or kind in ("qwen3_moe", "mixtral") else EXPERTS
    extra = dict(sliding_window=None) if kind in ("mistral", "dots1") else {}
    parameters = {"rope_type": rope, "rope_theta": 12345.0} | ROPES[rope]
    theirs = transformers.AutoConfig.for_model(
        kind, **SIZES, **experts, **extra, dtype="bfloat16", rope_parameters=parameters
    )
    saved = json.loads(theirs.to_json_string(use_diff=True))
    assert "rope_theta" not in saved and "rope_scaling" not in saved
    assert saved["rope_parameters"]["rope_theta"] == 12345.0
    out = exported(saved)
    assert configuration.to_model(out) == configuration.to_model(saved)
    assert old_rope(out) == new_rope(out) == new_rope(saved) == (12345.0, rope, ROPES[rope])
    only_old = {k: v for k, v in out.items() if k != "rope_parameters"}
    only_new = {
        k: v
        for k, v in out.items()
        if k not in ("rope_theta", "rope_scaling", "partial_rotary_factor")
    }
    assert configuration.to_model(only_old) == configuration.to_model(saved)
    assert configuration.to_model(only_new) == configuration.to_model(saved)
    for key, value in saved.items():  # nothing else that it said is lost or changed
        if key not in ("rope_parameters", "dtype", "head_dim"):
            assert out[key] == value or (
                key in ("n_group", "topk_group") and value is None and out[key] == 1
            ), key


@pytest.mark.parametrize(
    "name, theta, kind, factor",
    [
        (("hf_styles", "exported-llama3-rope.json"), 10000, "llama3", 8.0),
        (("hf_styles", "exported-own-run.json"), 10000, "default", None),
        (("hf_configs", "real--DeepSeek-V2-Lite-Chat-tf5.7.json"), 10000, "yarn", 40),
        (("hf_configs", "deepseek-ai--DeepSeek-V3.json"), 10000, "yarn", 40),
        (("hf_configs", "meta-llama--Meta-Llama-3.1-8B.json"), 500000, "llama3", 8.0),
        (("hf_configs", "Qwen--Qwen3-30B-A3B-FP8.json"), 1000000, "default", None),
    ],
)
def test_files_of_either_age(name, theta, kind, factor):
    config = read(*name)
    out = exported(config)
    for found in (old_rope(out), new_rope(out)):
        assert (found[0], found[1], found[2].get("factor")) == (theta, kind, factor)
    assert old_rope(out) == new_rope(out) and configuration.to_model(out) == configuration.to_model(
        config
    )
    if kind != "default":  # DeepSeek's code and transformers before 4.45 look for `type`
        assert out["rope_scaling"]["type"] == kind


def test_other_keys_with_two_forms():
    """The number of experts and which layers have them, whichever form the checkpoint came in."""
    qwen = {"model_type": "qwen3_moe", "num_local_experts": 16, "num_experts_per_tok": 4} | SIZES
    assert exported(qwen)["num_experts"] == exported(qwen)["num_local_experts"] == 16
    glm = {
        "model_type": "glm4_moe_lite",
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    } | SIZES
    assert exported(glm)["first_k_dense_replace"] == 2
    assert exported(glm)["mlp_layer_types"] == glm["mlp_layer_types"]
    v3 = {"model_type": "deepseek_v3", "num_local_experts": 32, "num_mtp_layers": 2} | SIZES
    out = exported(v3)
    assert (out["n_routed_experts"], out["num_nextn_predict_layers"]) == (32, 2)
    assert not {"num_local_experts", "num_mtp_layers"} & out.keys()
    # What these say where they are missing, said: older readers have other defaults, or none.
    assert (out["n_group"], out["topk_group"], out["scoring_func"], out["topk_method"]) == (
        8,
        4,
        "sigmoid",
        "noaux_tc",
    )
    assert (
        exported({"model_type": "dots1", "n_group": None, "topk_group": None} | EXPERTS | SIZES)[
            "n_group"
        ]
        == 1
    )


def test_what_changed_since_is_written():
    """A key that belongs to what changed follows it."""
    config = read("hf_styles", "exported-llama3-rope.json") | {
        "layer_types": ["full_attention"] * 3,
        "unknown_to_us": 1,
    }
    then = configuration.from_model(
        configuration.to_model({k: v for k, v in config.items() if k != "unknown_to_us"}), "llama"
    )
    now = then | {"num_hidden_layers": 2, "rope_theta": 7.0}
    out = merged(config, now, then)
    assert (out["num_hidden_layers"], out["rope_theta"], out["unknown_to_us"]) == (2, 7.0, 1)
    assert "layer_types" not in out
