"""Trainer of transformers 4 and 5, TRL, open-r1: what keys mean by version, what is refused and written."""

import pytest

from deepseek_jax.errors import UserError
from tests.support.migration import migrate

TRAINER = "output_dir: out\nper_device_train_batch_size: 4\nmax_steps: 100\nlearning_rate: 1e-4\n"
FSDP = """\
fsdp: full_shard
fsdp_config:
  backward_prefetch: backward_post
  state_dict_type: SHARDED_STATE_DICT
  offload_params: true
  cpu_offload: true
"""
CHATS = "model_name_or_path: org/model\ndataset_name: org/chats\nmax_steps: 10\n"


def test_the_same_file_by_two_versions():
    """transformers 4 reads backward_prefetch, but not offload and state_dict_type; 5 the other way round."""
    four = migrate(TRAINER + FSDP, tools="hf4", devices=8)
    five = migrate(TRAINER + FSDP, tools="hf5", devices=8)
    assert four.config != five.config
    assert four.config.sharding.backward_prefetch == "post"
    assert not four.config.offload.parameters and "does not read" in four.why(
        "fsdp_config.cpu_offload"
    )
    assert five.config.offload.parameters and five.config.offload.optimizer_state
    assert five.config.checkpoint.kind == "sharded"
    assert "FSDP2" in five.why("fsdp_config.backward_prefetch")
    assert five.config.sharding.backward_prefetch == "pre"  # ours: it changes speed alone


@pytest.mark.parametrize(
    "text, tool",
    [
        ("warmup_ratio: 0.1", "transformers 4"),
        ("evaluation_strategy: 'no'", "transformers 4"),
        ("fsdp: full_shard auto_wrap", "transformers 4"),
        ("warmup_steps: 0.1", "transformers 5"),
        ("fsdp: true\nfsdp_config: {reshard_after_forward: false}", "transformers 5"),
        ("activation_checkpointing: true", "transformers 5"),
        ("dataset_name: a\nmax_seq_length: 128", "TRL 0.x"),
        ("dataset_name: a\nmax_length: 128", "TRL 1.x"),
    ],
)
def test_versions_are_guessed_and_said(text, tool):
    done = migrate(f"{TRAINER}{text}\n", devices=8)
    assert any(f"read as of {tool}," in note for note in done.m.notes), done.m.notes


def test_keys_of_the_other_version_are_refused():
    """29 keys of transformers 4 are gone in 5, which does not start with them."""
    done = migrate(
        TRAINER + "warmup_ratio: 0.1\noverwrite_output_dir: true\n", tools="hf5", devices=8
    )
    assert done.refused() == {"warmup_ratio", "overwrite_output_dir"}
    done = migrate(TRAINER + "activation_checkpointing: true\n", tools="hf4", devices=8)
    assert done.refused() == {"activation_checkpointing"}
    assert migrate(TRAINER + "warmup_steps: 0.1\n", tools="hf4", devices=8).refused() == {
        "warmup_steps"
    }


def test_defaults_are_written_out():
    """Every default of TrainingArguments that differs from ours."""
    done = migrate("output_dir: out\nsave_steps: 500\n", tools="hf5", devices=8)
    c = done.config
    o = c.optimizer
    assert (o.learning_rate, o.schedule, o.final_fraction, o.warmup_steps) == (
        5e-5,
        "linear",
        0.0,
        0,
    )
    assert (o.b1, o.b2, o.eps, o.weight_decay, o.grad_clip) == (0.9, 0.999, 1e-8, 0.0, 1.0)
    assert (c.train.batch_size, c.train.epochs, c.train.dtype, c.train.remat) == (
        64,
        3.0,
        "float32",
        "none",
    )
    assert (c.seed, c.checkpoint.every_steps, c.checkpoint.keep, c.log.every_steps) == (
        42,
        500,
        0,
        500,
    )
    assert (c.data.eval_fraction, c.moe.bias_update_rate, c.sharding.strategy) == (
        0.0,
        0.0,
        "no_shard",
    )
    assert "config.model.aux_loss_alpha=0.0" in done.launch
    assert done.m.settings["optimizer.b2"].because[0].origin == "transformers 5 by default"


def test_defaults_of_trl():
    """TRL 0.18 computes in float32 and keeps all activations; 1.16 neither."""
    old = migrate(CHATS, tools="open-r1", devices=8).config
    new = migrate(CHATS, tools="trl", devices=8).config
    assert (old.train.dtype, old.train.remat, old.log.every_steps) == ("float32", "none", 500)
    assert (new.train.dtype, new.train.remat, new.log.every_steps) == ("bfloat16", "full", 10)
    for c in (old, new):
        assert (c.objective, c.optimizer.learning_rate, c.train.sequence_length) == (
            "sft",
            2e-5,
            1024,
        )
        assert (c.sft.packing, c.sft.assistant_only_loss, c.sft.loss_type) == (
            "none",
            "false",
            "nll",
        )


