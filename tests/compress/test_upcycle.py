"""Dense models as mixtures of experts: the same logits by our model and by transformers, before training."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from deepseek_jax import hf
from deepseek_jax.cli.command import exit_code
from deepseek_jax.compress import __main__ as command
from deepseek_jax.compress import upcycle_plan
from deepseek_jax.hf import compression_map
from tests.support import hf_families as families

# Float32 sums in another order: of pieces of an MLP, of weights that add up to 1. Measured 2e-6 of logits
# around 1.
TOLERANCE = 1e-5
IDS = np.random.default_rng(0).integers(0, 96, (2, 24))
PLAIN_LLAMA = {k: v for k, v in families.VARIANTS["llama"].items()} | {"attention_bias": False}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """name -> (transformers model, folder); each is built once."""
    made = {}

    def get(variant):
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            with pytest.MonkeyPatch.context() as m:
                m.setitem(families.VARIANTS, "plain-llama", PLAIN_LLAMA)
                made[variant] = families.save(variant, folder), folder
        return made[variant]

    return get


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr(command.compile_cache, "use_cache", lambda *_, **__: "")


def upcycle(source, target, *options):
    assert command.main(["upcycle", str(source), str(target), *options]) == 0
    return transformers.AutoModelForCausalLM.from_pretrained(
        target, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()


def refused(source, target, *options):
    """The exit code."""
    argv = ["upcycle", str(source), str(target), *options]
    return exit_code("compress", lambda: command.main(argv))


def theirs(model):
    with torch.no_grad():
        return model(torch.as_tensor(IDS), use_cache=False).logits.numpy()


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=TOLERANCE, atol=TOLERANCE)


def experts(count, chosen, *more):
    return f"--experts={count}", f"--experts-per-token={chosen}", *more


CASES = [
    ("plain-llama", "mixtral", experts(4, 2)),
    ("qwen3", "qwen3_moe", experts(12, 8, "--granularity=4")),
    ("mistral", "glm4_moe", experts(9, 6, "--granularity=4", "--shared")),
]
MORE = [
    ("qwen3", "qwen3_moe", experts(10, 5, "--granularity=5", "--first-k-dense-replace=1")),
    ("qwen2-tied", "glm4_moe", experts(4, 1)),  # the only family with biases of q, k, v
    ("qwen2-tied", "glm4_moe", experts(3, 2, "--shared")),  # halves
    ("youtu", "deepseek_v3", experts(4, 2, "--granularity=2")),
    ("youtu", "deepseek_v3", experts(6, 3, "--granularity=4", "--shared")),
    ("qwen3", "qwen3_moe", experts(4, 4, "--norm-topk-prob=false")),  # all: they sum to 1
]


@pytest.mark.parametrize(
    "variant, family, options",
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_the_first_logits_are_the_dense_models(variant, family, options, dense, tmp_path, capsys):
    model, folder = dense(variant)
    out = tmp_path / "out"
    new = upcycle(folder, out, *options)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == new.config.model_type == family
    wanted = theirs(model)
    close(theirs(new), wanted)
    said = capsys.readouterr().out
    assert "first loss     the dense model's: weights sum to 1" in said and str(out) in said

    before = safetensors.numpy.load_file(folder / "model.safetensors")
    after = safetensors.numpy.load_file(out / "model.safetensors")
    kept = {name for name in before if ".mlp." not in name}
    assert kept <= after.keys()
    for name in kept:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)

    pieces = int(dict(o.split("=") for o in options if "=" in o).get("--granularity", 1))
    shards = pieces - 1 if "--shared" in options and pieces > 1 else pieces
    routers = {n: a for n, a in after.items() if n.endswith("gate.weight")}
    assert len(routers) == config["num_hidden_layers"] - ("first-k" in "".join(options))
    for rows_ED in routers.values():
        copies = rows_ED.reshape(-1, shards, rows_ED.shape[1])
        np.testing.assert_array_equal(copies, np.repeat(copies[:, :1], shards, axis=1))
        assert len(np.unique(copies[:, 0], axis=0)) == len(copies)

    document = compression_map.read_document(str(out))
    assert document.operations[0]["kind"] == "upcycle" and document.operations[0]["exact"]
    assert document.map.num_experts == 0 and document.map.layer_map == (0, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("variant, family, options", [*CASES, *MORE])
def test_our_model_agrees(variant, family, options, dense, tmp_path):
    """As the dense model of transformers."""
    model, folder = dense(variant)
    upcycle(folder, tmp_path / "out", *options)
    close(hf.load(str(tmp_path / "out"))(IDS), theirs(model))


def test_noise_makes_experts_differ(dense, tmp_path, capsys):
    """By the share of each matrix's own standard deviation that was asked for, reproducibly."""
    _, folder = dense("plain-llama")
    options = experts(4, 2, "--noise=0.1", "--seed=3")
    upcycle(folder, tmp_path / "a", *options)
    upcycle(folder, tmp_path / "b", *options)
    assert "not the dense model's: --noise" in capsys.readouterr().out
    a, b = (safetensors.numpy.load_file(tmp_path / n / "model.safetensors") for n in "ab")
    before = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    parts = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    seen = {}
    for name, values in a.items():
        if found := re.fullmatch(
            r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.\d+\.(w\d)\.weight", name
        ):
            one = before[f"model.layers.{found[1]}.mlp.{parts[found[2]]}.weight"]
            share = (values - one).std() / one.std()
            assert 0.09 < share < 0.11, name  # 3,840 draws: a standard deviation of 0.001
            seen.setdefault((found[1], found[2]), []).append(values)
    assert len(seen) == 9
    for group in seen.values():
        assert len({v.tobytes() for v in group}) == 4
    assert not compression_map.read_document(str(tmp_path / "a")).operations[0]["exact"]


