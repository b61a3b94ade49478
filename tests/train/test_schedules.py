"""Learning rates against those of transformers' schedulers, of Megatron-Core, NeMo and DeepSpeed, and against
what every schedule must have.

1e-6 of the peak: both compute the same formula, we in float32, whose numbers are 6e-8 of themselves apart.
"""

import dataclasses
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config.options import Config, OptimizerConfig, TrainConfig, of
from deepseek_jax.config.validation import validate
from deepseek_jax.train.schedules import decay_end, learning_rate, warmup_steps

PEAK, STEPS = 3e-4, 300
CLOSE = 1e-6 * PEAK
COUNTS = jnp.arange(20_000, dtype=jnp.int32)  # one shape for all, whose operations compile once


def config_of(schedule: str, steps: int = STEPS, **options) -> Config:
    given = {"learning_rate": PEAK, "warmup_steps": 0} | options
    config = Config(
        train=TrainConfig(steps=steps), optimizer=OptimizerConfig(schedule=schedule, **given)
    )
    validate(config)
    return config


def rates(config: Config, steps: int = STEPS) -> np.ndarray:
    """Of every update of the run, as the step computes them."""
    return np.broadcast_to(learning_rate(config)(COUNTS), COUNTS.shape)[:steps].astype(np.float64)


def check(config: Config, expected: np.ndarray) -> None:
    ours = rates(config, len(expected))
    np.testing.assert_allclose(ours[:20], expected[:20], rtol=0, atol=CLOSE)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=CLOSE)


# ------------------------------------------------------------------------------------------- transformers

TRANSFORMERS = [
    # name there, its arguments, warmup, our schedule and options
    ("linear", {}, 30, "linear", dict(final_fraction=0.0)),
    ("linear", {}, 0, "linear", dict(final_fraction=0.0)),
    ("cosine", {}, 17, "cosine", dict(final_fraction=0.0)),
    ("constant_with_warmup", {}, 40, "constant", {}),
    ("constant", {}, 0, "constant", {}),
    ("polynomial", {}, 30, "polynomial", dict(final_fraction=1e-7 / PEAK)),
    (
        "polynomial",
        dict(power=2.5, lr_end=3e-5),
        30,
        "polynomial",
        dict(power=2.5, final_fraction=0.1),
    ),
    ("inverse_sqrt", {}, 25, "inverse_sqrt", dict(final_fraction=0.0)),
    ("inverse_sqrt", {}, 0, "inverse_sqrt", dict(final_fraction=0.0)),
    (
        "inverse_sqrt",
        dict(timescale=70),
        25,
        "inverse_sqrt",
        dict(timescale=70, final_fraction=0.0),
    ),
    ("cosine_with_restarts", {}, 20, "cosine_with_restarts", dict(final_fraction=0.0)),
    (
        "cosine_with_restarts",
        dict(num_cycles=4),
        20,
        "cosine_with_restarts",
        dict(cycles=4, final_fraction=0.0),
    ),
    ("cosine_with_min_lr", dict(min_lr_rate=0.2), 20, "cosine", dict(final_fraction=0.2)),
    ("cosine_with_min_lr", dict(min_lr=3e-5), 20, "cosine", dict(final_fraction=0.1)),
    # one step ahead of the others: their warmup ends at 1 a step before its last
    (
        "cosine_warmup_with_min_lr",
        dict(min_lr_rate=0.1),
        20,
        "cosine",
        dict(warmup_steps=19, warmup_init_fraction=1 / 20, schedule_steps=STEPS - 1),
    ),
    (
        "cosine_warmup_with_min_lr",
        dict(min_lr_rate=0.1, warmup_lr_rate=0.3),
        20,
        "cosine",
        dict(warmup_steps=19, warmup_init_fraction=0.3, schedule_steps=STEPS - 1),
    ),
    *[
        (
            "warmup_stable_decay",
            dict(num_decay_steps=90, decay_type=theirs, min_lr_ratio=0.05),
            20,
            "wsd",
            dict(
                decay_fraction=90 / STEPS,
                decay_shape=ours,
                final_fraction=0.05,
                warmup_init_fraction=0.05,
            ),
        )
        for theirs, ours in (("linear", "linear"), ("cosine", "cosine"), ("1-sqrt", "sqrt"))
    ],
]


