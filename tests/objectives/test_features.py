"""Distillation of hidden states and of the router, against PyTorch in float64, and on every mesh.

Tolerance of values and gradients against PyTorch: 1e-5 of an array's scale, for float32. Across meshes: 1e-5,
for sums in another order.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config.options import Config, DistillConfig, ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf.compression_map import CompressionMap
from deepseek_jax.objectives import correspondence, features
from tests.support import conversion

TOKENS, WIDTH = 6, 8


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def with_gradient(f, x: np.ndarray):
    """(f(x), the gradient of its sum), in one program."""

    def run(x):
        value, pull = jax.vjp(f, x)
        return value, pull(jnp.ones_like(value))[0]

    return jax.jit(run)(x)


# ---- the losses themselves, against PyTorch


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_distances_are_pytorchs(kind):
    import torch

    a, b = (rng_of(i).standard_normal((TOKENS, WIDTH)).astype(np.float32) for i in (0, 1))
    b[2] = a[2] * (1 + 1e-4)  # nearly the same direction
    b[3] = -a[3]
    ours, ours_grad = with_gradient(lambda a: features.DISTANCES[kind](a, jnp.asarray(b)), a)
    x, y = torch.tensor(a, dtype=torch.float64, requires_grad=True), torch.tensor(b).double()
    theirs = {
        "cosine": lambda: 1 - torch.cosine_similarity(x, y, dim=-1),
        "mse": lambda: torch.nn.functional.mse_loss(x, y, reduction="none").mean(-1),
    }[kind]()
    theirs.sum().backward()
    conversion.assert_close(np.asarray(ours), theirs.detach().numpy())
    conversion.assert_close(np.asarray(ours_grad), x.grad.numpy())


def test_cosine_keeps_its_digits_near_0_and_is_finite_at_the_origin():
    a = rng_of(0).standard_normal((TOKENS, WIDTH)).astype(np.float32)
    noise = 1e-4 * rng_of(1).standard_normal(a.shape).astype(np.float32)
    b = a + noise
    x, y = a.astype(np.float64), b.astype(np.float64)
    exact = 1 - (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    # Around 1e-9: 1 - cos in float32 would be 0 or 6e-8.
    np.testing.assert_allclose(jax.jit(features.cosine_distance)(a, b), exact, rtol=1e-2)
    value, grad = with_gradient(lambda v: features.cosine_distance(v, b), a * 0)
    assert np.isfinite(value).all() and np.isfinite(grad).all()


EXPERTS = 8
MERGED = [[0, 5], [1], [2, 3, 7], [4]]  # expert 6 was dropped
MAPS = {
    "same": [[e] for e in range(EXPERTS)],
    "pruned": [[1], [4], [5], [7]],
    "merged": MERGED,
}


def torch_router(student, teacher, scoring, teacher_scoring, members):
    """KL(kept and summed teacher scores || student scores) of each token, by loops over experts."""
    import torch

    def scores(logits, kind):
        p = torch.sigmoid(logits) if kind == "sigmoid" else torch.softmax(logits, -1)
        return p / p.sum(-1, keepdim=True)

    s, t = scores(student, scoring), scores(teacher, teacher_scoring)
    kept = torch.stack([sum(t[:, e] for e in of_one) for of_one in members], -1)
    kept = kept / kept.sum(-1, keepdim=True)
    return (kept * (kept.log() - s.log())).sum(-1)


@pytest.mark.parametrize("members", list(MAPS))
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_router_divergence_is_pytorchs(scoring, members):
    import torch

    experts = MAPS[members]
    student = 2 * rng_of(0).standard_normal((TOKENS, len(experts))).astype(np.float32)
    teacher = 2 * rng_of(1).standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    groups = _padded(experts)

    def ours(logits):
        kept = features.kept_scores(features.log_scores(jnp.asarray(teacher), scoring), groups)
        return features.router_divergence(features.log_scores(logits, scoring), kept)

    value, grad = with_gradient(ours, student)
    x = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    theirs = torch_router(x, torch.tensor(teacher).double(), scoring, scoring, experts)
    theirs.sum().backward()
    conversion.assert_close(np.asarray(value), theirs.detach().numpy())
    conversion.assert_close(np.asarray(grad), x.grad.numpy())


def _padded(experts) -> np.ndarray:
    most = max(map(len, experts))
    return np.asarray(
        [[*e, *[correspondence.NO_TEACHER] * (most - len(e))] for e in experts], np.int32
    )


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_same_router_costs_exactly_nothing(scoring):
    logits = 5 * rng_of(0).standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    logits[0] *= 40  # scores that underflow in float32
    held = features.kept_scores(features.log_scores(logits, scoring), _padded(MAPS["same"]))

    def ours(logits):
        return jnp.sum(features.router_divergence(features.log_scores(logits, scoring), held))

    # Op by op: in one program XLA would round the student's scores otherwise than the constants are.
    value, grad = jax.value_and_grad(ours)(jnp.asarray(logits))
    assert value == 0 and not np.any(grad)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_the_same_hidden_state_costs_exactly_nothing(kind):
    a = jnp.asarray(rng_of(0).standard_normal((TOKENS, WIDTH)), jnp.float32)
    value, grad = jax.value_and_grad(lambda x: jnp.sum(features.DISTANCES[kind](x, a)))(a)
    assert value == 0 and not np.any(grad)


def test_experts_that_never_score_are_finite():
    """A softmax score of 0 in float32, in the student or the teacher."""
    student = jnp.asarray([[0.0, -200.0], [-200.0, 0.0]])
    teacher = jnp.asarray([[0.0, -300.0], [0.0, 0.0]])

    def total(student):
        return jnp.sum(features.router_divergence(student, teacher))

    value, grad = jax.jit(jax.value_and_grad(total))(student)
    # The second token: half of the teacher's probability on what the student gives e^-200.
    assert value == pytest.approx(0.5 * (200 + 2 * np.log(0.5)), rel=1e-6)
    assert np.isfinite(grad).all()


# ---- which layers and experts, and what is refused

STUDENT = ModelConfig(num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=4)
TEACHER = dataclasses.replace(STUDENT, num_hidden_layers=6, n_routed_experts=EXPERTS)
MAP = CompressionMap(
    layer_map=(0, 2, 5),
    expert_map=(((0, 5), (1,), (2, 3, 7), (4,)), ((1,), (4,), (5,), (7,))),
    num_experts=EXPERTS,
    num_hidden_layers=6,
)


def asked(model=STUDENT, **distill) -> Config:
    return Config(model=model, distill=DistillConfig(map="m/compression.json", **distill))


@pytest.mark.parametrize(
    ("text", "found", "pairs"),
    [
        ("", None, ((0, 1), (1, 3), (2, 5))),
        ("", MAP, ((0, 0), (1, 2), (2, 5))),
        ("2:4, 0:1", MAP, ((0, 1), (2, 4))),
    ],
)
def test_which_layers_are_compared(text, found, pairs):
    config = asked(hidden_weight=1.0, hidden_layers=text)
    made = features.features_of(config, TEACHER, found)
    assert made.hidden.pairs == pairs and made.router is None
    assert made.taps == (("hidden", made.hidden.student_layers),)


def test_evenly_spread_layers_are_all_there():
    for ours in range(1, 13):
        for theirs in range(1, 13):
            student, teacher = (
                dataclasses.replace(STUDENT, num_hidden_layers=n, first_k_dense_replace=0)
                for n in (ours, theirs)
            )
            pairs = correspondence.layer_pairs(asked(student), teacher, None)
            chosen = [t for _, t in pairs]
            assert chosen == sorted(chosen) and 0 <= chosen[0] and chosen[-1] == theirs - 1
            if ours == theirs:
                assert chosen == list(range(ours))


def test_the_router_by_a_map():
    r = features.features_of(asked(router_weight=0.1), TEACHER, MAP).router
    assert r.layers == (1, 4) and r.teachers_LEG.shape == (2, 4, 3)
    assert r.teachers_LEG[0].tolist() == [[0, 5, -1], [1, -1, -1], [2, 3, 7], [4, -1, -1]]
    assert r.teachers_LEG[1, :, 1:].tolist() == [[-1, -1]] * 4


def test_layers_of_multi_token_prediction_in_a_map_are_left_out():
    student = dataclasses.replace(STUDENT, num_nextn_predict_layers=1)
    longer = MAP._replace(expert_map=(*MAP.expert_map, MAP.expert_map[0]))
    assert features.features_of(
        asked(student, router_weight=0.1), TEACHER, longer
    ).router.layers == (
        1,
        4,
    )


DENSE = dataclasses.replace(TEACHER, first_k_dense_replace=6)
BAD = {
    "pair": (dict(hidden_weight=1.0, hidden_layers="2-4"), TEACHER, None, "'2-4' is no pair"),
    "empty pair": (dict(hidden_weight=1.0, hidden_layers="2:4,"), TEACHER, None, "'' is no pair"),
    "student": (dict(hidden_weight=1.0, hidden_layers="3:4"), TEACHER, None, "and no layer 3"),
    "teacher": (dict(hidden_weight=1.0, hidden_layers="2:6"), TEACHER, None, "and no layer 6"),
    "twice": (dict(hidden_weight=1.0, hidden_layers="2:4,2:5"), TEACHER, None, "in two pairs"),
    "no map": (dict(router_weight=0.1), TEACHER, None, "n_routed_experts is 4, and 8"),
    "no map, layers": (
        dict(router_weight=0.1),
        dataclasses.replace(STUDENT, num_hidden_layers=6),
        None,
        "num_hidden_layers is 3, and 6",
    ),
    "dense teacher": (dict(router_weight=0.1), DENSE, MAP, "the teacher has no experts"),
    "shallow teacher": (
        dict(hidden_weight=1.0),
        dataclasses.replace(TEACHER, num_hidden_layers=4),
        MAP,
        "is of 6 layers, and the teacher has 4",
    ),
    "other experts": (
        dict(router_weight=0.1),
        dataclasses.replace(TEACHER, n_routed_experts=16),
        MAP,
        "is of 8 experts, and the teacher has 16",
    ),
    "map of another student": (
        dict(hidden_weight=1.0),
        TEACHER,
        MAP._replace(layer_map=(0, 2)),
        "is of 2 layers, and this model has 3",
    ),
    "experts of other layers": (
        dict(router_weight=0.1),
        TEACHER,
        MAP._replace(expert_map=MAP.expert_map[:1]),
        "experts of 1 layers, and this model has 2",
    ),
    "fewer experts": (
        dict(router_weight=0.1),
        TEACHER,
        MAP._replace(expert_map=(MAP.expert_map[0], MAP.expert_map[1][:3])),
        "3 experts in layer 2, and this model has 4",
    ),
    "twice the same expert": (
        dict(router_weight=0.1),
        TEACHER,
        MAP._replace(expert_map=(((0, 5), (1,), (2, 3), (5,)), MAP.expert_map[1])),
        "layer 1 has expert 5 twice",
    ),
    "no teacher of an expert": (
        dict(router_weight=0.1),
        TEACHER,
        MAP._replace(expert_map=(((0, 5), (1,), (2, 3), ()), MAP.expert_map[1])),
        "layer 1 has an expert without a teacher",
    ),
    "a dense layer": (
        dict(router_weight=0.1),
        dataclasses.replace(TEACHER, first_k_dense_replace=3),
        MAP,
        "layer 1 stands for layer 2 of the teacher, which has no experts",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_does_not_go_together_is_one_line(case):
    distill, teacher, found, said = BAD[case]
    with pytest.raises(UserError) as e:
        features.features_of(asked(**distill), teacher, found)
    assert said in str(e.value) and "\n" not in str(e.value) and "config.distill." in str(e.value)


def test_nothing_is_asked_where_the_weights_are_0():
    assert features.features_of(asked(), TEACHER, None) is None