@pytest.mark.slow
def test_weights_that_do_not_sum_to_1_are_scaled_on_average(dense, tmp_path, capsys):
    """With a router that hardly tells copies apart the scaled model is nearly the dense one."""
    model, folder = dense("qwen3")
    options = experts(8, 2, "--norm-topk-prob=false", "--scale", "--router-std=0.001")
    new = upcycle(folder, tmp_path / "out", *options)
    assert "right on average" in capsys.readouterr().out
    wanted = theirs(model)
    error = np.abs(theirs(new) - wanted).max() / np.abs(wanted).max()
    assert 1e-5 < error < 0.02
    assert not compression_map.read_document(str(tmp_path / "out")).operations[0]["exact"]


def test_sums_of_weights():
    """Against a plain loop over tokens."""
    wanted = upcycle_plan.Wanted(8, 4, 2, norm_topk_prob=False, scale=True)
    model, _ = hf_model("qwen3")
    plan = upcycle_plan.make(model, wanted, False)
    mean, std = upcycle_plan.sums(plan, 1.5, 0)
    rng = np.random.default_rng(5)
    found = []
    for _ in range(20000):
        logits = np.repeat(rng.normal(size=4) * 1.5, 2)
        p = np.exp(logits) / np.exp(logits).sum()
        found.append(np.sort(p)[-4:].sum())
    # 4,096 and 20,000 draws with a standard deviation of 0.13: means within 5 of their errors
    assert abs(mean - np.mean(found)) < 5 * np.std(found) * (1 / 4096 + 1 / 20000) ** 0.5
    assert abs(std - np.std(found)) < 0.02


def hf_model(variant):
    from deepseek_jax.hf import configuration

    config = families.hub_config(variant)
    return configuration.to_model(config), config


def test_bfloat16_keeps_its_bits(dense, tmp_path):
    """Experts are pieces of the dense MLP, times a power of two; other factors are the family's own, or
    refused."""
    _, folder = dense("plain-llama")
    low = tmp_path / "low"
    low.mkdir()
    tensors = {
        n: torch.as_tensor(a).to(torch.bfloat16)
        for n, a in safetensors.numpy.load_file(folder / "model.safetensors").items()
    }
    safetensors.torch.save_file(tensors, low / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (low / "config.json").write_text(json.dumps(config))
    upcycle(low, tmp_path / "four", *experts(8, 4, "--granularity=4"))
    after = safetensors.torch.load_file(tmp_path / "four" / "model.safetensors")
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    for e in range(8):
        piece = after[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"]
        assert piece.dtype == torch.bfloat16
        assert torch.equal(piece, down[:, 20 * (e % 4) : 20 * (e % 4 + 1)] * 4)
    upcycle(low, tmp_path / "five", *experts(10, 5, "--granularity=5"))
    config = json.loads((tmp_path / "five" / "config.json").read_text())
    assert (config["model_type"], config["routed_scaling_factor"]) == ("glm4_moe", 5.0)


def test_a_second_upcycling_and_other_mistakes(dense, tmp_path, capsys):
    _, folder = dense("plain-llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for options, message in (
        (experts(4, 2, "--norm-topk-prob=false"), "the chosen weights do not sum to 1"),
        (
            experts(4, 2, "--scale"),
            "--scale has no effect: the weights of the chosen experts sum to 1",
        ),
        (experts(4, 5), "--experts-per-token=5 from 1 to that"),
        (experts(1, 1), "--experts=1 must be 2 or more"),
        (
            experts(4, 2, "--granularity=3"),
            "--granularity=3 does not divide the model's intermediate_size=80",
        ),
        (experts(6, 2, "--granularity=4"), "are not both multiples of 4"),
        (experts(8, 4, "--granularity=4", "--shared"), "are not both multiples of 3"),
        (experts(4, 2, "--noise=-1"), "--noise=-1.0 must be from 0 to 10"),
        (
            experts(4, 2, "--first-k-dense-replace=3"),
            "is not below the model's num_hidden_layers=3",
        ),
        (experts(4, 2, "--first-k-dense-replace=1"), ""),  # glm4_moe has dense layers first
    ):
        out = tmp_path / f"out{len(message)}"
        code = refused(folder, out, *options)
        err = capsys.readouterr().err
        if message:
            assert code == 2 and message in err and err.count("\n") == 1, err
            assert not out.exists()
        else:
            assert code == 0
            made = out
    for source, target, message in (
        (made, tmp_path / "x", "has 4 routed experts a layer already"),
        (folder, tmp_path / "full", "exists already"),
        (tmp_path / "full", tmp_path / "x", "holds no model"),
    ):
        code = refused(source, target, *experts(4, 2))
        err = capsys.readouterr().err
        assert code == 2 and message in err and err.count("\n") == 1, err