@pytest.mark.parametrize(
    "name, arguments, warmup, schedule, options", TRANSFORMERS, ids=lambda v: str(v)
)
def test_transformers(name, arguments, warmup, schedule, options):
    import torch
    from transformers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = get_scheduler(name, optimizer, warmup, STEPS, arguments)
    factor = scheduler.lr_lambdas[0]
    expected = np.array([PEAK * factor(step) for step in range(STEPS)])
    assert expected[0] == scheduler.get_last_lr()[0]
    check(config_of(schedule, **{"warmup_steps": warmup} | options), expected)


def test_a_share_of_the_steps_is_that_of_transformers():
    """With the rounding of its product: 0.07 of 100 steps are 8."""
    from transformers import TrainingArguments

    shares = (0.03, 0.05, 0.07, 0.1, 1 / 3, 0.999)
    for steps in (1, 10, 99, 100, 1000, 12345):
        for share in shares:
            theirs = TrainingArguments.get_warmup_steps(
                types.SimpleNamespace(warmup_steps=share), steps
            )
            config = config_of("linear", steps, warmup_fraction=share)
            assert warmup_steps(config) == theirs, (steps, share)
    given = config_of("linear", warmup_fraction=0.1, final_fraction=0.0)
    np.testing.assert_array_equal(
        rates(given), rates(config_of("linear", warmup_steps=30, final_fraction=0.0))
    )


def test_relative_step_is_that_of_transformers():
    """Adafactor's own rate, of its first step on; its scale of the parameters is part of the update."""
    from transformers.optimization import Adafactor

    for warmup_init in (False, True):
        group = dict(
            lr=None, relative_step=True, warmup_init=warmup_init, scale_parameter=False, eps=(0, 0)
        )
        expected = [Adafactor._get_lr(group, {"step": n + 1, "RMS": 0}) for n in range(len(COUNTS))]
        config = Config(
            optimizer=OptimizerConfig("adafactor", relative_step=True, warmup_init=warmup_init)
        )
        validate(config)
        ours = rates(config, len(expected))
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
        assert ours[0] == pytest.approx(1e-6 if warmup_init else 1e-2)


# ------------------------------------------------------------------------ formulas, from the tools' sources


def megatron(step, style, warmup, steps, first=0.0, least=0.0, decay_steps=0, shape=""):
    """OptimizerParamScheduler.get_lr of Megatron-Core (megatron/core/optimizer_param_scheduler.py)."""
    if warmup and step <= warmup:
        return first + (PEAK - first) * step / warmup
    if style == "constant":
        return PEAK
    if step > steps:
        return least
    if style == "inverse-square-root":
        return max(least, PEAK * math.sqrt(max(warmup, 1)) / math.sqrt(max(step, 1)))
    p = (step - warmup) / (steps - warmup)
    if style == "WSD":
        p, style = max(step - (steps - decay_steps), 0) / decay_steps, shape
    left = {
        "linear": 1 - p,
        "cosine": 0.5 * (1 + math.cos(math.pi * p)),
        "exponential": 2 * 0.5**p - 1,
        "minus_sqrt": 1 - math.sqrt(p),
    }[style]
    return least + left * (PEAK - least)


@pytest.mark.parametrize(
    "theirs, schedule, ours",
    [
        (dict(style="linear"), "linear", {}),
        (dict(style="cosine"), "cosine", {}),
        (dict(style="constant"), "constant", {}),
        (dict(style="inverse-square-root"), "inverse_sqrt", {}),
        *[
            (
                dict(style="WSD", decay_steps=120, shape=shape),
                "wsd",
                dict(decay_fraction=120 / STEPS, decay_shape=here),
            )
            for shape, here in (
                ("linear", "linear"),
                ("cosine", "cosine"),
                ("exponential", "exponential"),
                ("minus_sqrt", "sqrt"),
            )
        ],
    ],
    ids=str,
)
@pytest.mark.parametrize("first, least", [(0.0, 0.0), (1e-5, 3e-5)])
def test_megatron(theirs, schedule, ours, first, least):
    """Also where the decay ends before the run: lr_decay_iters is optimizer.schedule_steps."""
    expected = [
        megatron(n, warmup=40, steps=STEPS, first=first, least=least, **theirs)
        for n in range(STEPS)
    ]
    options = dict(
        warmup_steps=40,
        warmup_init_fraction=first / PEAK,
        final_fraction=least / PEAK,
        **ours,
    )
    check(config_of(schedule, **options), np.array(expected))
    if schedule in ("constant", "inverse_sqrt"):
        return
    longer = config_of(schedule, STEPS + 50, schedule_steps=STEPS, **options)
    late = [
        megatron(n, warmup=40, steps=STEPS, first=first, least=least, **theirs)
        for n in range(STEPS + 50)
    ]
    check(longer, np.array(late))
    held = config_of(schedule, STEPS + 50, hold_steps=50, **options)
    np.testing.assert_array_equal(rates(held, STEPS + 50), rates(longer, STEPS + 50))


