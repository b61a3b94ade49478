"""Memory levers of optimizers and numbers: Muon, Adafactor, bfloat16 moments and accumulation; options that
would not act.

Updates are compared with NumPy in float64, one matrix at a time; runs with those on one device, in float32,
or before a checkpoint. Float16 has a file of its own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax import objectives
from deepseek_jax.config.options import Config, Fp16Config, MeshConfig, OptimizerConfig, TrainConfig
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train import muon as muon_module
from deepseek_jax.train import state, step
from deepseek_jax.train.optimizer import learning_rate
from deepseek_jax.xla import program
from tests.support import conversion
from tests.support.small_runs import (
    ADAMW,
    TINY,
    Trainer,
    config_of,
    losses_of,
    restored,
    same,
    trainer,
)
from tests.support.updates import Step, numbers, parts_of, reference, updated

# ------------------------------------------------------------------------------ updates, one matrix at a time

STEPS = 4


def decoupled(config: Config, one_update) -> Step:
    """A step of `one_update(name, gradient, weight, memory, t)`, without rate and decay."""
    rate = learning_rate(config)

    def step(name, g, w, memory, t, decay):
        return float(rate(t - 1)) * (one_update(name, g, w, memory, t) + decay * w)

    return step


def adamw(o: OptimizerConfig, g, memory, t, store=lambda a: a):
    m, v = o.b1 * memory.get("m", 0) + (1 - o.b1) * g, o.b2 * memory.get("v", 0) + (1 - o.b2) * g**2
    memory.update(m=store(m), v=store(v))
    return m / (1 - o.b1**t) / (np.sqrt(v / (1 - o.b2**t)) + o.eps)


def muon(o: OptimizerConfig, name, g, w, memory, t):
    """Jordan et al. 2024; Moonlight's scale."""
    if name in ("norm", "embed_tokens"):
        return adamw(o, g, memory, t)
    memory["m"] = o.momentum * memory.get("m", 0) + (1 - o.momentum) * g
    x = o.momentum * memory["m"] + (1 - o.momentum) * g
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return 0.2 * np.sqrt(max(x.shape)) * x


def root_mean_square(a: np.ndarray) -> float:
    return float(np.sqrt(np.mean(a**2)))


def adafactor(config: Config) -> Step:
    """Shazeer & Stern 2018, algorithms 4 and 5; the options of transformers.optimization.Adafactor."""
    o, rate = config.optimizer, learning_rate(config)

    def step(name, g, w, memory, t, decay):
        keep, square = 1 - t**-0.8, g**2 + 1e-30

        def mean(key, value):
            memory[key] = keep * memory.get(key, 0) + (1 - keep) * value
            return memory[key]

        if g.ndim == 2 and min(g.shape) >= o.min_dim_size_to_factor:
            row, column = mean("row", square.mean(axis=1)), mean("column", square.mean(axis=0))
            v = np.outer(row, column) / row.mean()
        else:
            v = mean("v", square)
        u = g / np.sqrt(v)
        lr = float(rate(t - 1)) * (max(1e-3, root_mean_square(w)) if o.scale_parameter else 1)
        u = lr * u / max(1, root_mean_square(u) / o.clip_threshold)
        if o.first_moment:
            u = o.first_moment * memory.get("m", 0) + (1 - o.first_moment) * u
            memory["m"] = u
        return u + lr * decay * w

    return step


def lion(config: Config) -> Step:
    """Chen et al. 2023, algorithm 2."""
    o = config.optimizer

    def update(name, g, w, memory, t):
        m = memory.get("m", 0)
        memory["m"] = o.b2 * m + (1 - o.b2) * g
        return np.sign(o.b1 * m + (1 - o.b1) * g)

    return decoupled(config, update)


def sgd(config: Config) -> Step:
    """Sutskever et al. 2013 as torch.optim.SGD has it: the decay is part of the gradient."""
    o, rate = config.optimizer, learning_rate(config)

    def step(name, g, w, memory, t, decay):
        g = g + decay * w
        m = memory["m"] = o.momentum * memory.get("m", 0) + g
        return float(rate(t - 1)) * (g + o.momentum * m if o.nesterov else m)

    return step


