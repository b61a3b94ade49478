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
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from deepseek_jax.config.options import IGNORE, Config, ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf.compression_map import CompressionMap
from deepseek_jax.model.layers import linear, param
from deepseek_jax.model.taps import Asked, Tap
from deepseek_jax.model.transformer import Output
from deepseek_jax.objectives.base import Batch, FrozenOutput, Parts
from deepseek_jax.objectives.routing import count
from deepseek_jax.parallel.mesh import TOKEN_AXES, TOKENS, per_device
from deepseek_jax.parallel.weights import apply_weight

NO_TEACHER = -1  # fills up the list of a merged expert's teachers


class Totals(NamedTuple):
    """Of the whole batch of a step, float32."""

    scored: jax.Array
    tokens: jax.Array


class Hidden(NamedTuple):
    """Which hidden states are compared, and how."""

    weight: float
    kind: str  # cosine | mse
    pairs: tuple[tuple[int, int], ...]  # (student's layer, teacher's layer), ascending in the first
    widths: tuple[int, int]  # of student and teacher

    @property
    def student_layers(self) -> tuple[int, ...]:
        return tuple(s for s, _ in self.pairs)

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        return tuple(sorted({t for _, t in self.pairs}))


class Router(NamedTuple):
    """Which routers are compared, and which experts of the teacher stand for which."""

    weight: float
    scoring: tuple[str, str]  # scoring_func of student and teacher
    layers: tuple[
        int, ...
    ]  # of each MoE layer of the student the number of the teacher's among its own
    teachers_LEG: np.ndarray  # int32: experts of the teacher, NO_TEACHER after the last


class Features(NamedTuple):
    """What of the inside is distilled: a part of an objective."""

    hidden: Hidden | None
    router: Router | None

    @property
    def taps(self) -> Asked:
        """Of the student's layers."""
        return self._taps(self.hidden and self.hidden.student_layers)

    @property
    def teacher_taps(self) -> Asked:
        """Of the teacher's layers."""
        return self._taps(self.hidden and self.hidden.teacher_layers)

    def _taps(self, layers: tuple[int, ...] | None) -> Asked:
        of_hidden = (Tap("hidden", layers),) if layers else ()
        return (*of_hidden, *(("router_logits",) if self.router else ()))

    def projection(self, seed: int) -> Callable[[], nnx.Module] | None:
        """Makes the maps from the student's hidden states to the teacher's, for Frozen.projection; None where
        these are of the same width.
        """
        h = self.hidden
        if h is None or h.widths[0] == h.widths[1]:
            return None
        return functools.partial(Projection, len(h.pairs), *h.widths, seed)

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


# ---- which layers and which experts


def features_of(config: Config, teacher: ModelConfig, found: CompressionMap | None) -> Features:
    """What config.distill asks for of the inside.

    Args:
      config: the options.
      teacher: the model's options of the teacher.
      found: what compression wrote of the student (config.distill.map); None: nothing.

    Raises:
      UserError: layers or experts of the two do not go together.
    """
    d = config.distill
    if found is not None and (d.hidden_weight or d.router_weight):
        _check_map(config, teacher, found)
    hidden = router = None
    if d.hidden_weight:
        pairs = layer_pairs(config, teacher, found)
        widths = config.model.hidden_size, teacher.hidden_size
        hidden = Hidden(d.hidden_weight, d.hidden_loss, pairs, widths)
    if d.router_weight:
        router = _router_of(config, teacher, found)
    return Features(hidden, router)


def layer_pairs(
    config: Config, teacher: ModelConfig, found: CompressionMap | None
) -> tuple[tuple[int, int], ...]:
    """The pairs of layers whose hidden states are compared: those of config.distill.hidden_layers; else all
    of the student's, with those that compression kept or spread evenly, the last with the last.

    Raises:
      UserError: hidden_layers is not understood, or names a layer twice or one that is not there.
    """
    text = config.distill.hidden_layers
    ours, theirs = config.model.num_hidden_layers, teacher.num_hidden_layers
    if not text:
        if found is not None:
            return tuple(enumerate(found.layer_map))
        return tuple((i, max(round((i + 1) * theirs / ours) - 1, 0)) for i in range(ours))
    option = f"config.distill.hidden_layers={text}"
    pairs = []
    for part in text.split(","):
        m = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", part)
        if not m:
            raise UserError(
                f"{option}: {part.strip()!r} is no pair of layers. Write STUDENT:TEACHER, counted from 0, as "
                f"in 2:4,5:11."
            )
        pair = int(m[1]), int(m[2])
        for layer, layers, who in zip(pair, (ours, theirs), ("student", "teacher"), strict=True):
            if layer >= layers:
                raise UserError(
                    f"{option}: the {who} has {layers} layers, 0 to {layers - 1}, and no layer {layer}. Name "
                    f"layers that are there."
                )
        pairs.append(pair)
    students = [s for s, _ in pairs]
    if twice := [s for s in students if students.count(s) > 1]:
        raise UserError(
            f"{option}: layer {twice[0]} of the student stands in two pairs. Leave one."
        )
    return tuple(sorted(pairs))


