"""compress shared-core: the closed start, the fit against the guide's own in torch, what is written, what is
refused. The format: test_checkpoint0.py."""

import json
import os

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from deepseek_jax import hf
from deepseek_jax.compress import __main__ as compress
from deepseek_jax.compress import shared_core_fit, shared_core_start
from deepseek_jax.compress.fitted import Fitted
from deepseek_jax.compress.multiplied_out import product
from deepseek_jax.errors import UserError
from deepseek_jax.hf import compression_map
from tests.support import checkpoint0, conversion, evaluation, hf_families

IDS = np.random.default_rng(0).integers(0, 300, (2, 16))


def experts(kind: str, count=6, inputs=24, outputs=16) -> np.ndarray:
    """float32 [E, I, O]: unlike one another; or one matrix, bent for each, with noise."""
    rng = np.random.default_rng(1)
    if kind == "unlike":
        return (rng.standard_normal((count, inputs, outputs)) * 0.02).astype(np.float32)
    core = rng.standard_normal((inputs, outputs)) * 0.02
    out = []
    for _ in range(count):
        left, right = (
            np.eye(n) + rng.standard_normal((n, 3)) @ rng.standard_normal((3, n)) * 0.05
            for n in (inputs, outputs)
        )
        out.append(left @ core @ right + rng.standard_normal(core.shape) * 0.003)
    return np.stack(out).astype(np.float32)


def relative(factors, weights: np.ndarray) -> float:
    """|W - W^|^2 / |W|^2 in float64."""
    core, *rest = (np.asarray(a, np.float64) for a in factors)
    u_in, v_in, u_out, v_out = rest
    made = np.stack(
        [
            (np.eye(len(v_in[e])) + v_in[e] @ u_in[e].T)
            @ core
            @ (np.eye(len(v_out[e])) + v_out[e] @ u_out[e].T)
            for e in range(len(u_in))
        ]
    )
    return float(np.sum((weights - made) ** 2) / np.sum(weights.astype(np.float64) ** 2))


def plain_adam(weights: np.ndarray, rank: int, steps: int, lr: float) -> float:
    """The relative loss that torch's Adam reaches from the mean, with matrices multiplied as written."""
    w = torch.tensor(weights).transpose(1, 2)  # [E, out, in]
    e, outputs, inputs = w.shape
    torch.manual_seed(0)
    core = w.mean(0).clone().requires_grad_()
    wrappers = [
        (torch.randn(e, n, rank) / rank**0.5 if i % 2 else torch.zeros(e, n, rank)).requires_grad_()
        for i, n in enumerate((inputs, inputs, outputs, outputs))
    ]
    adam = torch.optim.Adam([core, *wrappers], lr=lr)
    u_in, v_in, u_out, v_out = wrappers

    def loss():
        first = torch.eye(inputs) + u_in @ v_in.transpose(1, 2)
        last = torch.eye(outputs) + u_out @ v_out.transpose(1, 2)
        return ((w - last @ core @ first) ** 2).sum()

    for _ in range(steps):
        adam.zero_grad()
        loss().backward()
        adam.step()
    return float(loss().detach() / (w**2).sum())


@pytest.mark.parametrize(
    "kind, inputs, outputs",
    [
        ("bent", 24, 16),
        pytest.param("unlike", 24, 16, marks=pytest.mark.slow),
        pytest.param("bent", 16, 24, marks=pytest.mark.slow),
        pytest.param("unlike", 16, 24, marks=pytest.mark.slow),
    ],
)
def test_the_fit_is_at_least_as_good_as_plain_adam(kind, inputs, outputs):
    """After as many steps, and with none it is no worse than the mean, where that begins."""
    weights = experts(kind, inputs=inputs, outputs=outputs)
    factors, losses = shared_core_fit.fit(weights, 3, 200, 1e-3)
    assert losses.end == pytest.approx(relative(factors, weights), rel=1e-3)
    assert losses.end <= losses.start <= losses.mean
    mean = np.sum((weights - weights.mean(0)) ** 2) / np.sum(weights**2)
    assert losses.mean == pytest.approx(mean, rel=1e-4)
    assert losses.end <= plain_adam(weights, 3, 200, 1e-3)
    begin = shared_core_start.closed_form(weights, 3, jax.random.key(0))
    assert losses.start == pytest.approx(relative(begin, weights), rel=1e-3)
    assert losses.start < 0.8 * losses.mean


