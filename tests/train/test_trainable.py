"""Factors of the learning rate by pattern, and weights that are frozen: `config.optimizer.lr_multipliers`.

Updates are compared with torch's parameter groups and with optax.multi_transform, runs on a mesh with one
device, and what is frozen with what it was, bit for bit.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from deepseek_jax import objectives
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.multipliers import parse
from deepseek_jax.config.options import (
    Config,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OffloadConfig,
    OptimizerConfig,
    ShardingConfig,
)
from deepseek_jax.errors import UserError
from deepseek_jax.model.layout import abstract_model
from deepseek_jax.run import resume
from deepseek_jax.train import offloaded_update, state, step, trainable
from deepseek_jax.train.optimizer import decay_mask, learning_rate, make_optimizer
from tests.support import conversion, invariance
from tests.support.small_runs import (
    ADAMW,
    TINY,
    Trainer,
    config_of,
    restored,
    same,
    trainer,
)

RULES = "experts=1.0,embed_tokens|lm_head=0.1,norm|gate=0"


def options(rules: str = RULES, default: float = 0.5, **others) -> OptimizerConfig:
    return dataclasses.replace(ADAMW, lr_multipliers=rules, default_lr_multiplier=default, **others)


def by_path(params: nnx.State) -> dict[str, np.ndarray]:
    """{path: array} of parameters."""
    return {
        conversion.path_of(p): np.asarray(a) for p, a in jax.tree_util.tree_leaves_with_path(params)
    }


def multipliers(rules: str, default: float = 1.0, model: ModelConfig = TINY):
    config = dataclasses.replace(Config(model=model), optimizer=options(rules, default))
    return trainable.multipliers(config, abstract_model(config)[1])


# ------------------------------------------------------------------------------------------ what matches


def test_entries_are_patterns_with_factors():
    assert parse(RULES) == (("experts", 1.0), ("embed_tokens|lm_head", 0.1), ("norm|gate", 0.0))
    assert parse(r" a{1,2}=2 , (?=b)c=1e-1,") == (("a{1,2}", 2.0), ("(?=b)c", 0.1))
    assert parse("") == ()


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("experts", "'experts' has no factor"),
        ("experts=fast", "the factor of 'experts' is fast"),
        ("experts=-1", "the factor of 'experts' is -1"),
        ("experts=inf", "the factor of 'experts' is inf"),
        ("(=1", "'(' is no regular expression"),
        (
            "expertts=1",
            "'expertts' matches no weight of this model. Near it are layers/mlp/experts/",
        ),
        ("mlp=1,experts=0.5", "all that 'experts' matches (layers/mlp/experts/down_proj, "),
        (
            r"layers\.0\.=0.5",
            r"'layers\\.0\\.' matches a part of the tensors that lie in the array layers/",
        ),
        ("experts.1.gate_proj=0", "An array has one learning rate"),
        (".=0", "freeze every weight"),
    ],
)
def test_what_cannot_act_is_refused(rules, said):
    with pytest.raises(UserError) as error:
        multipliers(rules)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_all_frozen_is_refused_before_there_is_a_model():
    with pytest.raises(UserError, match="freeze every weight"):
        config_of(options("", default=0.0))


def test_the_first_pattern_that_matches_wins_and_the_table_says_what_it_matched():
    found = multipliers(RULES, 0.5)
    assert (
        found.of(("layers", "mlp", "experts", "gate_up_proj")) == 1
    )  # not `gate`: experts comes first
    assert found.of(("layers", "mlp", "gate", "kernel")) == 0
    assert found.of(("layers", "self_attn", "q_proj", "kernel")) == 0.5
    lines = found.table()
    text = "\n".join(lines)
    assert lines[0].split() == ["pattern", "factor", "parameters", "weights"]
    assert "norm|gate" in text and "frozen" in text and "mlp/gate" in text
    sizes = {p: a.size for p, a in by_path_of_shapes().items()}
    learn = sum(n for p, n in sizes.items() if "norm" not in p and "/gate/" not in p)
    assert f"({learn / sum(sizes.values()):.1%})" in lines[-1]


def by_path_of_shapes():
    leaves = jax.tree_util.tree_leaves_with_path(abstract_model(Config(model=TINY))[1])
    return {conversion.path_of(p): a for p, a in leaves}


def test_hugging_face_names_match_too():
    # Both forms of a checkpoint's experts, and a module under another name than here.
    found = multipliers(
        r"\.experts\.\d+\.=0.5,^model\.embed_tokens\.weight$=0.1,shared_head=0",
        1.0,
        invariance.MODEL,
    )
    assert found.of(("layers", "mlp", "experts", "down_proj")) == 0.5
    assert found.of(("embed_tokens", "weight")) == 0.1
    assert found.of(("mtp", 0, "norm", "weight")) == 0
    assert found.of(("mtp", 0, "layer", "mlp", "experts", "gate_up_proj")) == 0.5


def test_without_options_everything_learns_and_nothing_is_wrapped():
    found = multipliers("")
    params = abstract_model(Config(model=TINY))[1]
    learns, frozen = found.split(params)
    assert learns is params and not frozen and found.scale() is None and found.table() == []


# --------------------------------------------------------------------------------------------- updates


def test_updates_are_those_of_torch_parameter_groups():
    """AdamW on the same gradients, clipped alike: float32 here and there, 1e-6 relative to an update."""
    import torch

    config = dataclasses.replace(
        Config(model=TINY), optimizer=options("experts=1.0,lm_head=0.1,norm=2,gate=0", 0.5)
    )
    params = abstract_model(config)[1]
    factors = trainable.multipliers(config, params)
    rng = np.random.default_rng(0)

    def draw(like):
        return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), like)

    learns, frozen = factors.split(draw(params))
    assert [p for p, _ in nnx.to_flat_state(frozen)] == [("layers", "mlp", "gate", "kernel")]
    optimizer = make_optimizer(config, learns, factors)
    opt_state = jax.jit(optimizer.init)(learns)
    o, rate = config.optimizer, learning_rate(config)
    ours = {p: v.get_value() for p, v in nnx.to_flat_state(learns)}
    decays = {p: v.get_value() for p, v in nnx.to_flat_state(decay_mask(learns))}
    theirs = {p: torch.nn.Parameter(torch.tensor(a)) for p, a in ours.items()}
    groups = [
        {
            "params": [w],
            "weight_decay": o.weight_decay if decays[p] else 0.0,
            "factor": factors.of(p),
        }
        for p, w in theirs.items()
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(o.b1, o.b2), eps=o.eps)
    update = jax.jit(optimizer.update)
    for i in range(4):
        grads = draw(learns)
        for p, g in nnx.to_flat_state(grads):
            theirs[p].grad = torch.tensor(g.get_value())
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), o.grad_clip)
        for group in adamw.param_groups:
            group["lr"] = float(rate(i)) * group["factor"]
        adamw.step()
        updates, opt_state = update(grads, opt_state, learns)
        learns = jax.tree.map(np.add, learns, updates)
    for p, v in nnx.to_flat_state(learns):
        moved = np.abs(np.asarray(v.get_value()) - ours[p]).max()
        np.testing.assert_allclose(
            np.asarray(v.get_value()),
            theirs[p].detach().numpy(),
            rtol=1e-6,
            atol=1e-6 * moved + 1e-7,
        )


def masked_reference(config: Config) -> optax.GradientTransformation:
    """The gradient of all weights, those of frozen ones set to 0, and optax's own transform by label."""
    o, rate = config.optimizer, learning_rate(config)
    params = abstract_model(config)[1]
    factors = trainable.multipliers(config, params)
    labels = nnx.from_flat_state(
        [(p, v.replace(str(factors.of(p)))) for p, v in nnx.to_flat_state(params)]
    )

    def of(factor: float) -> optax.GradientTransformation:
        if not factor:
            return optax.set_to_zero()
        return optax.adamw(
            lambda count: rate(count) * factor,
            o.b1,
            o.b2,
            o.eps,
            weight_decay=o.weight_decay,
            mask=decay_mask,
        )

    names = sorted({factors.of(p) for p, _ in nnx.to_flat_state(params)})
    mask = jax.tree.map(lambda label: label == "0.0", labels)
    return optax.chain(
        optax.masked(optax.set_to_zero(), mask),
        optax.clip_by_global_norm(o.grad_clip),
        optax.multi_transform({str(f): of(f) for f in names}, labels),
    )