def _router_of(config: Config, teacher: ModelConfig, found: CompressionMap | None) -> Router:
    m, weight = config.model, config.distill.router_weight
    option = f"config.distill.router_weight={weight:g}"
    for model, who in ((m, "the model that is trained"), (teacher, "the teacher")):
        if not model.has_experts:
            raise UserError(f"{option}: {who} has no experts, and so no router. Set it to 0.")
    dense, of_teacher = m.first_k_dense_replace, teacher.first_k_dense_replace
    if found is None:
        for name in ("n_routed_experts", "num_hidden_layers", "first_k_dense_replace"):
            ours, theirs = getattr(m, name), getattr(teacher, name)
            if ours != theirs:
                raise UserError(
                    f"{option}: {name} is {ours}, and {theirs} of the teacher, and nothing says which of its "
                    f"experts are which. Set config.distill.map to the compression.json that made this model."
                )
        layers = tuple(range(m.num_hidden_layers - dense))
        experts = [[[e] for e in range(m.n_routed_experts)] for _ in layers]
    else:
        chosen = found.layer_map[dense:]
        for student, layer in enumerate(chosen, dense):
            if layer < of_teacher:
                raise UserError(
                    f"{option}: layer {student} stands for layer {layer} of the teacher, which has no "
                    f"experts. Set it to 0."
                )
        layers = tuple(layer - of_teacher for layer in chosen)
        experts = [[list(e) for e in layer] for layer in found.expert_map[: len(layers)]]
    most = max(len(e) for layer in experts for e in layer)
    full = [[[*e, *[NO_TEACHER] * (most - len(e))] for e in layer] for layer in experts]
    scoring = m.scoring_func, teacher.scoring_func
    return Router(weight, scoring, layers, np.asarray(full, np.int32))


def _check_map(config: Config, teacher: ModelConfig, found: CompressionMap) -> None:
    """Raises UserError: the map is not of this student and this teacher."""
    m, where = config.model, f"config.distill.map={config.distill.map or config.init_from}"
    other = "Name the compression.json of this model, and the teacher that it was made from."
    for what, said, has, who in (
        ("layers", found.num_hidden_layers, teacher.num_hidden_layers, "the teacher"),
        ("layers", len(found.layer_map), m.num_hidden_layers, "this model"),
    ):
        if said != has:
            raise UserError(f"{where} is of {said} {what}, and {who} has {has}. {other}")
    if outside := [
        layer for layer in found.layer_map if not 0 <= layer < teacher.num_hidden_layers
    ]:
        raise UserError(
            f"{where} names layer {outside[0]}, and the teacher has {teacher.num_hidden_layers}. {other}"
        )
    if not config.distill.router_weight or not (m.has_experts and teacher.has_experts):
        return
    moe_layers = m.num_hidden_layers - m.first_k_dense_replace
    if found.num_experts != teacher.n_routed_experts:
        raise UserError(
            f"{where} is of {found.num_experts} experts, and the teacher has {teacher.n_routed_experts}. "
            f"{other}"
        )
    if len(found.expert_map) not in (moe_layers, moe_layers + m.num_nextn_predict_layers):
        raise UserError(
            f"{where} has experts of {len(found.expert_map)} layers, and this model has {moe_layers} with "
            f"experts. {other}"
        )
    # Rows of multi-token prediction come after those of the main layers.
    for layer, experts in enumerate(found.expert_map[:moe_layers], m.first_k_dense_replace):
        if len(experts) != m.n_routed_experts:
            raise UserError(
                f"{where} has {len(experts)} experts in layer {layer}, and this model has "
                f"{m.n_routed_experts}. {other}"
            )
        named = [e for of_one in experts for e in of_one]
        bad = [e for e in named if not 0 <= e < found.num_experts or named.count(e) > 1]
        if bad or not all(experts):
            said = (
                f"expert {bad[0]} twice, or is not there" if bad else "an expert without a teacher"
            )
            raise UserError(
                f"{where}: layer {layer} has {said}. Each expert stands for other experts of the teacher: "
                f"make the file again with python -m deepseek_jax.compress."
            )