@pytest.mark.parametrize(
    "keys, wanted",
    [
        ("packing: true", {"sft.packing": "bfd"}),
        ("packing: true\npacking_strategy: wrapped", {"sft.packing": "wrapped"}),
        ("assistant_only_loss: true", {"sft.assistant_only_loss": "true"}),
        ("completion_only_loss: false", {"sft.completion_only_loss": "false"}),
        ("chat_template: '{{ x }}'", {"sft.chat_template": "{{ x }}"}),
        ("eos_token: <|im_end|>", {"sft.eos_token": "<|im_end|>"}),
        ("system_prompt: Be good.", {"sft.system_prompt": "Be good."}),
        ("neftune_noise_alpha: 5", {"sft.neftune_noise_alpha": 5.0}),
        ("label_smoothing_factor: 0.1", {"sft.label_smoothing": 0.1}),
        ("loss_type: dft", {"sft.loss_type": "dft"}),
        (
            "activation_offloading: true",
            {"offload.activations": "layer_input", "train.remat": "full"},
        ),
        ("num_train_epochs: 2.5\nmax_steps: -1", {"train.epochs": 2.5, "train.steps": 0}),
        (
            "optim: adafactor",
            {"optimizer.name": "adafactor", "optimizer.min_dim_size_to_factor": 1},
        ),
        ("optim: lion_32bit", {"optimizer.name": "lion", "optimizer.b2": 0.999}),
        ("optim: paged_adamw_8bit", {"optimizer.name": "adamw"}),
        ("fp16: true", {"train.dtype": "float16"}),
        ("eval_strategy: steps\neval_steps: 0.1", {"eval.every_steps": 1}),
        ("eval_strategy: epoch", {"eval.every_epochs": 1.0, "eval.every_steps": 0}),
        ("save_strategy: no", {"checkpoint.every_steps": 0}),
        ("save_steps: 0.25", {"checkpoint.every_steps": 3}),
        ("logging_steps: 0.2", {"log.every_steps": 2}),
        (
            "use_peft: true\nlora_r: 8\nlora_alpha: 16\nlora_dropout: 0.1\nload_in_4bit: true\n"
            "lora_target_modules: [q_proj, experts]\nlora_modules_to_save: [lm_head]\nuse_rslora: true",
            {
                "lora.r": 8,
                "lora.alpha": 16.0,
                "lora.dropout": 0.1,
                "lora.base_dtype": "nf4",
                "lora.target_modules": "q_proj,experts",
                "lora.modules_to_save": "lm_head",
                "lora.use_rslora": True,
            },
        ),
    ],
)
def test_what_fine_tuning_has(keys, wanted):
    done = migrate(
        f"{CHATS.replace('max_steps: 10', '') if 'max_steps' in keys else CHATS}{keys}\n", devices=8
    )
    assert done.config, done.refused()
    for option, value in wanted.items():
        assert done.option(option) == value, option


@pytest.mark.parametrize(
    "keys, refused",
    [
        ("optim: galore_adamw", "optim"),
        ("lr_scheduler_type: reduce_lr_on_plateau", "lr_scheduler_type"),
        ("reward_funcs: [accuracy]", "reward_funcs"),
        ("beta: 0.1", "beta"),
        ("load_in_8bit: true", "load_in_8bit"),
        ("use_peft: true\nuse_dora: true", "use_dora"),
        ("max_length: null", "max_length"),
        ("lerning_rate: 1e-5", "lerning_rate"),
        ("learning_rate: fast", "learning_rate"),
        ("resume_from_checkpoint: out/checkpoint-10", "resume_from_checkpoint"),
        ("per_device_train_batch_size: ???", "per_device_train_batch_size"),
        ("metric_for_best_model: accuracy", "metric_for_best_model"),
        ("dataset_text_field: story", "dataset_text_field"),
        ("model_init_kwargs: {torch_dtype: float16}", "model_init_kwargs.torch_dtype"),
    ],
)
def test_what_is_refused_by_name(keys, refused):
    done = migrate(f"{CHATS}{keys}\n", tools="trl", devices=8)
    assert refused in done.refused()
    if refused != "per_device_train_batch_size":
        again = migrate(f"{CHATS}{keys}\n", tools="trl", devices=8, allow=done.refused())
        assert again.config and refused in {e.key for e, _ in again.lists.left_out}


def test_without_trl_there_is_no_loss_of_examples():
    done = migrate(
        TRAINER + "neftune_noise_alpha: 5\nlabel_smoothing_factor: 0.0\n", tools="hf5", devices=8
    )
    assert done.refused() == {"neftune_noise_alpha"}


