"""The table of options: complete, read back by name, and the one source of checks, help and hints."""

import dataclasses
import math

import pytest

from deepseek_jax.config import help, options, suggestions
from deepseek_jax.config.configdict import base_config, from_config_dict, yarn
from deepseek_jax.config.option import NAMES, Alias, Option, option, options_of, section
from deepseek_jax.config.options import OPTIONS, Config, of, replaced, value_of
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError


def leaves(tree, where=""):
    for key, value in tree.items():
        yield from leaves(value, f"{where}{key}.") if isinstance(value, dict) else [f"{where}{key}"]


def test_every_option_is_in_the_table_and_described():
    assert list(OPTIONS) == list(leaves(Config().to_json())) and len(OPTIONS) > 130
    for name, o in OPTIONS.items():
        assert o.name == name and o.help.endswith(".") and o.type in (int, float, bool, str), name
        assert o.default == value_of(Config(), name) and o == of(name)
        assert o.optional or type(o.default) is o.type, name
        o.check(o.default)
        assert not o.choices or o.type is str
        assert o.on_resume in ("", "free", "refused", "new pass")
        assert set(o.synonyms.values()) <= set(o.choices)
        assert bool(o.names) == any(choice.endswith(NAMES) for choice in o.choices)
    with pytest.raises(KeyError):
        of("train.stepz")


def test_every_option_of_the_model_says_whether_it_changes_shapes():
    """A run must not go on with arrays of other shapes."""
    for name, o in OPTIONS.items():
        assert (o.changes_shapes is not None) == name.startswith("model."), name
    assert options.changes_shapes("model.hidden_size")
    assert not options.changes_shapes("model.rope_theta")
    assert not options.changes_shapes("model.rope_scaling")  # of none of its options
    assert options.changes_shapes("model")


@pytest.mark.parametrize("o", OPTIONS.values(), ids=lambda o: o.name)
def test_limits_and_choices_are_checked(o):
    """By the table: what it excludes is refused, in a line that has the option, the value and a repair."""
    outside = {
        "nan": math.nan if o.type is float else None,
        "at_least": None if o.at_least is None else o.type(o.at_least - 1000),
        "above": None if o.above is None else o.type(o.above),
        "at_most": None if o.at_most is None else o.type(o.at_most + 1),
        "below": None if o.below is None else o.type(o.below),
        "choices": "nonsense" if o.choices and not o.path and "" not in o.choices else None,
    }
    for value in outside.values():
        if value is not None:
            with pytest.raises(UserError) as error:
                validate(replaced(Config(), o.name, value))
            text = str(error.value)
            assert text.startswith(f"config.{o.name}={value!r} is ") and " Set " in text
            assert "\n" not in text
    for value in (*o.special, *o.synonyms, *(c for c in o.choices if not c.endswith(NAMES))):
        o.check(value)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("train.batch_size", 0, "=0 is below 1. Set it to 1 up to 2147483647."),
        ("train.steps", 0, "=0 and config.train.epochs=0.0: a run needs an end. Set config.train"),
        (
            "optimizer.b1",
            1.0,
            "=1.0 is not below 1. Set it to 0 or more and below 1, for instance 0.9.",
        ),
        (
            "watchdog.step_timeout",
            -0.5,
            "=-0.5 is below 0. Set it to 0 or more, or to -1 (20 medians, at least 600).",
        ),
        (
            "moe.dispatch",
            "rign",
            "'rign' is not known. Did you mean ring? Set config.moe.dispatch to one",
        ),
        ("moe.dispatch", "alltoall", "alltoall (NeMo) is all_to_all here."),
        (
            "sharding.strategy",
            "fsdp",
            "one of: full_shard, shard_grad_op, zero1, hybrid_shard, no_shard",
        ),
        (
            "train.remat",
            "save:atention",
            "'atention' is not known. Did you mean attention? Set names",
        ),
    ],
)
def test_messages(name, value, message):
    with pytest.raises(UserError) as error:
        validate(replaced(Config(), name, value))
    assert message in str(error.value)


def test_what_is_allowed():
    for name, value in (
        ("sharding.strategy", "HYBRID_SHARD"),
        ("sharding.strategy", "ZeRO3"),
        ("train.remat", "save:attention,mlp_hidden"),
        ("offload.activations", "attention"),
        ("model.q_lora_rank", None),
        ("data.tokenizer", "a/path.json"),
        ("train.steps", 2**40),
    ):
        of(name).check(value)


def test_help():
    """By section, with default, unit, limits, choices."""
    text = help.describe()
    assert all(f"  --config.{name}=" in text for name in OPTIONS)
    assert "\nmodel.rope_scaling: Hugging Face `rope_scaling`." in text
    assert "[sequences; 1 up to 2147483647]" in text
    assert (
        "  --config.moe.dispatch='all_to_all'\n" in text
        and "          ring: expert pipeline" in text
    )
    assert "          full_shard=zero3: parameters, gradients and optimizer state" in text
    assert max(map(len, text.split("\n"))) <= 110