MESH = MeshConfig(fsdp=4, expert=2)


@functools.cache
def run_of(config: Config, steps: int = 3):
    """(state after some steps, losses, gradient norms), from `invariance.initial_state`."""
    t = trainer(config)
    s, metrics = t.run(t.start(), steps)
    return (
        jax.device_get(s),
        np.asarray([float(m.loss) for m in metrics]),
        np.asarray([float(m.grad_norm) for m in metrics]),
    )


@pytest.mark.slow
def test_a_run_is_that_of_masked_gradients():
    """Losses and weights of three steps in float32 on eight devices, against one device that differentiates
    all weights and optax.multi_transform; what is frozen keeps its bits.
    """
    config = config_of(options(), MESH)
    s, losses, _ = run_of(config)
    # `gate` is frozen, and with it the selection bias.
    whole = config_of(ADAMW)
    whole = dataclasses.replace(whole, moe=MoeConfig(bias_update_rate=0.0))
    t = trainer(whole)
    layout = t.layout._replace(optimizer=masked_reference(config))
    with jax.set_mesh(t.mesh):
        reference = jax.jit(step.make_train_step(whole, layout, objectives.make(whole)))
        r = t.start()
        r = r._replace(opt_state=jax.jit(layout.optimizer.init)(r.params))
        for i in range(3):
            r, m = reference(r, t.batch(i))
            assert float(m.loss) == pytest.approx(losses[i], rel=1e-6)
    assert same(s.bias, invariance.initial_state(TINY).bias)
    theirs, start = by_path(r.params), by_path(invariance.initial_state(TINY).params)
    ours = by_path(s.weights().params)
    assert ours.keys() == theirs.keys()
    for path, a in ours.items():
        frozen = "norm" in path or "/gate/" in path
        assert np.array_equal(a, start[path]) == frozen, path
        moved = np.abs(theirs[path] - start[path]).max()
        # Adam's first steps divide by the gradient itself: rounding of 1e-7 where that is small.
        np.testing.assert_allclose(a, theirs[path], atol=1e-3 * moved + 1e-7, rtol=1e-6)