def muon_step(config: Config) -> Step:
    return decoupled(config, functools.partial(muon, config.optimizer))


ONE, EIGHT = MeshConfig(fsdp=1), MeshConfig(fsdp=2, expert=2, tensor=2)
FACTORED = OptimizerConfig("adafactor", min_dim_size_to_factor=8)


@pytest.mark.parametrize(
    "of, optimizer, mesh",
    [
        pytest.param(muon_step, OptimizerConfig("muon"), ONE, marks=pytest.mark.slow),
        (muon_step, OptimizerConfig("muon"), EIGHT),
        pytest.param(adafactor, FACTORED, EIGHT, marks=pytest.mark.slow),
        pytest.param(
            adafactor,
            dataclasses.replace(FACTORED, scale_parameter=False),
            EIGHT,
            marks=pytest.mark.slow,
        ),
        (
            adafactor,
            dataclasses.replace(
                FACTORED, first_moment=0.9, clip_threshold=0.7, min_dim_size_to_factor=1
            ),
            EIGHT,
        ),
        (lion, OptimizerConfig("lion", b2=0.99), EIGHT),
        (sgd, OptimizerConfig("sgd", momentum=0.9, nesterov=True), EIGHT),
    ],
    ids=[
        *("muon", "muon 8", "adafactor 8", "adafactor absolute 8"),
        *("adafactor moment 8", "lion 8", "sgd nesterov 8"),
    ],
)
def test_updates_are_those_of_each_matrix_alone(of, optimizer, mesh, monkeypatch):
    """On 8 devices, Muon on one as well; train/test_optimizers_of_others.py has the others on one. Weights
    of 0.3, updates of 0.01 a step. Newton-Schulz multiplies float32's rounding of small singular values,
    1e-7, by up to 3.44^5.
    """
    monkeypatch.setattr(
        muon_module, "CHUNK", 256
    )  # two matrices of gate_up_proj at a time, and some filling up
    config = config_of(
        dataclasses.replace(
            optimizer, learning_rate=0.01, warmup_steps=1, grad_clip=5.0, schedule="constant"
        ),
        mesh,
    )
    ours, opt_state = updated(config, STEPS)
    expected, before = reference(config, of(config), STEPS), numbers(0)
    for name, weight in expected.items():
        moved = weight - before[name]
        conversion.assert_close(ours[name] - before[name], moved, 2e-4, name)
        for part in parts_of(name):  # each one by itself moved, and by about as much
            assert (
                0.2
                < np.linalg.norm(moved[part]) / np.linalg.norm(moved) * len(parts_of(name)) ** 0.5
                < 2
            ), name


def test_bfloat16_moments_are_rounded_once_a_step():
    """Against NumPy that rounds where we do. A number on the edge between two bfloat16's may go either way:
    2^-8 of the moment, and so of the update, here and there; with float32 moments most updates differ by more
    than float32's rounding.
    """
    config = config_of(dataclasses.replace(ADAMW, moment_dtype="bfloat16"))
    ours, opt_state = updated(config, STEPS)
    dtypes = {a.dtype for a in jax.tree.leaves(opt_state)}
    assert dtypes == {jnp.dtype("bfloat16"), jnp.dtype("int32")}

    def store(a: np.ndarray) -> np.ndarray:
        return a.astype(ml_dtypes.bfloat16).astype(np.float64)

    def step(store):
        def update(name, g, w, memory, t):
            return adamw(config.optimizer, g, memory, t, store)

        return decoupled(config, update)

    expected = reference(config, step(store), STEPS)
    exact = reference(config, step(np.asarray), STEPS)
    for name, weight in expected.items():
        scale = np.abs(weight - numbers(0)[name]).max()
        close = np.abs(ours[name] - weight) / scale
        assert np.mean(close < 1e-4) > 0.98 and close.max() < 2**-6, (
            name,
            np.mean(close < 1e-4),
            close.max(),
        )
        assert np.mean(np.abs(exact[name] - weight) / scale > 1e-4) > 0.5, name


