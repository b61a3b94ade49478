"""Muon, by optax, one matrix of a stacked weight at a time.

Sources: Jordan et al. 2024 (github.com/KellerJordan/Muon), scaled to AdamW's update size as in Moonlight
  (arXiv:2502.16982).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from optax.contrib import MuonDimensionNumbers

from deepseek_jax.parallel.mesh import per_device
from deepseek_jax.parallel.sharding import logical_axes
from deepseek_jax.train.stacked import STACKED_AXES, Stacked, stacked_dimensions

# root mean square of Muon's update of a matrix, as AdamW's usually is: both then take the same learning rate
# and weight decay
MUON_RMS = 0.2
# elements of the matrices that a device orthogonalises at a time: 64 MiB in each of some five arrays; a
# larger matrix alone
CHUNK = 2**24


def muon_labels(params: nnx.State) -> Any:
    """ "muon" for the matrices of the layers, router included; "adamw" for norms, embedding and output head
    (as Moonlight's).
    """

    def label(v: nnx.Variable) -> nnx.Variable:
        axes = [name for name in logical_axes(v) if name not in STACKED_AXES]
        return v.replace("muon" if len(axes) == 2 and "vocab" not in axes else "adamw")

    return jax.tree.map(label, params, is_leaf=lambda v: isinstance(v, nnx.Variable))


def scale_by_muon(
    params: nnx.State, momentum: float, adamw: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised, for what `muon_labels` calls so; `adamw`, without learning rate and
    decay, for the rest.

    Momentum is `m = g + momentum * m`, and what is orthogonalised `g + momentum * m`: with the gradient's
    share (1 - momentum) of other implementations both are smaller by a factor, which orthogonalisation takes
    out.
    """
    stacked = stacked_dimensions(params)

    def update(updates, state, params=None):
        def of(s, u):
            return u if isinstance(u, optax.MaskedNode) else orthogonalised(u, s)

        return jax.tree.map(of, stacked, updates), state

    muon = optax.chain(
        optax.trace(momentum, nesterov=True),
        optax.GradientTransformation(lambda _: optax.EmptyState(), update),
    )
    return optax.partition({"muon": muon, "adamw": adamw}, muon_labels(params))


def orthogonalised(update: jax.Array, stacked: Stacked) -> jax.Array:
    """Every matrix of a stacked update with its singular values brought near 1, and scaled to the root mean
    square MUON_RMS.

    A matrix must be whole for that. Where the mesh divides its rows or columns, an all-to-all makes each of n
    devices hold some whole matrices instead of an n-th of each, and a second one brings the results back: as
    many bytes as the update has on the device, twice, and no device computes what another one does but for
    filling up the number of matrices to a multiple of n. It goes through them CHUNK by CHUNK. Over axes that
    do not divide the weight, all devices compute the same. 5 steps cost 5 (4 m^2 n + 2 m^3) FLOPs for a
    matrix of m <= n.

    Args:
      update: float32, in any layout. stacked: its dimensions that are not of a matrix.

    Returns:
      The same shape and layout.
    """
    spec = jax.typeof(update).sharding.spec

    def named(d):
        return () if spec[d] is None else (spec[d],) if isinstance(spec[d], str) else tuple(spec[d])

    (m, n), divided = zip(
        *((update.shape[d], named(d)) for d in range(update.ndim) if d not in stacked.dimensions),
        strict=True,
    )

    def one_chunk(matrices):
        for dimension, axes in enumerate(divided, 1):
            if axes:
                matrices = lax.all_to_all(
                    matrices, axes, split_axis=0, concat_axis=dimension, tiled=True
                )
        matrices = jax.vmap(_orthogonalised)(matrices) * (MUON_RMS * math.sqrt(max(m, n)))
        for dimension, axes in reversed(list(enumerate(divided, 1))):
            if axes:
                matrices = lax.all_to_all(
                    matrices, axes, split_axis=dimension, concat_axis=0, tiled=True
                )
        return matrices

    def one_device(u):
        u = stacked.first(u)
        matrices, ways = (
            u.reshape(-1, *u.shape[-2:]),
            math.prod(lax.axis_size(a) for axes in divided for a in axes),
        )
        count = len(matrices)
        steps = -(-count // (ways * max(1, CHUNK // (m * n))))
        size = -(-count // (ways * steps)) * ways
        matrices = jnp.pad(matrices, ((0, steps * size - count), (0, 0), (0, 0))).reshape(
            steps, size, *u.shape[-2:]
        )
        return stacked.back(
            lax.map(one_chunk, matrices).reshape(-1, *u.shape[-2:])[:count].reshape(u.shape)
        )

    return per_device(one_device, (spec,), spec)(update)


def _orthogonalised(matrix: jax.Array) -> jax.Array:
    """Newton-Schulz by optax: without momentum its Muon does nothing else."""
    muon = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=MuonDimensionNumbers(0, 1)
    )
    return muon.update(matrix, muon.init(matrix))[0]
