"""What compress writes, loaded by transformers: the same logits as ours, for every family with experts."""

import os

import numpy as np
import pytest

from deepseek_jax import hf
from tests.support import compression

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Experts that are kept, of 16 with DeepSeek (4 groups of which 2 are chosen from, 4 a token), else of 8 (3 a
# token) and of Mixtral 4 (2). Of 8 in 4 groups none can go: a group is scored by its two best.
FAMILIES = {
    "deepseek_v2": 8,
    "deepseek_v2-lite": 5,
    "deepseek_v2-group": 12,
    "deepseek_v3": 8,
    "deepseek_v3-tied": 12,
    "deepseek_v3-mtp": 8,
    "moonlight": 7,
    "glm4_moe": 5,
    "glm4_moe-qknorm-group": 8,
    "glm4_moe_lite": 5,
    "qwen3_moe": 3,
    "qwen3_moe-nonorm": 5,
    "mixtral": 3,
    "solar_open": 4,
    "dots1": 8,
}
QUICK = {"qwen3_moe"}


def logits_of(folder, ids) -> np.ndarray:
    """float32 [B, S, V] of transformers."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    with torch.no_grad():
        return model(torch.as_tensor(ids), use_cache=False).logits.numpy()


def check(folder, ids) -> None:
    """To float32's rounding, of the largest logit."""
    theirs = logits_of(folder, ids)
    ours = np.asarray(hf.load(str(folder))(ids))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize(
    "variant",
    [v if v in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in FAMILIES],
)
def test_transformers_loads_a_pruned_model(tmp_path, variant):
    from tests.support import hf_families

    source = tmp_path / "model"
    if variant == "glm4_moe_lite":
        compression.folder(source, compression.SIGMOID, family=variant)
    else:
        source.mkdir()
        hf_families.save(variant, source)
    compression.run(
        "prune", source, tmp_path / "out", f"--experts={FAMILIES[variant]}", "--method=random"
    )
    check(tmp_path / "out", np.random.default_rng(0).integers(0, 96, (2, 20)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation",
    [["prune", "--experts=4"], ["layers", "--drop=1"], ["width", "--moe-intermediate=8"]],
)
@pytest.mark.parametrize("router", ["SIGMOID", "SOFTMAX"])
def test_transformers_loads_what_calibration_text_made(tmp_path, operation, router):
    folder = compression.folder(tmp_path / "model", getattr(compression, router))
    text, (command, *options) = compression.text(tmp_path / "text.jsonl"), operation
    more = [f"--text={text}", "--sequence-length=24", "--dtype=float32"]
    compression.run(command, folder, tmp_path / "out", *options, *more)
    check(tmp_path / "out", np.random.default_rng(0).integers(0, 257, (2, 20)))
