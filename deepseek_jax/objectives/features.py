"""Distillation of what is inside a model: hidden states of chosen layers, and the router.

Hidden states: the residual stream after layer s of the student against that after layer t of the teacher,
for each pair of config.distill.hidden_layers; 1 - cos or the mean squared error over its width, then the mean
over pairs and scored tokens. Only tokens that the loss scores count, as in NVIDIA's ModelOpt and Arcee's
DistillKit, which mask intermediate losses by the labels; MaxText takes the mean over padding too. Where the
widths differ each pair has a matrix of its own, D to D' (as in both): it learns with the student and is in
checkpoints, but in no export (train/projection.py).

The router: KL(teacher || student) of the probability that a token gives each expert, softmax of the logits or
normalised sigmoids, whichever the model has; neither selection bias nor groups, which only choose. The
teacher's is over the experts that the student kept, renormalised; an expert that was merged has the sum of
its teachers' probability (hf/compression_map.py). Mean over MoE layers and over all tokens but padding: a
prompt's tokens are routed too. Layers of multi-token prediction are left out: the teacher runs without its
own.

Both are exactly 0, with their gradients, where student and teacher compute the same.

Shape letters: model/layers.py, and N pairs of layers, G teachers of a merged expert; a teacher's widths are
primed in comments.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from deepseek_jax.config.options import IGNORE, Config, ModelConfig
from deepseek_jax.hf.compression_map import CompressionMap
from deepseek_jax.model.layers import linear, param
from deepseek_jax.model.taps import Asked, Tap
from deepseek_jax.model.transformer import Output
from deepseek_jax.objectives.base import Batch, Frozen, FrozenOutput, Parts
from deepseek_jax.objectives.correspondence import Hidden, Router, check_map, layer_pairs, router_of
from deepseek_jax.objectives.routing import count
from deepseek_jax.parallel.mesh import TOKEN_AXES, TOKENS, per_device
from deepseek_jax.parallel.weights import apply_weight


class Totals(NamedTuple):
    """Of the whole batch of a step, float32."""

    scored: jax.Array
    tokens: jax.Array


class Features(NamedTuple):
    """What of the inside is distilled, one of the two or both: a part of an objective."""

    hidden: Hidden | None
    router: Router | None

    @property
    def taps(self) -> Asked:
        """Of the student's layers."""
        return self._taps(self.hidden and self.hidden.student_layers)

    def ask(self, teacher: Frozen, seed: int) -> Frozen:
        """The teacher, asked for what is compared: taps, and where the widths differ a projection."""
        h = self.hidden
        taps = self._taps(h and h.teacher_layers)
        if h is None or h.widths[0] == h.widths[1]:
            return teacher._replace(taps=taps)
        made = functools.partial(Projection, len(h.pairs), *h.widths, seed)
        return teacher._replace(taps=taps, projection=made)

    def _taps(self, layers: tuple[int, ...] | None) -> Asked:
        of_hidden = (Tap("hidden", layers),) if layers else ()
        return (*of_hidden, *(("router_logits",) if self.router else ()))

    def totals(self, batch: Batch) -> Totals:
        """Of a whole batch, whose arrays may have any axes before S."""
        return Totals(count(batch["targets"] != IGNORE), count(batch["segment_ids"] > 0))

    def loss(
        self, out: Output, batch: Batch, totals: Totals, frozen_out: FrozenOutput
    ) -> tuple[jax.Array, Parts]:
        """A micro-batch's share: (weighted sum, the unweighted means by name)."""
        total, parts = jnp.float32(0), {}
        if h := self.hidden:
            hidden = self._hidden(h, out, batch, frozen_out) / jnp.maximum(totals.scored, 1)
            total, parts["hidden_loss"] = total + h.weight * hidden, hidden
        if r := self.router:
            kl = self._router(r, out, batch, frozen_out) / jnp.maximum(totals.tokens, 1)
            total, parts["router_loss"] = total + r.weight * kl, kl
        return total, parts

    @staticmethod
    def _hidden(h: Hidden, out: Output, batch: Batch, frozen_out: FrozenOutput) -> jax.Array:
        places = [h.teacher_layers.index(t) for _, t in h.pairs]
        sums_N = hidden_sums(
            h.kind,
            out.taps["hidden"],
            frozen_out.out.taps["hidden"],
            np.asarray(places, np.int32),
            batch["targets"] != IGNORE,
            frozen_out.projection,
        )
        return jnp.mean(sums_N)

    @staticmethod
    def _router(r: Router, out: Output, batch: Batch, frozen_out: FrozenOutput) -> jax.Array:
        student_LBSE = lax.slice_in_dim(out.taps["router_logits"], 0, len(r.layers))
        teacher_LBSE = frozen_out.out.taps["router_logits"]
        return jnp.mean(router_sums(r, student_LBSE, teacher_LBSE, batch["segment_ids"] > 0))


class Projection(nnx.Module):
    """A matrix [D, D'] for each pair of layers, [N, D, D'] in all.

    They begin with a standard deviation of D^-0.5, which keeps the size of what they map.
    """

    def __init__(self, pairs: int, width: int, teacher_width: int, seed: int):
        # Not the key with which the model's first weight is drawn.
        rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 1))
        init = nnx.initializers.normal(width**-0.5)
        self.kernel = param(rngs, init, (pairs, width, teacher_width), ("layers", "embed", "lora"))