def nemo(step, warmup, constant, least, steps):
    """CosineAnnealing of NeMo (nemo/core/optim/lr_scheduler.py)."""
    if constant:
        decay = steps - constant - warmup
        if warmup and step <= warmup:
            return PEAK * step / warmup
        if step > warmup + decay:
            return least
    else:
        decay = steps - warmup
        if warmup and step <= warmup:
            return PEAK * (step + 1) / (warmup + 1)
    return least + (PEAK - least) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay))


def test_nemo():
    """Without a hold its warmup begins at 1 / (warmup + 1) of the peak."""
    held = [nemo(n, 60, 30, 3e-5, STEPS) for n in range(STEPS)]
    check(config_of("cosine", warmup_steps=60, hold_steps=30), np.array(held))
    plain = [nemo(n, 60, 0, 3e-5, STEPS) for n in range(STEPS)]
    check(config_of("cosine", warmup_steps=60, warmup_init_fraction=1 / 61), np.array(plain))


def test_nemo_inverse_square_root():
    def theirs(step, warmup):
        if step <= warmup:
            return PEAK * (step + 1) / (warmup + 1)
        return PEAK / math.sqrt((step + 1) / (warmup + 1))

    config = config_of(
        "inverse_sqrt",
        warmup_steps=60,
        warmup_init_fraction=1 / 61,
        timescale=61,
        final_fraction=0.0,
    )
    check(config, np.array([theirs(n, 60) for n in range(STEPS)]))


def deepspeed(count, kind, warmup, shape, first=0.0, steps=STEPS, least=0.0):
    """WarmupLR, WarmupDecayLR, WarmupCosineLR (deepspeed/runtime/lr_schedules.py) at last_batch_iteration =
    count. The scheduler counts from -1 and moves after the update, so that its run has each rate one update
    later.
    """
    warmup = max(warmup, 2)
    if count < warmup:
        share = math.log(count + 1) / math.log(warmup) if shape == "log" else count / warmup
        return first + (PEAK - first) * share
    if kind == "WarmupLR":
        return PEAK
    if kind == "WarmupDecayLR":
        return first + (PEAK - first) * max(0.0, (steps - count) / max(1.0, steps - warmup))
    # one step ahead of WarmupDecayLR
    p = min(1.0, (count - warmup + 1) / max(1, steps - warmup))
    return PEAK * (least + (1 - least) * (1 + math.cos(math.pi * p)) / 2)


@pytest.mark.parametrize("warmup", [1, 2, 50])
@pytest.mark.parametrize("shape", ["log", "linear"])
def test_deepspeed(shape, warmup):
    if shape == "linear":
        warmup = max(warmup, 2)  # one step of it is two there
    options = dict(warmup_steps=warmup, warmup_shape=shape)

    def expected(kind, **more):
        return np.array([deepspeed(n, kind, warmup, shape, **more) for n in range(STEPS)])

    check(config_of("constant", **options), expected("WarmupLR"))
    first = config_of("constant", **options, warmup_init_fraction=0.25)
    check(first, expected("WarmupLR", first=0.25 * PEAK))
    if warmup == 1:  # the decay begins at the second step there
        return
    check(config_of("linear", **options, final_fraction=0.0), expected("WarmupDecayLR"))
    # Its cosine is one step ahead of all others: as if the last step were the one before.
    cosine = expected("WarmupCosineLR", least=0.1)
    ours = rates(config_of("cosine", **options), STEPS)
    np.testing.assert_allclose(ours[warmup + 1 :], cosine[warmup:-1], rtol=0, atol=CLOSE)


# ----------------------------------------------------------------------------- what every schedule must have

SCHEDULES = list(of("optimizer.schedule").choices)


