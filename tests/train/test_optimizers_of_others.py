"""Ten steps of each optimizer beside torch's and transformers', from the same weights and gradients.

1e-6 of the largest weight: theirs computes in float64, ours in float32, where a weight of 1 is 6e-8 from the
next one and is rounded ten times. AdamW's bias correction besides: 1 - 0.999^t in float32 is 5e-5 off at the
first step, of updates of 0.02: 3e-6.
"""

import dataclasses

import numpy as np
import pytest

from deepseek_jax.config.options import Config, OptimizerConfig, TrainConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.train.schedules import learning_rate
from tests.support.small_runs import ALL_DIVIDED, ONE_DEVICE, TINY
from tests.support.updates import numbers, parts_of, updated

STEPS = 10
HF = OptimizerConfig("adafactor", min_dim_size_to_factor=1)

CASES = {
    "adamw": (OptimizerConfig(b2=0.999, eps=1e-6), "AdamW", dict(betas=(0.9, 0.999), eps=1e-6)),
    "sgd": (OptimizerConfig("sgd", momentum=0.0), "SGD", {}),
    "sgd momentum": (OptimizerConfig("sgd", momentum=0.9), "SGD", dict(momentum=0.9)),
    "sgd nesterov": (
        OptimizerConfig("sgd", momentum=0.9, nesterov=True),
        "SGD",
        dict(momentum=0.9, nesterov=True),
    ),
    "adafactor": (
        dataclasses.replace(HF, scale_parameter=False),
        "Adafactor",
        dict(scale_parameter=False, relative_step=False),
    ),
    "adafactor scaled": (HF, "Adafactor", dict(scale_parameter=True, relative_step=False)),
    "adafactor beta1": (
        dataclasses.replace(HF, first_moment=0.9, clip_threshold=0.5),
        "Adafactor",
        dict(scale_parameter=True, relative_step=False, beta1=0.9, clip_threshold=0.5),
    ),
    "adafactor relative": (
        dataclasses.replace(HF, relative_step=True),
        "Adafactor",
        dict(relative_step=True),
    ),
    "adafactor relative warmup": (
        dataclasses.replace(HF, relative_step=True, warmup_init=True, first_moment=0.9),
        "Adafactor",
        dict(relative_step=True, warmup_init=True, beta1=0.9),
    ),
}


def config_of(optimizer: OptimizerConfig) -> Config:
    if not optimizer.relative_step:
        optimizer = dataclasses.replace(
            optimizer, learning_rate=0.02, warmup_steps=4, schedule="linear"
        )
    config = Config(
        model=TINY,
        mesh=ONE_DEVICE,
        sharding=ALL_DIVIDED,
        train=TrainConfig(steps=40, dtype="float32"),
        optimizer=dataclasses.replace(optimizer, grad_clip=0.0),
    )
    validate(config)
    return config


def theirs(config: Config, name: str, arguments: dict) -> dict[str, np.ndarray]:
    """The weights after STEPS steps, a parameter for each matrix; norms have a group without decay."""
    import torch
    import transformers.optimization

    o = config.optimizer
    held = {
        weight: [torch.tensor(a[part], dtype=torch.float64) for part in parts_of(weight)]
        for weight, a in numbers(0).items()
    }
    groups = [
        {"params": [p for w, ps in held.items() if w != "norm" for p in ps]},
        {"params": held["norm"], "weight_decay": 0.0},
    ]
    of = transformers.optimization if name == "Adafactor" else torch.optim
    first = None if o.relative_step else o.learning_rate
    optimizer = getattr(of, name)(groups, lr=first, weight_decay=o.weight_decay, **arguments)
    rate = learning_rate(config)
    for t in range(1, STEPS + 1):
        for weight, gradient in numbers(t).items():
            for p, part in zip(held[weight], parts_of(weight), strict=True):
                p.grad = torch.tensor(gradient[part], dtype=torch.float64)
        if not o.relative_step:
            for group in optimizer.param_groups:
                group["lr"] = float(rate(t - 1))
        optimizer.step()
    out = {name: a.astype(np.float64) for name, a in numbers(0).items()}
    for weight, tensors in held.items():
        for p, part in zip(tensors, parts_of(weight), strict=True):
            out[weight][part] = p.numpy()
    return out


# The others are further options of these; parallel/test_levers.py has sgd.
QUICK = ("adamw", "adafactor", "adafactor relative warmup")


@pytest.mark.parametrize(
    "name", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_ten_steps(name):
    optimizer, there, arguments = CASES[name]
    config = config_of(optimizer)
    ours, _ = updated(config, STEPS)
    before, close = numbers(0), 3e-6 if name == "adamw" else 1e-6
    for weight, expected in theirs(config, there, arguments).items():
        np.testing.assert_allclose(
            ours[weight], expected, rtol=0, atol=close * np.abs(expected).max(), err_msg=weight
        )
        least = 1e-6 if optimizer.warmup_init else 1e-3
        assert np.abs(expected - before[weight]).max() > least, weight
