"""Every function of the output head, in chunks and on a mesh, against plain autodiff of whole logits in
float64.

Tolerance: 1e-5 of an array's scale, for float32 sums in another order.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config.options import IGNORE, MeshConfig, ModelConfig
from deepseek_jax.model import head, logit_functions
from deepseek_jax.model.divergences import TopTeacher, WholeTeacher
from deepseek_jax.parallel import sharding
from deepseek_jax.parallel.mesh import make_mesh, per_device
from tests.support import conversion

B, S, D, TEACHER_D, V, K, T, BETA = 2, 13, 16, 12, 40, 5, 2.0, 0.3


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, (B, S))
    targets[0, 3:6] = targets[1, 12] = IGNORE
    teacher_hidden = rng.standard_normal((B, S, TEACHER_D))
    teacher_kernel = rng.standard_normal((TEACHER_D, V)) / 3
    logits = teacher_hidden @ teacher_kernel
    ids = np.argsort(-logits, axis=-1)[..., :K]
    lse = np.log(np.sum(np.exp(logits / T), axis=-1))
    return dict(
        hidden=rng.standard_normal((B, S, D)),
        kernel=rng.standard_normal((D, V)),
        targets=targets,
        valid=targets != IGNORE,
        weight=rng.random((B, S)),
        teacher_hidden=teacher_hidden,
        teacher_kernel=teacher_kernel,
        ids=ids,
        values=np.take_along_axis(logits, ids, axis=-1),
        lse=lse,
        all_ids=np.broadcast_to(np.arange(V)[::-1], (B, S, V)).copy(),
        all_values=logits[..., ::-1].copy(),
    )


def at(x_BSN, ids_BSN):
    return jnp.take_along_axis(x_BSN, ids_BSN, axis=-1)


def divergence(log_p_BSN, log_q_BSN):
    return jnp.sum(jnp.exp(log_p_BSN) * (log_p_BSN - log_q_BSN), axis=-1)


def mixture(log_t_BSN, log_s_BSN):
    log_m = jnp.log(BETA * jnp.exp(log_t_BSN) + (1 - BETA) * jnp.exp(log_s_BSN))
    return BETA * divergence(log_t_BSN, log_m) + (1 - BETA) * divergence(log_s_BSN, log_m)


def with_tail(log_p_BSK):
    """[B, S, K + 1]: the probability of all other tokens, as one more."""
    rest_BS1 = jnp.log1p(-jnp.sum(jnp.exp(log_p_BSK), axis=-1, keepdims=True))
    return jnp.append(log_p_BSK, rest_BS1, axis=-1)


def plain(a: dict, hidden, kernel) -> dict[str, jax.Array]:
    """Every value of every token, [B, S], from whole logits."""
    z, t = hidden @ kernel, a["teacher_hidden"] @ a["teacher_kernel"]
    log_p = jax.nn.log_softmax(z)
    log_s, log_t = jax.nn.log_softmax(z / T), jax.nn.log_softmax(t / T)
    log_target = at(log_p, jnp.maximum(a["targets"], 0)[..., None])[..., 0]
    inside_s, inside_t = at(log_s, a["ids"]), at(log_t, a["ids"])
    values = {
        "cross_entropy": -log_target,
        "weighted": -log_target * a["weight"],
        "log_probability": log_target,
        "entropy": -jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
        "kl": T**2 * divergence(log_t, log_s),
        "mixture": -0.4 * log_target + 0.6 * T**2 * mixture(log_t, log_s),
        "kl_to_top": T**2 * divergence(with_tail(inside_t), with_tail(inside_s)),
        "mixture_of_top": -0.4 * log_target
        + 0.6 * T**2 * mixture(with_tail(inside_t), with_tail(inside_s)),
        "kl_to_all": T**2 * divergence(log_t, log_s),
    }
    return {name: jnp.where(a["valid"], v, 0.0) for name, v in values.items()}


def ours(a: dict, hidden, weight: head.Head, teacher: head.Head, scan) -> dict[str, jax.Array]:
    frozen = ((a["teacher_hidden"], teacher),)
    targets, valid = a["targets"], a["valid"]
    alone, mixed = (1.0, jnp.float32(T), 0.0), (0.6, jnp.float32(T), BETA)  # alpha, T, beta
    top = a["ids"], a["values"], a["lse"], targets

    def walk(function, *inputs, **more) -> jax.Array:
        return scan(function, hidden, weight, *inputs, **more)[0]

    return {
        "cross_entropy": walk(logit_functions.cross_entropy, targets),
        "weighted": walk(
            logit_functions.weighted(logit_functions.cross_entropy), targets, a["weight"]
        ),
        "log_probability": walk(logit_functions.log_probability, targets),
        "entropy": walk(logit_functions.entropy, valid),
        "kl": walk(WholeTeacher("forward"), targets, *alone, frozen=frozen),
        "mixture": walk(WholeTeacher("mixture"), targets, *mixed, frozen=frozen),
        "kl_to_top": walk(TopTeacher("forward"), *top, *alone),
        "mixture_of_top": walk(TopTeacher("mixture"), *top, *mixed),
        "kl_to_all": walk(
            TopTeacher("forward"), a["all_ids"], a["all_values"], a["lse"], targets, *alone
        ),
    }


@functools.cache
def expected():
    """(values, gradients of their sums, gradients of the sums of their sines), by function, in float64."""
    a = arrays()
    with jax.enable_x64(True):
        values = plain(a, a["hidden"], a["kernel"])

        def total(f, name, hidden, kernel) -> jax.Array:
            return jnp.sum(f(plain(a, hidden, kernel)[name]))

        both = [
            {
                name: jax.grad(functools.partial(total, f, name), argnums=(0, 1))(
                    a["hidden"], a["kernel"]
                )
                for name in values
            }
            for f in (lambda x: x, jnp.sin)
        ]
        return jax.tree.map(np.asarray, (values, *both))


@pytest.mark.parametrize(
    "mesh,chunk,tied",
    [
        pytest.param({}, 1024, False, id="one device"),
        pytest.param(dict(fsdp=2, tensor=2), 5, True, id="2x2"),
    ],
)
@pytest.mark.slow
def test_functions_of_the_head(mesh, chunk, tied, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_TOKENS", chunk)
    a = arrays()
    config = dataclasses.replace(
        conversion.config_of(ModelConfig()), mesh=MeshConfig(**{"fsdp": 1} | mesh)
    )
    axes = ("vocab", "embed") if tied else ("embed", "vocab")

    def variable(w) -> head.Head:
        return head.Head(nnx.Param(w, out_sharding=axes, eager_sharding=False), tied)

    def run(a, kernel, teacher_kernel):
        def values(hidden, kernel, scan):
            return ours(a, hidden, variable(kernel), variable(teacher_kernel), scan)

        def gradients(f, scan):
            def total(name, hidden, kernel):
                return jnp.sum(f(values(hidden, kernel, scan)[name]))

            return {
                name: jax.grad(functools.partial(total, name), argnums=(0, 1))(a["hidden"], kernel)
                for name in each
            }

        each = values(a["hidden"], kernel, head.scan_vocab)
        sums = values(a["hidden"], kernel, head.scan_vocab_sum)
        return (
            each,
            sums,
            gradients(lambda x: x, head.scan_vocab_sum),
            gradients(jnp.sin, head.scan_vocab),
        )

    with jax.set_mesh(make_mesh(config, jax.devices()[: math.prod(mesh.values())])):
        spec = sharding.spec(axes, sharding.storage_rules(config)[0])

        def put(kernel_DV):
            return jax.device_put(jnp.float32(kernel_DV.T if tied else kernel_DV), spec)

        on_mesh = {k: conversion.put(v) for k, v in a.items() if "kernel" not in k}
        each, sums, of_sums, of_sines = jax.jit(run)(
            on_mesh, put(a["kernel"]), put(a["teacher_kernel"])
        )
    values, plain_sums, plain_sines = expected()
    for name, value in values.items():
        conversion.assert_close(each[name], value, what=name)
        conversion.assert_close(sums[name], value.sum(), what=name)
        for found, wanted in ((of_sums, plain_sums), (of_sines, plain_sines)):
            (dhidden, dkernel), (hidden, kernel) = found[name], wanted[name]
            conversion.assert_close(dhidden, hidden, what=f"{name}: hidden states")
            conversion.assert_close(dkernel.T if tied else dkernel, kernel, what=f"{name}: head")


def test_the_logit_of_a_target():
    """First and last words of each device's part, and tokens without a target: the float64 value, 0 there."""
    logits = np.random.default_rng(1).standard_normal((6, V))
    ids = np.asarray([0, V // 2 - 1, V // 2, V - 1, IGNORE, 7], np.int32)
    config = dataclasses.replace(
        conversion.config_of(ModelConfig()), mesh=MeshConfig(fsdp=1, tensor=2)
    )

    def one_device(logits_CV, ids_C):
        found = logit_functions.of_targets(logit_functions.Logits(logits_CV), ids_C)
        return found.nll_C, found.likeliest_C

    with jax.set_mesh(make_mesh(config, jax.devices()[:2])):
        specs = jax.P(None, "tensor"), jax.P()
        f = jax.jit(per_device(one_device, specs, (jax.P(), jax.P())))
        nll, likeliest = f(jax.device_put(jnp.float32(logits), specs[0]), ids)
    wanted = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(6), ids % V]
    conversion.assert_close(nll, np.where(ids == IGNORE, 0, wanted))
    best = logits.argmax(axis=1) == ids
    assert np.array_equal(np.asarray(likeliest)[ids != IGNORE], best[ids != IGNORE])


def test_tokens_of_a_chunk(monkeypatch):
    """On a CPU 1,024; on a GPU up to 4,096, fewer of a large vocabulary, and the last chunk is no less full
    than a tile of the others.
    """
    with conversion.on_mesh(conversion.config_of(ModelConfig())):
        assert head.chunk_tokens(16384, 102400) == 1024 and head.chunk_tokens(100, 8) == 100
    monkeypatch.setattr(head, "on_cpu", lambda: False)
    assert [head.chunk_tokens(16384, words) for words in (32000, 102400, 256000, 10**7)] == [
        4096,
        4096,
        2048,
        1024,
    ]
    assert head.chunk_tokens(100, 8) == 100
    for tokens in range(1, 20000, 331):
        size = head.chunk_tokens(tokens, 102400)
        padding = -(-tokens // size) * size - tokens
        assert size <= 4096 and padding < head.TILE * -(-tokens // size)


@pytest.mark.parametrize("kind,beta", [("forward", 0), ("reverse", 1), ("mixture", 0.3)])
def test_a_student_that_is_its_teacher(kind, beta):
    """No divergence and no gradient, to the last bit: their logits are made in one program."""
    a = arrays()
    with conversion.on_mesh(conversion.config_of(ModelConfig())):
        kernel = jax.device_put(jnp.float32(a["kernel"]), jax.P(None, "tensor"))
        hidden, targets = conversion.put(a["hidden"]), conversion.put(a["targets"])

        # All are arguments: XLA works out products of constants by other code.
        def loss(h, hidden, kernel):
            axes = ("embed", "vocab")
            one = head.Head(nnx.Param(kernel, out_sharding=axes, eager_sharding=False), tied=False)
            return head.scan_vocab_sum(
                WholeTeacher(kind), h, one, targets, 1.0, T, beta, frozen=((hidden, one),)
            )[0]

        value, gradient = jax.jit(jax.value_and_grad(loss))(hidden, hidden, kernel)
    assert float(value) == 0 and not np.asarray(gradient).any()