def test_a_mixture_of_data_sets():
    text = (
        "model_name_or_path: m\ndataset_mixture:\n  datasets:\n"
        "    - {id: org/a, config: SFT, split: train, columns: [messages], weight: 1.0}\n"
        "    - {id: org/b, split: train, weight: 1}\n  seed: 0\n"
    )
    done = migrate(text, devices=8)
    assert done.option("data.path") == "data/a,data/b"
    assert done.launch.count("--repo-type=dataset") == 2
    half = migrate(text.replace("weight: 1}", "weight: 0.5}"), devices=8)
    assert half.refused() == {"dataset_mixture.datasets.1.weight"}


def test_a_teacher_of_gkd():
    text = (
        CHATS + "teacher_model_name_or_path: org/teacher\nlmbda: 0\nbeta: 1.0\ntemperature: 0.7\n"
    )
    c = migrate(text, tools="trl", devices=8).config
    assert (c.objective, c.distill.teacher, c.distill.beta) == ("distill", "models/teacher", 1.0)
    assert (c.distill.temperature, c.distill.alpha) == (0.7, 1.0)
    assert migrate(text.replace("lmbda: 0", "lmbda: 0.5"), tools="trl", devices=8).refused() == {
        "lmbda"
    }


def test_flags_win_over_the_recipe_and_the_recipe_over_accelerate():
    accelerate = "compute_environment: LOCAL_MACHINE\nmixed_precision: fp16\nnum_processes: 4\n"
    done = migrate(
        TRAINER + "bf16: true\n",
        accelerate,
        command="python train.py --learning_rate 3e-4 --per_device_train_batch_size=2",
        tools="hf4",
    )
    assert done.config.train.dtype == "bfloat16" and "wins" in done.why("mixed_precision")
    assert (
        done.config.optimizer.learning_rate == 3e-4
        and "--learning_rate=0.0003 wins" in done.why("learning_rate")
    )
    assert done.config.train.batch_size == 8


def test_moments_of_another_loss_of_balance():
    """transformers pools the counts of all layers: without the model that is no number of ours."""
    done = migrate(CHATS + "router_aux_loss_coef: 0.001\n", tools="trl", devices=8)
    assert done.refused() == {"router_aux_loss_coef"}


def test_devices_are_asked_for():
    with pytest.raises(UserError, match="--devices is missing"):
        migrate(TRAINER, tools="hf5")


def test_other_devices_keep_the_batch_of_a_step():
    """4 per device x 8 GPUs; on 2 here: the same 32 sequences, in 4 micro-batches of as many per device."""
    line = "torchrun --nproc_per_node=8 train.py"
    same = migrate(TRAINER, command=line, tools="hf5")
    fewer = migrate(TRAINER, command=line, tools="hf5", devices=2)
    assert (same.config.train.batch_size, same.config.train.accumulation) == (32, 1)
    assert (fewer.config.train.batch_size, fewer.config.train.accumulation) == (32, 4)
    assert any("yours 2" in note for note in fewer.m.notes)
    with pytest.raises(UserError, match="do not divide"):
        migrate(TRAINER, command=line, tools="hf5", devices=12)


def test_the_same_number_of_tokens():
    """16 sequences of 1024 that hold 256 tokens on average are 4 packed rows; 8 devices need 8."""
    text = CHATS + "per_device_train_batch_size: 8\n"
    done = migrate(text, devices=8, match_tokens=True, mean_length=256.0)
    assert (done.option("train.batch_size"), done.option("sft.packing")) == (16, "bfd")
    with pytest.raises(UserError, match="--mean_length"):
        migrate(text, devices=8, match_tokens=True)
    with pytest.raises(UserError, match="packed"):
        migrate(text + "packing: true\n", devices=8, match_tokens=True, mean_length=256.0)


def test_data_sets_by_name_and_share():
    """alignment-handbook has dataset_mixer, as open-instruct has, and TrainingArguments beside it."""
    text = (
        "model_name_or_path: org/m\ndataset_mixer:\n  org/a-b.c: 1.0\n  org/d: 1.0\n"
        "dataset_splits: [train_sft]\n"
        "use_flash_attention_2: true\nsave_strategy: epoch\nevaluation_strategy: epoch\nwarmup_ratio: 0.1\n"
    )
    done = migrate(text, devices=8)
    assert (
        done.option("data.path") == "data/a-b.c,data/d"
        and done.option("optimizer.grad_clip") == 1.0
    )
    assert any("TRL 0" in note for note in done.m.notes)
    assert migrate(text.replace("d: 1.0", "d: 0.5"), devices=8).refused() == {"dataset_mixer.org/d"}


def test_a_decay_of_so_many_steps_of_epochs():
    """Its share is known once the number of examples is: 2 epochs of 400 rows by 8 are 100 steps."""
    text = (
        "model_name_or_path: m\ndataset_name: d\nper_device_train_batch_size: 8\nnum_train_epochs: 2\n"
        "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 25}\n"
    )
    assert migrate(text, tools="trl", devices=1).refused() == {
        "lr_scheduler_kwargs.num_decay_steps"
    }
    assert (
        migrate(text, tools="trl", devices=1, rows=400).option("optimizer.decay_fraction") == 0.25
    )