def test_a_section_is_one_dataclass():
    """What issues to come need: options of a new section are checked, described and read like all others."""

    @dataclasses.dataclass(frozen=True)
    class Distill:
        alpha: float = option(0.5, "Weight of the teacher's part.", at_least=0, at_most=1)
        teacher: str = option("", "Folder of the teacher.", path=True, aliases={"nemo": "teacher"})

    @dataclasses.dataclass(frozen=True)
    class More:
        distill: Distill = section(Distill)

    alpha, teacher = options_of(More)
    assert alpha == Option(
        "distill.alpha", float, 0.5, "Weight of the teacher's part.", at_least=0, at_most=1
    )
    assert teacher.aliases == (Alias(nemo="teacher"),) and More().distill.alpha == 0.5
    with pytest.raises(
        UserError, match="config.distill.alpha=2.0 is above 1. Set it to 0 up to 1."
    ):
        alpha.check(2.0)


@pytest.mark.parametrize(
    "name, said",
    [
        ("train.stepz", "Did you mean steps?"),
        ("train.learning_rate", "Did you mean config.optimizer.learning_rate?"),
        ("modle.layers", "Did you mean model?"),
        (
            "train.gradient_accumulation_steps",
            "gradient_accumulation_steps (DeepSpeed) is config.train.accumulation here.",
        ),
        ("gradient_accumulation_steps", "is config.train.accumulation here."),
        ("train.bf16", "is config.train.dtype=bfloat16 here."),
        ("sharding.zero_stage", "zero_stage (Hugging Face) is config.sharding.strategy here."),
        ("mesh.tensor_model_parallel_size", "is config.mesh.tensor here."),
        (
            "fsdp_sharding_strategy",
            "fsdp_sharding_strategy (Hugging Face) is config.sharding.strategy here.",
        ),
        ("offload.offload_optimizer", "is config.offload.optimizer_state=True here."),
        (
            "fsdp_sync_module_states",
            "Here: nothing to set: every device creates or reads its own shards.",
        ),
        ("xyzzy", "See --help for all options."),
    ],
)
def test_what_an_unknown_option_was_meant_to_be(name, said):
    assert said in suggestions.suggestion(name)


def test_a_renamed_option_is_refused_with_its_new_name(monkeypatch):
    monkeypatch.setattr(suggestions, "RENAMED", {"train.grad_clip": "optimizer.grad_clip"})
    with pytest.raises(UserError, match="It is config.optimizer.grad_clip now."):
        from_config_dict({"train": {"grad_clip": 1.0}})
    assert all(new in OPTIONS and old not in OPTIONS for old, new in suggestions.RENAMED.items())


def test_a_config_file_of_a_user():
    """As they were written before there was a table: base_config() without arguments, by either name."""
    from deepseek_jax.configdict import base_config as first_name

    from deepseek_jax.config import UserError as moved

    config = first_name()
    config.model.q_lora_rank = 512
    config.model.rope_scaling.update(type="yarn", factor=40.0)
    config.optimizer.learning_rate = 1
    read = from_config_dict(config)
    assert moved is UserError and first_name is base_config
    assert read.model.q_lora_rank == 512 and read.optimizer.learning_rate == 1.0
    config.train.stepz = 3
    with pytest.raises(UserError, match="config.train.stepz is not an option. Did you mean steps"):
        from_config_dict(config)


def test_arguments_of_a_config():
    assert base_config("yarn", allowed=("", "yarn")) == base_config() == base_config("")
    with pytest.raises(UserError, match="the argument 'x' of this config is not known. Write yarn"):
        base_config("x", allowed=("", "yarn"))
    with pytest.raises(UserError, match="the argument 'x' .* Leave it out: there is none."):
        base_config("x")
    config = base_config()
    yarn(config.model, factor=32, mscale=0.707)
    assert config.model.max_position_embeddings == 131072
    validate(from_config_dict(config))


def test_a_config_json_of_an_earlier_version():
    """It lacks options that came later, has 0 or null for None and whole numbers for floats."""
    before = {
        "seed": 3,
        "model": {"hidden_size": 64, "q_lora_rank": 0, "head_dim": None, "rope_theta": 50000},
        "sharding": {"strategy": "zero3"},
        "train": {"steps": 7},
    }
    config = from_config_dict(before)
    assert (config.seed, config.model.hidden_size, config.train.steps) == (3, 64, 7)
    assert config.model.q_lora_rank is None and config.model.rope_theta == 50000.0
    assert from_config_dict(config.to_json()) == config
    validate(config)
