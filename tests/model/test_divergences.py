"""The divergences of distillation against TRL's and ModelOpt's formulas in torch, token by token.

Tolerance: 1e-5 of an array's scale, for float32 sums in another order; that of TRL's tail, 1 - sum, is said
where it is compared.
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config.options import IGNORE, ModelConfig
from deepseek_jax.model import head
from deepseek_jax.model.divergences import TopTeacher, WholeTeacher, kind_of
from tests.support import conversion

B, S, V, K = 2, 7, 24, 6


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    targets = rng.integers(0, V, (B, S))
    targets[0, :3] = IGNORE
    student, teacher = (3 * rng.standard_normal((2, B, S, V))).astype(np.float32)
    ids = np.argsort(-teacher, axis=-1)[..., :K].astype(np.int32)
    return dict(student=student, teacher=teacher, targets=targets.astype(np.int32), ids=ids)


@functools.cache
def program(function, has_teacher: bool):
    """(hidden states, teacher's or None, inputs) -> (values of each token [B, S], the gradient of the sum of
    the first by the hidden states); these are logits, by a head that changes nothing.
    """

    def run(z_BSV, teacher_BSV, kernel, inputs):
        axes = ("embed", "vocab")
        one = head.Head(nnx.Param(kernel, out_sharding=axes, eager_sharding=False), tied=False)
        frozen = ((teacher_BSV, one),) if has_teacher else ()

        def total(z_BSV):
            return head.scan_vocab_sum(function, z_BSV, one, *inputs, frozen=frozen)[0]

        each = head.scan_vocab(function, z_BSV, one, *inputs, frozen=frozen)
        return each, jax.grad(total)(z_BSV)

    return jax.jit(run)


def walk(function, student_BSV, *inputs, teacher=None):
    """(values, gradient) as `program` makes them."""
    with conversion.on_mesh(conversion.config_of(ModelConfig())):
        size = student_BSV.shape[-1]
        kernel = jax.device_put(np.eye(size, dtype=np.float32), jax.P(None, "tensor"))
        inputs = [conversion.put(a) if np.ndim(a) else np.float32(a) for a in inputs]
        placed = None if teacher is None else conversion.put(teacher)
        found = program(function, teacher is not None)(
            conversion.put(student_BSV), placed, kernel, inputs
        )
        return jax.tree.map(np.asarray, found)


def lse_of(logits: np.ndarray, temperature: float) -> np.ndarray:
    return np.log(np.sum(np.exp(logits.astype(np.float64) / temperature), axis=-1))


@pytest.mark.slow  # importing TRL takes longer than the test
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_trl(beta, temperature):
    """generalized_jsd_loss times T^2, with cross-entropy as torch has it, and the gradient of both."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    a, alpha = arrays(), 0.7
    z, teacher, targets = (torch.tensor(a[n]) for n in ("student", "teacher", "targets"))
    targets, z = targets.long(), z.requires_grad_()
    jsd = GKDTrainer.generalized_jsd_loss(
        z, teacher, targets, beta=beta, temperature=temperature, reduction="sum"
    )
    ce = torch.nn.functional.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="sum")
    loss = (1 - alpha) * ce + alpha * temperature**2 * jsd
    loss.backward()

    inputs = a["targets"], alpha, temperature, beta
    for kind in {kind_of(beta, False), "mixture"}:  # the mixture holds the others as its ends
        function = WholeTeacher(kind)
        values, gradient = walk(function, a["student"], *inputs, teacher=a["teacher"])
        for ours, theirs in zip(values, (loss, ce, jsd), strict=False):
            conversion.assert_close(ours.sum(), theirs.item())
        conversion.assert_close(gradient, z.grad.numpy())
        assert not gradient[a["targets"] == IGNORE].any()
        assert not np.stack(values)[:, a["targets"] == IGNORE].any()