@pytest.mark.slow
def test_the_start_is_the_best_wrapper_of_one_side():
    """Where a core of full rank lets one side reach everything: the singular values say what is left."""
    weights = experts("unlike", inputs=24, outputs=16)
    core = weights.mean(0)
    p, q = shared_core_start.regression(core.T, (weights[0] - core).T, 5)  # K = (I + V U^T) core
    left = np.linalg.norm((weights[0] - core).T - core.T @ np.asarray(p) @ np.asarray(q).T)
    singular = np.linalg.svd(weights[0] - core, compute_uv=False)
    assert left == pytest.approx(np.linalg.norm(singular[5:]), rel=1e-3)


@pytest.mark.slow
def test_experts_that_are_one_lose_nothing_and_can_learn():
    weights = np.repeat(experts("unlike", count=1), 4, axis=0)
    factors, losses = shared_core_fit.fit(weights, 2, 10, 1e-3)
    assert losses.end < 1e-12
    assert np.all(np.linalg.norm(factors.v_in_EIR, axis=1) > 0.1)
    assert np.all(np.linalg.norm(factors.v_out_EOR, axis=1) > 0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return evaluation.write_model(folder), folder


def run(*argv) -> None:
    assert compress.main([str(a) for a in argv]) == 0


@pytest.mark.slow
def test_a_stopped_fit_goes_on(model, tmp_path, monkeypatch, capsys):
    """Stopped after a projection, the folder is that of a fit that was not, to the bit; so is workers'."""
    argv = ("shared-core", model[1], "--rank=3", "--steps=30")
    run(*argv[:2], tmp_path / "one", *argv[2:])
    fit, done = shared_core_fit.fit, []

    def stopping(*args):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return fit(*args)

    with monkeypatch.context() as m:
        m.setattr(shared_core_fit, "fit", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(*argv[:2], tmp_path / "two", *argv[2:])
    assert os.listdir(tmp_path / "two.fit") and not (tmp_path / "two").exists()
    with pytest.raises(UserError, match="rank=3 there, 4 here"):
        run(*argv[:2], tmp_path / "two", "--rank=4", "--steps=30")
    (damaged,) = (tmp_path / "two.fit").glob("*gate.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-7])
    run(*argv[:2], tmp_path / "two", *argv[2:])
    for i in (1, 0):
        run(*argv[:2], tmp_path / "three", *argv[2:], f"--worker={i}/2")
    assert not (tmp_path / "three").exists()
    run(*argv[:2], tmp_path / "three", *argv[2:])
    said = capsys.readouterr().out
    assert "3 of 3 parts are fitted already" in said and "mean, fitted" in said
    files = {
        name: (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("one", "two", "three")
    }
    assert files["one"] == files["two"] == files["three"]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".fit")]


@pytest.mark.slow
def test_what_is_written(model, tmp_path, capsys):
    """Factors in the guide's names, other tensors as they were; losses that the file itself has; the same
    model multiplied out."""
    theirs, folder = model
    text = tmp_path / "text.txt"
    text.write_text("hello world, be kind and sunny\n" * 40)
    out, plain = tmp_path / "out", tmp_path / "plain"
    argv = ("--rank=4", "--steps=50", f"--text={text}", "--dtype=float32")
    run("shared-core", folder, out, *argv)
    run("shared-core", folder, plain, *argv, "--multiplied-out")
    student = checkpoint0.build(evaluation.write_model(tmp_path), 4, 0)
    stored = safetensors.numpy.load_file(out / "model.safetensors")
    student.load_state_dict({n: torch.tensor(a) for n, a in stored.items()}, strict=True)
    before = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in before.keys() & stored.keys():
        np.testing.assert_array_equal(stored[name], before[name])
    assert {n.split(".experts.")[0] for n in before.keys() - stored.keys()} == {
        "model.layers.1.mlp"
    }
    config = json.loads((out / "config.json").read_text())
    assert config["compression_config"] == {"rank": 4}
    document = compression_map.read_document(str(out))
    (operation,) = document.operations
    assert operation["kind"] == "shared_core" and operation["rank"] == 4
    original = hf.load(str(folder))
    w = np.asarray(original.params["layers"]["mlp"]["experts"]["down_proj"].get_value())[0]
    stem = "model.layers.1.mlp.experts.down_shared_core"
    of_file = [stored[f"{stem}.core"].T] + [
        np.stack([stored[f"{stem}.experts.{e}.{side}_wrapper.{f}"] for e in range(4)])
        for side in ("input", "output")
        for f in "UV"
    ]
    mean, start, end = operation["losses"]["1/down"]
    assert relative(of_file, w) == pytest.approx(end, rel=1e-3) and end <= start <= mean
    conversion.assert_close(product(*of_file).mean(), w.mean(), 1)  # the layout is the same
    factors, multiplied = hf.load(str(out)), hf.load(str(plain))
    conversion.assert_close(multiplied(IDS), factors(IDS), 1e-5, "logits")
    errors = operation["layer_errors"]
    assert errors[0] == 0 and 0 < errors[1] < 1
    kept = (32 * 16 + 4 * 2 * 4 * 48) / (4 * 32 * 16)
    assert operation["kept"] == pytest.approx(kept) and f"{kept:.1%}" in capsys.readouterr().out


@pytest.mark.slow
def test_factors_of_a_checkpoint_0_with_the_rest_of_its_model(model, tmp_path):
    """The guide's program saves experts alone: all other weights of its checkpoint-0 are random."""
    (tmp_path / "checkpoint-0").mkdir()
    student = checkpoint0.build(evaluation.write_model(tmp_path / "checkpoint-0"), 3, 0)
    good = {n: a.clone() for n, a in student.state_dict().items()}
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "shared_core" not in name:
                p.normal_()
    checkpoint0.write(student, tmp_path / "checkpoint-0", torch.float16)
    run("shared-core", model[1], tmp_path / "out", f"--factors-from={tmp_path / 'checkpoint-0'}")
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == good.keys()
    for name, a in stored.items():
        wanted = good[name].half().float() if "shared_core" in name else good[name]
        np.testing.assert_array_equal(a, wanted.numpy(), err_msg=name)
    with pytest.raises(UserError, match="--rank=5.*whose rank is 3"):
        run(
            "shared-core",
            model[1],
            tmp_path / "no",
            f"--factors-from={tmp_path / 'checkpoint-0'}",
            "--rank=5",
        )


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--rank=17"], "--rank=17 is not between 1 and 16"),
        (["--rank=0"], "--rank=0 is not between 1 and 16"),
        (["--rank=4", "--steps=-1"], "--steps=-1 is below 0"),
        (["--rank=4", "--lr=0"], "--lr=0.0 is not above 0"),
        (["--factors-from=."], "holds no model"),
        (["--worker=2/2"], "'2/2' is not I/N"),
    ],
)
def test_bad_options_are_refused(model, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, SystemExit), match=said):
        run("shared-core", model[1], tmp_path / "out", *argv)
    assert not list(tmp_path.iterdir())


def test_models_without_experts_are_refused(tmp_path):
    folder = tmp_path / "dense"
    folder.mkdir()
    hf_families.save("llama", folder)
    with pytest.raises(UserError, match="no routed experts. Name a mixture"):
        run("shared-core", folder, tmp_path / "out")
    with pytest.raises(UserError, match="no experts around a shared core"):
        run("multiply-out", folder, tmp_path / "out")


def test_the_folder_of_a_fit_is_of_one_fit(tmp_path):
    Fitted(str(tmp_path / "out"), {"rank": 3})
    Fitted(str(tmp_path / "out"), {"rank": 3})
    with pytest.raises(UserError, match="rank=3 there, 4 here"):
        Fitted(str(tmp_path / "out"), {"rank": 4})