# ------------------------------------------------------------------------------------------------ whole steps


def on_mesh(
    optimizer: OptimizerConfig, mesh: MeshConfig
) -> tuple[Trainer, state.TrainState, np.ndarray]:
    t = trainer(config_of(optimizer, mesh))
    s, metrics = t.run(t.start(), 5)
    return t, s, losses_of(metrics)


# By name, and how much smaller 8 devices make its state at least.
OTHERS = {
    "muon": (dict(learning_rate=1e-2), 6),
    "adafactor": (dict(learning_rate=1e-1, min_dim_size_to_factor=8), 2),
    "adafactor moment": (dict(learning_rate=2e-1, min_dim_size_to_factor=8, first_moment=0.5), 4),
    "lion": (dict(learning_rate=2e-3), 6),
    "sgd": (dict(learning_rate=1.0, momentum=0.9), 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_mesh_changes_nothing_and_a_checkpoint_neither(name, tmp_path):
    """1e-5 of the loss, as for AdamW: the same float32 sums in another order."""
    options, smaller = OTHERS[name]
    optimizer = dataclasses.replace(ADAMW, name=name.split()[0], **options)
    _, one, expected = on_mesh(optimizer, MeshConfig(fsdp=1))
    t, s, ours = on_mesh(optimizer, MeshConfig(fsdp=2, expert=4))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert expected[-1] < expected[0] - 0.05
    on, (a,) = t.run(s, 1, 5)
    again, (b,) = t.run(restored(t, s, tmp_path), 1, 5)
    assert same(on, again) and same(a, b)
    other = trainer(config_of(optimizer, MeshConfig(fsdp=4, tensor=2)))
    _, (c,) = other.run(restored(other, s, tmp_path / "other"), 1, 5)
    np.testing.assert_allclose(losses_of([c]), losses_of([a]), rtol=1e-5)
    # What the mesh divides of a weight it divides of its statistics too.
    held = t.layout.bytes_per_device(t.mesh)["optimizer"]
    whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(t.layout.abstract.opt_state))
    assert held < whole / smaller, (held, whole)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion", "sgd"])
def test_the_layout_is_the_same_where_no_mesh_is_set(name):
    """deepseek_jax.plan lays out for devices that are not here. Adafactor does not factor such small weights:
    what they do not use is constant.
    """
    config = config_of(dataclasses.replace(ADAMW, name=name), MeshConfig(fsdp=2, expert=4))
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        inside = state.make_layout(config, mesh)

    def padded(layout) -> list[tuple]:
        """(shape, an entry of the spec for every axis) of each array."""
        arrays, shardings = jax.tree.leaves(layout.abstract), jax.tree.leaves(layout.shardings)
        return [
            (a.shape, (*s.spec, *[None] * a.ndim)[: a.ndim])
            for a, s in zip(arrays, shardings, strict=True)
        ]

    outside = state.make_layout(config, mesh)
    assert padded(outside) == padded(inside)
    assert outside.abstract_sharded().opt_state == inside.abstract_sharded().opt_state


def test_bytes_of_the_optimizer_state():
    """In bytes a parameter: AdamW 8, in bfloat16 4, Muon 4 but for norms, embedding and head, Adafactor some
    hundredths of large matrices, Lion and SGD 4, SGD without momentum nothing.
    """
    model = dataclasses.replace(
        TINY, hidden_size=256, intermediate_size=512, moe_intermediate_size=256
    )

    def held(**options):
        config = dataclasses.replace(config_of(dataclasses.replace(ADAMW, **options)), model=model)
        mesh = make_mesh(config, jax.devices()[:1])
        with jax.set_mesh(mesh):
            b = state.make_layout(config, mesh).bytes_per_device(mesh)
        return b["optimizer"] / (b["parameters"] / 4)

    assert held() == pytest.approx(8, abs=0.01) and held(moment_dtype="bfloat16") == pytest.approx(
        4, abs=0.01
    )
    assert 4 < held(name="muon") < 4.5 and held(
        name="muon", moment_dtype="bfloat16"
    ) == pytest.approx(held(name="muon") / 2, rel=0.01)
    assert held(name="adafactor") < 0.3
    assert held(name="adafactor", first_moment=0.9) == pytest.approx(
        4 + held(name="adafactor"), abs=0.01
    )
    for name in ("lion", "sgd"):
        assert held(name=name) == pytest.approx(4, abs=0.01)
        assert held(name=name, moment_dtype="bfloat16") == pytest.approx(2, abs=0.01)
    assert held(name="sgd", momentum=0.0) < 1e-3


def test_the_state_of_other_runs_has_its_old_names():
    """A checkpoint of a run without these options stays readable."""
    t = config_of()
    mesh = make_mesh(t, jax.devices()[:1])
    with jax.set_mesh(mesh):
        tree = state.to_tree(state.make_layout(t, mesh).abstract)
    assert set(tree) == {"step", "params", "bias", "opt_state", "bad_steps", "skipped_steps"}
    assert {k: set(v) for k, v in tree["opt_state"]["1"].items()} == {
        "0": {"count", "mu", "nu"},
        "2": {"count"},
    }


# ----------------------------------------------------------------------------------------------- accumulation


@pytest.mark.slow
def test_bfloat16_accumulation_halves_the_buffer():
    """Four micro-batches: three roundings of 2^-9 of a sum, which Adam's update takes over. The compiled
    step, one device, is smaller: by up to 2 bytes a parameter, of 4 that the buffer had, and by half of that
    where the peak is when float32 gradients are made of the buffer.
    """
    runs = {
        d: trainer(config_of(accumulation=4, accumulation_dtype=d)) for d in ("float32", "bfloat16")
    }
    curves, temporaries = {}, {}
    for dtype, t in runs.items():
        curves[dtype] = losses_of(t.run(t.start(), 8)[1])
        temporaries[dtype] = program.memory(t.compiled).temporaries
    parameters = sum(a.size for a in jax.tree.leaves(runs["float32"].layout.abstract.params))
    assert np.abs(curves["bfloat16"] - curves["float32"]).max() < 0.01 and not np.array_equal(
        curves["bfloat16"], curves["float32"]
    )
    assert curves["float32"][-1] < curves["float32"][0] - 0.3
    assert temporaries["float32"] - temporaries["bfloat16"] > 0.9 * parameters, (
        temporaries,
        parameters,
    )

    def carried(t):
        """Dtypes of what the loop over micro-batches carries in the shapes of the gradients."""
        with jax.set_mesh(t.mesh):
            jaxpr = jax.make_jaxpr(
                step.make_train_step(t.config, t.layout, objectives.make(t.config))
            )(t.layout.abstract_sharded(), t.batch(0))
        loops = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 4]
        return [
            {v.aval.dtype.name for v in e.outvars if v.aval.ndim > 1 and v.aval.dtype != jnp.int32}
            for e in loops
        ]

    assert carried(runs["bfloat16"]) == [{"bfloat16"}] and carried(runs["float32"]) == [{"float32"}]


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"optimizer": {"name": "adafactor", "b1": 0.8}},
            "config.optimizer.b1=0.8 has no effect with config.optimizer.name=adafactor",
        ),
        (
            {"optimizer": {"name": "adafactor", "moment_dtype": "bfloat16"}},
            "moment_dtype=bfloat16 has no effect with config.optimizer.name=adafactor",
        ),
        (
            {"optimizer": {"momentum": 0.9}},
            "config.optimizer.momentum=0.9 has no effect with config.optimizer.name=adamw",
        ),
        (
            {"optimizer": {"scale_parameter": False}},
            "Set it to True, its default, or config.optimizer.name=adafactor",
        ),
        (
            {"optimizer": {"moment_dtype": "bfloat16", "b2": 0.999}},
            "config.optimizer.b2=0.999 and config.optimizer.moment_dtype=bfloat16",
        ),
        (
            {"optimizer": {"name": "muon", "momentum": 1.0}},
            "config.optimizer.momentum=1.0 is not below 1",
        ),
        ({"optimizer": {"name": "lamb"}}, "config.optimizer.name='lamb' is not known"),
        (
            {"optimizer": {"name": "lion", "eps": 1e-6}},
            "config.optimizer.eps=1e-06 has no effect with config.optimizer.name=lion",
        ),
        (
            {"optimizer": {"name": "lion", "moment_dtype": "bfloat16", "b2": 0.999}},
            "config.optimizer.b2=0.999 and config.optimizer.moment_dtype=bfloat16",
        ),
        (
            {"optimizer": {"name": "sgd", "momentum": 0.0, "nesterov": True}},
            "nesterov=True has no effect with config.optimizer.name=sgd and config.optimizer.momentum=0.0",
        ),
        (
            {"optimizer": {"clip_threshold": 2.0}},
            "clip_threshold=2.0 has no effect with config.optimizer.name=adamw",
        ),
        (
            {"optimizer": {"name": "adafactor", "warmup_init": True}},
            "warmup_init=True has no effect with config.optimizer.relative_step=False",
        ),
        (
            {"optimizer": {"name": "adafactor", "relative_step": True, "learning_rate": 0.1}},
            "learning_rate=0.1 has no effect with config.optimizer.relative_step=True. Set it to 0.001",
        ),
        (
            {"optimizer": {"schedule": "linear", "power": 2.0}},
            "power=2.0 has no effect with config.optimizer.schedule=linear",
        ),
        (
            {"optimizer": {"warmup_fraction": 0.1, "warmup_steps": 5}},
            "warmup_fraction=0.1 and config.optimizer.warmup_steps=5 are two warmups",
        ),
        (
            {"optimizer": {"warmup_steps": 0, "warmup_shape": "log"}},
            "warmup_shape=log has no effect without a warmup",
        ),
        (
            {"optimizer": {"hold_steps": 1000}},
            "hold_steps=1000 and a warmup of 100 steps leave nothing of config.train.steps=1000",
        ),
        (
            {"optimizer": {"hold_steps": 100, "warmup_fraction": 0.95}},
            "hold_steps=100 and a warmup of 950 steps leave nothing of config.train.steps=1000",
        ),
        (
            {"optimizer": {"schedule": "constant", "hold_steps": 4}},
            "hold_steps=4 has no effect with config.optimizer.schedule=constant",
        ),
        (
            {"optimizer": {"schedule": "cosine_with_restarts", "cycles": 2**26}},
            "config.optimizer.cycles=67108864 x config.train.steps=1000 is 2^31 or more",
        ),
        (
            {"optimizer": {"moment_dtype": "float16"}},
            "config.optimizer.moment_dtype='float16' is not known",
        ),
        (
            {"fp16": {"hysteresis": 3}},
            "config.fp16.hysteresis=3 has no effect with config.train.dtype=bfloat16",
        ),
        (
            {"train": {"dtype": "float16"}, "fp16": {"loss_scale": 128.0, "loss_scale_window": 7}},
            "no effect with the fixed config.fp16.loss_scale=128.0",
        ),
        (
            {"train": {"dtype": "float16"}, "fp16": {"initial_scale_power": 40}},
            "config.fp16.initial_scale_power=40 is above 32",
        ),
        (
            {
                "train": {"dtype": "float16"},
                "fp16": {"initial_scale_power": 2, "min_loss_scale": 8.0},
            },
            "config.fp16.min_loss_scale=8.0 is above the first scale",
        ),
        (
            {"train": {"accumulation_dtype": "bfloat16"}},
            "has no effect with config.train.accumulation=1",
        ),
        (
            {"train": {"accumulation_dtype": "bfloat16", "accumulation": 2}, "mesh": {"stage": 2}},
            "has no effect with config.mesh.stage=2",
        ),
    ],
)
def test_options_without_effect_are_refused(changes, message):
    kinds = {
        "optimizer": OptimizerConfig,
        "train": TrainConfig,
        "fp16": Fp16Config,
        "mesh": MeshConfig,
    }
    with pytest.raises(UserError) as error:
        validate(
            Config(**{section: kinds[section](**values) for section, values in changes.items()})
        )
    assert message in str(error.value) and "\n" not in str(error.value)