def test_modelopt():
    """LogitsDistillationLoss is kl_div of both softmaxes at T, times T squared."""
    import torch
    import torch.nn.functional as F

    a, temperature = arrays(), 2.0
    z, t = torch.tensor(a["student"]), torch.tensor(a["teacher"])
    soft = F.softmax(t / temperature, dim=-1)
    kl = F.kl_div(F.log_softmax(z / temperature, dim=-1), soft, reduction="none").sum(-1)
    theirs = np.where(a["targets"] == IGNORE, 0, kl.numpy() * temperature**2)
    (loss, *_), _ = walk(
        WholeTeacher("forward"),
        a["student"],
        a["targets"],
        1.0,
        temperature,
        0.0,
        teacher=a["teacher"],
    )
    conversion.assert_close(loss, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_top_words(beta, tail):
    """TRL's _add_tail_bucket and divergence over what it makes; without the bucket, over the words alone.

    TRL takes both tails from 1 - sum, in float64 here: in float32 that has an error of 1e-7 of 1.
    """
    import torch
    from trl.experimental.server_distillation import server_distillation_trainer as trl

    a, temperature = arrays(), 2.0
    z = torch.tensor(a["student"]).double().requires_grad_()
    teacher, ids = torch.tensor(a["teacher"]).double(), torch.tensor(a["ids"]).long()
    inside = [torch.log_softmax(x / temperature, dim=-1).gather(-1, ids) for x in (z, teacher)]
    valid = torch.ones_like(inside[0], dtype=torch.bool)
    if tail == "bucket":
        inside = [trl._add_tail_bucket(x, valid)[0] for x in inside]
    else:
        inside = [torch.log_softmax(x, dim=-1) for x in inside]
    scored = torch.tensor(a["targets"] != IGNORE)
    each = trl._jsd_divergence(*inside, beta).sum(-1) * scored
    (temperature**2 * each.sum()).backward()

    values = np.take_along_axis(a["teacher"], a["ids"], axis=-1)
    lse = lse_of(a["teacher"], temperature)
    inputs = a["ids"], values, lse, a["targets"], 1.0, temperature, beta
    for kind in {kind_of(beta, False), "mixture"}:
        function = TopTeacher(kind, tail)
        (_, _, ours, _), gradient = walk(function, a["student"], *inputs)
        conversion.assert_close(ours, each.detach().numpy())
        conversion.assert_close(gradient, z.grad.numpy())
    # A constant of the token changes nothing: largest values of 0 lose the least in float16.
    shifted = a["ids"], values - 5, lse - 5 / temperature, *inputs[3:]
    (_, _, same, _), _ = walk(function, a["student"], *shifted)
    conversion.assert_close(same, each.detach().numpy())


@pytest.mark.parametrize(
    "beta,tail",
    [
        (0.3, "bucket"),
        pytest.param(0.0, "renormalise", marks=pytest.mark.slow),
        pytest.param(1.0, "bucket", marks=pytest.mark.slow),
    ],
)
def test_all_words_are_the_whole_divergence(beta, tail):
    a, kind, rest = arrays(), kind_of(beta, False), (0.4, 2.0, beta)
    ids = np.argsort(-a["teacher"], axis=-1).astype(np.int32)
    values = np.take_along_axis(a["teacher"], ids, axis=-1)
    top = ids, values, lse_of(a["teacher"], 2.0), a["targets"], *rest
    found, moved = walk(TopTeacher(kind, tail), a["student"], *top)
    wanted, gradient = walk(
        WholeTeacher(kind), a["student"], a["targets"], *rest, teacher=a["teacher"]
    )
    for ours, theirs in zip(found, (*wanted[:3], wanted[-1]), strict=True):
        conversion.assert_close(ours, theirs)
    conversion.assert_close(moved, gradient)


def test_padding_words_are_cut():
    """A student with more rows than the teacher has words: the divergence is that of the words of both."""
    a, more, kind = arrays(), 4, "mixture"
    rest = a["targets"], 1.0, 2.0, 0.5
    padding = np.full((B, S, more), 9.0, np.float32)
    student, teacher = (np.append(a[n], padding, axis=-1) for n in ("student", "teacher"))
    (_, _, kl, loss, _), gradient = walk(WholeTeacher(kind, V), student, *rest, teacher=teacher)
    (_, _, wanted, wanted_loss, _), _ = walk(
        WholeTeacher(kind), a["student"], *rest, teacher=a["teacher"]
    )
    conversion.assert_close(kl, wanted)
    conversion.assert_close(loss, wanted_loss)
    assert not gradient[..., V:].any()


@pytest.mark.parametrize("kind,beta", [("reverse", 1.0), ("mixture", 0.5), ("mixture", 1.0)])
def test_far_apart(kind, beta):
    """Logits that differ by hundreds: no overflow, finite values and gradients."""
    a = arrays()
    student, teacher = 100 * a["student"], -100 * a["teacher"]
    inputs = a["targets"], 0.5, 1.0, beta
    values, gradient = walk(WholeTeacher(kind), student, *inputs, teacher=teacher)
    assert np.isfinite(np.stack(values)).all() and np.isfinite(gradient).all()
    assert (values[2] >= -1e-4).all()
    if beta == 0.5:
        assert (values[2] <= np.log(2) + 1e-5).all()  # the largest that it can be
