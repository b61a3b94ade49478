"""The learning rates of a migrated recipe, beside those that transformers and DeepSpeed give it."""

import json
import math

import numpy as np
import pytest

from deepseek_jax.train.schedules import learning_rate
from tests.support.migration import migrate

STEPS = 40
PEAK = 3e-4
# 1e-6 of the peak: ours are float32, whose numbers are 6e-8 of themselves apart, and theirs float64.
TOLERANCE = 1e-6 * PEAK

SCHEDULES = [
    ("linear", {}, 0),
    ("linear", {}, 5),
    ("cosine", {}, 5),
    ("cosine_with_min_lr", {"min_lr": 1e-5}, 5),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}, 3),
    ("cosine_with_restarts", {"num_cycles": 3}, 4),
    ("polynomial", {}, 5),
    ("polynomial", {"power": 2.0, "lr_end": 1e-6}, 5),
    ("constant", {}, 5),
    ("constant_with_warmup", {}, 5),
    ("inverse_sqrt", {}, 5),
    ("inverse_sqrt", {"timescale": 7}, 0),
    ("warmup_stable_decay", {"num_decay_steps": 10}, 5),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 30, "decay_type": "linear", "min_lr_ratio": 0.1},
        2,
    ),
    ("warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "1-sqrt"}, 2),
]


def recipe(name, kwargs, warmup, more=""):
    kwargs = "".join(f"  {key}: {value}\n" for key, value in kwargs.items())
    return (
        f"learning_rate: {PEAK}\nlr_scheduler_type: {name}\nmax_steps: {STEPS}\nwarmup_steps: {warmup}\n"
        f"per_device_train_batch_size: 1\n{more}"
        + (f"lr_scheduler_kwargs:\n{kwargs}" if kwargs else "")
    )


def ours(config, steps=STEPS):
    schedule = learning_rate(config)
    return np.array([float(schedule(i)) for i in range(steps)])


def theirs(name, kwargs, warmup):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = transformers.get_scheduler(
        name, optimizer, warmup, STEPS, scheduler_specific_kwargs=dict(kwargs)
    )
    out = []
    for _ in range(STEPS):
        out.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return np.array(out)


def test_transformers():
    """All of each schedule, the first 20 steps among them."""
    for name, kwargs, warmup in SCHEDULES:
        done = migrate(recipe(name, kwargs, warmup), tools="hf5", devices=1)
        assert done.config, (name, done.refused())
        expected = theirs(name, kwargs, warmup)
        np.testing.assert_allclose(
            ours(done.config), expected, rtol=0, atol=TOLERANCE, err_msg=f"{name} {kwargs}"
        )


def test_a_share_of_the_steps():
    """warmup_ratio of transformers 4 and warmup_steps below 1 of 5: 0.07 of 40 steps are 3, rounded up."""
    old = migrate(recipe("linear", {}, 0, "warmup_ratio: 0.07\n"), tools="hf4", devices=1)
    new = migrate(recipe("linear", {}, 0.07), tools="hf5", devices=1)
    expected = theirs("linear", {}, 3)
    for done in (old, new):
        np.testing.assert_allclose(ours(done.config), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_schedulers_of_deepspeed(kind):
    """They win over the recipe's cosine; formulas of deepspeed/runtime/lr_schedules.py, whose warmup is
    log(step + 1) / log(steps of it) unless said otherwise.
    """
    rates = {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}
    params = {"warmup_num_steps": "auto", "total_num_steps": "auto"}
    file = {
        "scheduler": {"type": kind, "params": params | ({} if kind == "WarmupCosineLR" else rates)},
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
    }
    done = migrate(recipe("cosine", {}, 8), json.dumps(file), tools="hf4", devices=1)
    warm = 8

    def rate(step):
        if step < warm:
            return PEAK * math.log(step + 1) / math.log(warm)
        if kind == "WarmupLR":
            return PEAK
        progress = (step - warm) / (STEPS - warm)
        if kind == "WarmupDecayLR":
            return PEAK * (1 - progress)
        return PEAK * (1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * progress)) / 2)

    expected = np.array([rate(i) for i in range(STEPS)])
    np.testing.assert_allclose(ours(done.config), expected, rtol=0, atol=TOLERANCE)
    if kind != "WarmupCosineLR":
        assert "wins" in done.why("lr_scheduler_type")