def test_nothing_of_frozen_weights_is_held():
    t, everything = trainer(config_of(options(), MESH)), trainer(config_of(ADAMW, MESH))
    held, all_of_it = (x.layout.bytes_per_device(x.mesh) for x in (t, everything))
    assert held["parameters"] + held["frozen_parameters"] == all_of_it["parameters"]
    assert held["gradients"] == held["parameters"]
    assert (
        held["optimizer"] - 2 * held["parameters"]
        == all_of_it["optimizer"] - 2 * all_of_it["parameters"]
    )
    paths = {
        conversion.path_of(p)
        for p, _ in jax.tree_util.tree_leaves_with_path(t.layout.abstract.opt_state)
    }
    assert not [p for p in paths if "norm" in p or "/gate/" in p]


# einsums of the products that make gradients of weights: linear maps; experts in rounds, and on one CPU.
PRODUCTS = ("ti,to->io", "gji,gjo->gio", "ji,jo->io")


FORWARD = "gji,gio->gjo"  # of the experts


def weight_gradients(text: str) -> list[str]:
    return [product for product in PRODUCTS if product in text]


def test_no_gradient_of_frozen_weights_is_computed():
    """Where everything but the norms is frozen, the program has none of the products that make a weight's
    gradient, while its others keep their names; nothing of them is left in the loop over further rounds.
    """
    everything = trainer(config_of(options(), MESH)).lowered.as_text(debug_info=True)
    assert weight_gradients(everything) == list(PRODUCTS[:2]) and FORWARD in everything
    norms = Trainer(config_of(options("norm=1", 0.0), MESH)).compiled.as_text()
    assert weight_gradients(norms) == [] and FORWARD in norms


def invariance_frozen(optimizer: OptimizerConfig) -> nnx.State:
    config = config_of(optimizer)
    found = trainable.multipliers(config, abstract_model(config)[1])
    return found.split(invariance.initial_state(TINY).params)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(mesh=MeshConfig(fsdp=2, expert=2, tensor=2)),
        dict(mesh=MeshConfig(stage=2, fsdp=2, expert=2), accumulation=2),
        dict(mesh=MESH, sharding=ShardingConfig("shard_grad_op", 0), accumulation=2),
        dict(mesh=MESH, sharding=ShardingConfig("zero1", 0)),
        dict(mesh=MeshConfig(data=2, fsdp=2, expert=2), sharding=ShardingConfig("hybrid_shard", 0)),
        dict(offload=OffloadConfig(optimizer_state=True, parameters=True), remat="full"),
    ],
)
def test_every_layout_computes_the_same(case):
    one, losses, _ = run_of(config_of(options(), MESH))
    s, found, _ = run_of(config_of(options(), **case))
    np.testing.assert_allclose(found, losses, rtol=2e-6)
    assert same(s.frozen, one.frozen)