def features_of(
    config: Config, teacher: ModelConfig, found: CompressionMap | None
) -> Features | None:
    """What config.distill asks for of the inside; None: nothing.

    Args:
      config: the options.
      teacher: the model's options of the teacher.
      found: what compression wrote of the student (config.distill.map); None: nothing.

    Raises:
      UserError: layers or experts of the two do not go together.
    """
    d = config.distill
    if not d.hidden_weight and not d.router_weight:
        return None
    if found is not None:
        check_map(config, teacher, found)
    hidden = router = None
    if d.hidden_weight:
        pairs = layer_pairs(config, teacher, found)
        widths = config.model.hidden_size, teacher.hidden_size
        hidden = Hidden(d.hidden_weight, d.hidden_loss, pairs, widths)
    if d.router_weight:
        router = router_of(config, teacher, found)
    return Features(hidden, router)


# ---- hidden states


def cosine_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """1 - cos over the last axis: half the squared distance of the two directions, which is exactly 0 for the
    same vector and loses no digits near it. A length below 1e-8 counts as that, as in PyTorch.
    """

    def direction(v):
        return v * lax.rsqrt(jnp.maximum(jnp.sum(v * v, axis=-1, keepdims=True), 1e-16))

    return 0.5 * jnp.sum(jnp.square(direction(a) - direction(b)), axis=-1)


def mean_squared_error(a: jax.Array, b: jax.Array) -> jax.Array:
    """Over the last axis."""
    return jnp.mean(jnp.square(a - b), axis=-1)


DISTANCES = {"cosine": cosine_distance, "mse": mean_squared_error}


def hidden_sums(
    kind: str,
    student_NBSD: jax.Array,
    teacher_NBSD: jax.Array,
    places_N: np.ndarray,
    counts_BS: jax.Array,
    projection: nnx.State | None = None,
) -> jax.Array:
    """float32 [N]: for each pair of layers the sum of the distances of all tokens that count.

    Args:
      kind: cosine | mse.
      student_NBSD: in the compute dtype.
      teacher_NBSD: [N', B, S, D'] in the teacher's compute dtype, without gradient.
      places_N: int32, which of N' each pair has.
      counts_BS: bool.
      projection: the parameters of `Projection`, where D and D' differ.
    """

    def pair(_, xs):
        student_BSD, place, own = xs
        teacher_BSD = lax.dynamic_index_in_dim(teacher_NBSD, place, 0, keepdims=False)
        if own is not None:
            student_BSD = apply_weight(linear, own["kernel"], student_BSD.dtype, student_BSD)
        a, b = (x.astype(jnp.float32) for x in (student_BSD, teacher_BSD))
        return None, jnp.sum(jnp.where(counts_BS, DISTANCES[kind](a, b), 0.0))

    # Without what is in float32 kept for the backward pass, of all pairs.
    xs = student_NBSD, jnp.asarray(places_N), projection
    return lax.scan(jax.checkpoint(pair), None, xs)[1]


# ---- the router


def log_scores(logits: jax.Array, scoring: str) -> jax.Array:
    """The logarithms of a router's scores, up to a constant of each token."""
    return jax.nn.log_sigmoid(logits) if scoring == "sigmoid" else logits


def kept_scores(scores_E: jax.Array, teachers_EG: jax.Array) -> jax.Array:
    """Logarithms of a teacher's scores, [..., E'], to those of the student's experts, [..., E]: of a merged
    one the sum of its teachers'. With a single teacher they are the teacher's to the last bit.
    """
    each = jnp.where(teachers_EG >= 0, scores_E[..., teachers_EG], -jnp.inf)
    return jax.nn.logsumexp(each, axis=-1)


def router_divergence(student_E: jax.Array, teacher_E: jax.Array) -> jax.Array:
    """KL(teacher || student) over the last axis, of logarithms of scores that need not be normalised.

    Its gradient is written down, share of the student less share of the teacher: exactly 0 for equal ones.
    """
    held = lax.stop_gradient(student_E)
    log_s, log_t = (jax.nn.log_softmax(a, axis=-1) for a in (held, lax.stop_gradient(teacher_E)))
    s, t = jnp.exp(log_s), jnp.exp(log_t)
    kl = jnp.sum(jnp.where(t > 0, t * (log_t - log_s), 0.0), axis=-1)
    return kl + jnp.sum((s - t) * (student_E - held), axis=-1)


def router_sums(
    r: Router, student_LBSE: jax.Array, teacher_LBSE: jax.Array, counts_BS: jax.Array
) -> jax.Array:
    """float32 [L]: for each MoE layer of the student the sum of the divergences of all tokens that count.

    Args:
      student_LBSE: the router's logits, float32.
      teacher_LBSE: [L', B, S, E'] of all MoE layers of the teacher, without gradient.
      counts_BS: bool.
    """

    def one_device(student_LBSE, teacher_LBSE, counts_BS):
        def layer(_, xs):
            student_BSE, place, teachers_EG = xs
            teacher_BSE = lax.dynamic_index_in_dim(teacher_LBSE, place, 0, keepdims=False)
            kept_BSE = kept_scores(log_scores(teacher_BSE, r.scoring[1]), teachers_EG)
            kl_BS = router_divergence(log_scores(student_BSE, r.scoring[0]), kept_BSE)
            return None, jnp.sum(jnp.where(counts_BS, kl_BS, 0.0))

        places = jnp.asarray(r.layers, jnp.int32)
        xs = student_LBSE, places, jnp.asarray(r.teachers_LEG)
        return lax.psum(lax.scan(jax.checkpoint(layer), None, xs)[1], TOKEN_AXES)

    specs = jax.P(None, *TOKENS), jax.P(None, *TOKENS), TOKENS
    return per_device(one_device, specs, jax.P())(student_LBSE, teacher_LBSE, counts_BS)