def drawn(schedule: str, seed: int) -> Config:
    """Options of this schedule at random."""
    rng = np.random.default_rng([seed, SCHEDULES.index(schedule)])

    def pick(*values):
        return values[int(rng.integers(len(values)))]

    steps = pick(1, 2, 7, 60, 500)
    options = dict(
        warmup_steps=pick(0, 1, 2, steps // 3, steps, 2 * steps),
        final_fraction=pick(0.0, 0.01, 0.5, 1.0),
        decay_fraction=pick(0.0, 0.1, 1 / 3, 1.0),
    )
    if options["warmup_steps"]:
        options |= dict(
            warmup_shape=pick("linear", "log"), warmup_init_fraction=pick(0.0, 0.1, 1.0)
        )
    if schedule != "constant" and options["warmup_steps"] < steps // 2:
        options["hold_steps"] = pick(0, 0, steps // 4)
    own = {
        "polynomial": dict(power=pick(0.5, 1.0, 3.0)),
        "cosine_with_restarts": dict(cycles=pick(1, 2, 3, 7)),
        "inverse_sqrt": dict(timescale=pick(0, 1, 1000)),
        "wsd": dict(decay_shape=pick("linear", "cosine", "sqrt", "exponential")),
    }
    return config_of(schedule, steps, **options, **own.get(schedule, {}))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_stays_between_its_ends(schedule):
    """Never below 0 or above the peak, never rising after the warmup but by a restart, and from the last step
    before the hold on exactly the last rate.
    """
    for seed in range(8):
        config = drawn(schedule, seed)
        o, end = config.optimizer, decay_end(config)
        ours = rates(config, 540)
        assert np.isfinite(ours).all()
        assert ours.min() >= 0 and ours.max() <= PEAK * (1 + 1e-6), config
        warm = min(warmup_steps(config), end)
        rises = np.diff(ours[: warm + 1])
        assert (rises >= -CLOSE).all(), config
        falls = np.diff(ours[warm:])
        assert (falls > CLOSE).sum() <= o.cycles - 1, config
        if warm < end:
            assert ours[warm] == pytest.approx(PEAK, rel=1e-6)
        if warm == end:  # a run that is all warmup
            continue
        assert (ours[end:] == ours[end]).all(), config
        last = {
            "constant": 1.0,
            "deepseek_v2": 0.316**2,
            "deepseek_v3": 0.1 * 7.3 / 22,
            "inverse_sqrt": None,
        }.get(schedule, o.final_fraction)
        if last is not None and end - warm > 4:
            np.testing.assert_allclose(ours[end], np.float32(PEAK * last), rtol=2e-6)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if not s.startswith("deepseek")])
def test_a_schedule_has_no_jumps(schedule):
    """Ten times as many steps have a tenth of the largest difference, but for restarts, and for the square
    root at its beginning.
    """
    shapes = of("optimizer.decay_shape").choices if schedule == "wsd" else ["linear"]
    for shape in set(shapes) - {"sqrt"}:
        largest = []
        for steps in (1000, 10_000):
            options = dict(warmup_steps=steps // 10)
            if schedule == "wsd":
                options["decay_shape"] = shape
            config = config_of(schedule, steps, **options)
            largest.append(np.abs(np.diff(rates(config, steps + 10))).max())
        assert largest[1] <= 0.11 * largest[0] + CLOSE, (schedule, shape, largest)


def test_restarts_are_at_whole_steps():
    """A share in floating point falls short of a cycle here and there, as transformers' at step 150 of 220
    with 22 of them: the last rate, 0, in place of the peak.
    """
    from transformers.optimization import (
        _get_cosine_with_hard_restarts_schedule_with_warmup_lr_lambda as theirs,
    )

    config = config_of("cosine_with_restarts", 220, cycles=22, final_fraction=0.0)
    ours = rates(config, 220)
    np.testing.assert_allclose(ours[::10], PEAK, rtol=1e-6)
    factors = [
        theirs(n, num_warmup_steps=0, num_training_steps=220, num_cycles=22) for n in range(220)
    ]
    wrong = np.abs(ours / PEAK - factors) > 1e-6
    assert np.flatnonzero(wrong).tolist() == [150] and factors[150] < 1e-6


def test_a_config_of_an_earlier_version_has_its_learning_rates():
    """The defaults of what came since change nothing."""
    config = config_of("wsd", warmup_steps=10, decay_fraction=0.3)
    explicit = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(
            config.optimizer,
            decay_shape="linear",
            warmup_shape="linear",
            warmup_init_fraction=0.0,
            hold_steps=0,
        ),
    )
    np.testing.assert_array_equal(rates(config), rates(explicit))
    assert (
        rates(config)[10] == np.float32(PEAK) and learning_rate(config)(COUNTS).dtype == np.float32
    )