@pytest.mark.slow
def test_compressed_gradients_have_no_residual_of_frozen_weights():
    sharding = ShardingConfig("hybrid_shard", 0, gradient_compression="bfloat16")
    config = config_of(options(), MeshConfig(data=2, fsdp=2), sharding=sharding)
    s, losses, _ = run_of(config)
    assert same(s.frozen, invariance_frozen(options()))
    assert jax.tree.structure(s.residual) == jax.tree.structure(s.params)
    np.testing.assert_allclose(losses, run_of(config_of(options(), MESH))[1], rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "others",
    [
        dict(name="muon", learning_rate=1e-3),
        dict(name="adafactor", learning_rate=1e-3),
        dict(name="lion", learning_rate=1e-3),
        dict(name="sgd", learning_rate=1e-3),
        dict(moment_dtype="bfloat16", b2=0.95),
    ],
)
@pytest.mark.parametrize("rules", [RULES, "experts=0.5,.=0"])
def test_every_optimizer_leaves_frozen_weights(others, rules):
    optimizer = options(rules, 0.5, **others)
    s, losses, _ = run_of(config_of(optimizer))
    assert np.isfinite(losses).all() and same(s.frozen, invariance_frozen(optimizer))
    start = by_path(invariance.initial_state(TINY).params)
    assert all(not np.array_equal(a, start[p]) for p, a in by_path(s.params).items())


@pytest.mark.parametrize(
    "rules",
    ["experts=0.5,.=0", pytest.param("experts=0.5,lm_head=2,.=0", marks=pytest.mark.slow)],
)
def test_an_offloaded_update_is_the_same(rules):
    """Layer by layer. Where stacks are all that learns, the loop over layers would leave the counters."""
    config = dataclasses.replace(
        Config(model=TINY), optimizer=options(rules), offload=OffloadConfig(optimizer_state=True)
    )
    params = abstract_model(config)[1]
    factors = trainable.multipliers(config, params)
    rng = np.random.default_rng(0)
    params, grads = (
        jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), tree)
        for tree in [factors.split(params)[0]] * 2
    )
    optimizer = make_optimizer(config, params, factors)

    @jax.jit
    def both(grads, params):
        opt_state = optimizer.init(params)
        updates, new = optimizer.update(grads, opt_state, params)
        norm, ok = optax.tree.norm(grads), jax.numpy.bool_(True)
        found = offloaded_update.update(config, factors, grads, opt_state, params, norm, ok)
        return (optax.apply_updates(params, updates), new), found

    whole, by_layer = both(grads, params)
    assert jax.tree.structure(whole) == jax.tree.structure(by_layer)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(by_layer), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# ----------------------------------------------------------------------------------------- going on


def test_a_checkpoint_is_the_tree_of_all_parameters_and_resumes_bit_for_bit(tmp_path):
    t = trainer(config_of(options(), MESH))
    tree, whole = (state.to_tree(x.layout.abstract) for x in (t, trainer(config_of(ADAMW))))
    assert jax.tree.structure(tree["params"]) == jax.tree.structure(whole["params"])
    assert "frozen" not in tree
    s, _ = t.run(t.start(), 2)
    again = restored(t, s, tmp_path)
    a, first = t.run(s, 2, first=2)
    b, second = t.run(again, 2, first=2)
    assert same(a, b) and same(first, second)


def test_other_multipliers_begin_the_optimizer_anew(tmp_path, capsys):
    """The moments of a checkpoint are of other weights: none is kept, the schedule goes on."""
    t = trainer(config_of(options(), MESH))
    s, _ = t.run(t.start(), 2)
    weights = by_path(s.weights().params)
    with jax.set_mesh(t.mesh):
        checkpoints = Checkpointer(str(tmp_path))
        checkpoints.save(2, state.to_tree(s), {})
        checkpoints.wait()
        same_ones, _ = resume.restore(checkpoints, t.layout)
        assert same(same_ones.opt_state, s.opt_state) and not capsys.readouterr().out
        other = state.make_layout(config_of(options("experts=1", 0.0), MESH), t.mesh)
        found, _ = resume.restore(checkpoints, other)
        said = capsys.readouterr().out
        assert "begins anew: other weights learn" in said and said.count("\n") == 1
        for path, a in by_path(found.weights().params).items():
            assert np.array_equal(a, weights[path])
        moments = [np.asarray(a) for a in jax.tree.leaves(found.opt_state)]
        assert all(not a.any() for a in moments if a.ndim)
        assert sorted(int(a) for a in moments if not a.ndim) == [
            0,
            2,
        ]  # Adam's count; the schedule's
        # Another optimizer is still another optimizer, also one whose state is a part of this one's.
        for name in ("muon", "lion", "sgd"):
            other = options("experts=1", 0.0, name=name)
            other = state.make_layout(config_of(other, MESH), t.mesh)
            with pytest.raises(UserError, match="of another model or optimizer"):
                resume.restore(checkpoints, other)
        checkpoints.close()
