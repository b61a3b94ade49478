"""Experts around a shared core: the product, the same on every mesh, counts, what is refused. That a whole
model computes the formula: tests/compress/test_checkpoint0.py."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from deepseek_jax.config.options import Config, LoraConfig, MeshConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.model import shared_core
from deepseek_jax.model.count import count
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.parallel.mesh import make_mesh
from tests.support import conversion, invariance

RANK = 4
# A dense layer, two with experts, and for counts one of multi-token prediction.
MODEL = conversion.smaller(
    invariance.MODEL, num_hidden_layers=3, num_nextn_predict_layers=0, shared_core_rank=RANK
)
WITH_MTP = dataclasses.replace(MODEL, num_nextn_predict_layers=1)
STEPS = 2


def random_factors(inputs, outputs, experts=3, rank=2):
    rng = np.random.default_rng(0)
    shapes = [(inputs, outputs)] + [(experts, w, rank) for w in (inputs, inputs, outputs, outputs)]
    return [rng.standard_normal(shape) for shape in shapes]


@pytest.mark.parametrize("inputs, outputs", [(6, 5), pytest.param(5, 6, marks=pytest.mark.slow)])
def test_product_and_gradient_are_those_of_the_formula(inputs, outputs):
    """float32 against float64, to rounding."""
    factors = random_factors(inputs, outputs)
    core, u_in, v_in, u_out, v_out = factors
    wanted = np.stack(
        [
            (
                (np.eye(outputs) + u_out[e] @ v_out[e].T)
                @ core.T
                @ (np.eye(inputs) + u_in[e] @ v_in[e].T)
            ).T
            for e in range(3)
        ]
    )
    weight = np.random.default_rng(1).standard_normal(wanted.shape)

    @jax.jit
    def run(*given):
        def weighted(*given):
            out = shared_core.product(*given)
            return (out * weight).sum(), out

        return jax.grad(weighted, range(5), has_aux=True)(*given)

    found, made = run(*(a.astype(np.float32) for a in factors))
    conversion.assert_close(made, wanted, 1e-6)
    core, u_in, v_in, u_out, v_out = exact = [torch.tensor(a).requires_grad_() for a in factors]
    first = torch.eye(inputs).double() + u_in @ v_in.mT
    last = torch.eye(outputs).double() + u_out @ v_out.mT
    ((last @ core.T @ first).mT * torch.tensor(weight)).sum().backward()
    for a, b in zip(found, exact, strict=True):
        conversion.assert_close(a, b.grad.numpy(), 1e-5)


def variant(**options) -> Config:
    return dataclasses.replace(invariance.variant(**options), model=MODEL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(fsdp=4, expert=2),
        dict(fsdp=2, expert=2, tensor=2, dispatch="ring"),
        dict(data=2, expert=4, strategy="shard_grad_op", dispatch="all_gather"),
        dict(stage=2, fsdp=2, expert=2),
        dict(fsdp=2, tensor=2, remat="none", accumulation=2),
        dict(data=4, fsdp=2, strategy="hybrid_shard", remat="dots"),
    ],
    ids=str,
)
def test_the_mesh_does_not_change_the_numbers(options):
    """Losses, gradients of the first step, experts chosen."""
    one = invariance.one_device(MODEL, STEPS)
    assert any(np.any(g) for name, g in one.gradients if name.endswith("input_wrapper/U"))
    assert any(np.any(g) for name, g in one.gradients if name.endswith("output_wrapper/V"))
    loss, gradient, name, counts = invariance.differences(
        invariance.train(variant(**options), STEPS), one
    )
    assert loss < 1e-5 and gradient < 1e-5 and counts, (loss, gradient, name)


def test_counts():
    """By hand: core and factors among the parameters; FLOPs of experts as if each had its own weights."""
    config = dataclasses.replace(variant(), model=WITH_MTP)
    shared = count(WITH_MTP, abstract_model(config)[1], 32)
    plain_model = dataclasses.replace(WITH_MTP, shared_core_rank=0)
    plain = count(
        plain_model, abstract_model(dataclasses.replace(config, model=plain_model))[1], 32
    )
    d, f, e, k = MODEL.hidden_size, MODEL.moe_intermediate_size, MODEL.n_routed_experts, 2
    assert MODEL.num_experts_per_tok == k
    layers = MODEL.num_hidden_layers - MODEL.first_k_dense_replace
    core, wrappers = 3 * d * f, 3 * 2 * RANK * (d + f)
    assert shared.total - plain.total == layers * (core + e * wrappers - e * core)
    assert shared.active - plain.active == layers * (core + k * wrappers - k * core)
    assert shared.mtp - plain.mtp == core + e * wrappers - e * core
    assert math.isclose(shared.flops_per_token, plain.flops_per_token, rel_tol=1e-12)


def test_every_wrapper_can_learn_at_the_start():
    """A fresh model has the core's output in every expert, and no factor is out of reach of the gradient."""
    _, params, _ = abstract_model(variant())
    paths = {"/".join(map(str, p)) for p, _ in nnx.to_flat_state(params)}
    for projection in ("gate", "up", "down"):
        stem = f"layers/mlp/experts/{projection}_shared_core"
        for name in ("core", "input_wrapper/U", "output_wrapper/V"):
            assert f"{stem}/{name}" in paths


@pytest.mark.parametrize(
    "change, said",
    [
        (
            dict(shared_core_rank=33),
            "shared_core_rank=33 is above config.model.moe_intermediate_size=32",
        ),
        (
            dict(first_k_dense_replace=3, num_nextn_predict_layers=0),
            "no layer has any .*Set config.model.shared_core_rank=0",
        ),
    ],
)
def test_what_no_model_can_be_is_refused(change, said):
    config = dataclasses.replace(variant(), model=dataclasses.replace(MODEL, **change))
    with pytest.raises(UserError, match=said):
        validate(config)


def test_what_does_not_go_with_it_is_refused():
    with pytest.raises(UserError, match="config.lora.r=4.*multiply-out"):
        validate(dataclasses.replace(variant(), lora=LoraConfig(r=4)))
    config = variant()
    table = dataclasses.replace(config.esft, experts="experts.json")
    with pytest.raises(UserError, match="config.esft.experts=experts.json.*share their core"):
        validate(dataclasses.replace(config, esft=table))
    odd = dataclasses.replace(MODEL, moe_intermediate_size=12, hidden_size=64)
    config = dataclasses.replace(config, model=odd, mesh=MeshConfig(fsdp=8))
    with pytest.raises(
        UserError, match="moe_intermediate_size=12 is not divisible by the 8 devices"
    ):
        make_mesh(config, jax.devices())
