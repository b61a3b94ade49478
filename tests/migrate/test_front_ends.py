"""axolotl, LLaMA-Factory, ms-swift, open-instruct, AutoModel, gpt-neox: their own keys, and their silence."""

import pytest

from tests.support.migration import migrate

AXOLOTL = """
base_model: org/model
datasets: [{path: org/chats, type: chat_template}]
sequence_len: 1024
micro_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 2e-5
num_epochs: 2
"""


def test_axolotl_silent():
    c = migrate(AXOLOTL, devices=8).config
    assert (c.train.batch_size, c.train.accumulation, c.train.epochs) == (64, 4, 2.0)
    assert (c.optimizer.schedule, c.optimizer.final_fraction) == ("cosine", 0.0)
    assert c.optimizer.warmup_fraction == 0.03
    assert (c.sft.packing, c.sft.truncation, c.sft.format) == ("none", "drop", "messages")
    assert (c.checkpoint.every_epochs, c.checkpoint.keep) == (1.0, 4)
    assert c.data.eval_fraction == 0
    assert c.sharding.strategy == "no_shard"
    assert c.init_from == "models/model"


def test_axolotl_warmup_has_100_steps_at_most():
    """_configure_warmup_and_logging: min(3%, 100)."""
    assert migrate(AXOLOTL + "max_steps: 1000\n", devices=8).option("optimizer.warmup_steps") == 30
    assert migrate(AXOLOTL + "max_steps: 9000\n", devices=8).option("optimizer.warmup_steps") == 100
    share = migrate(AXOLOTL + "max_steps: 1000\nwarmup_steps: 0.1\n", devices=8)
    assert share.option("optimizer.warmup_fraction") == 0.1


@pytest.mark.parametrize(
    ("more", "option", "value"),
    [
        ("saves_per_epoch: 4", "checkpoint.every_epochs", 0.25),
        ("saves_per_epoch: 1\nnum_epochs: 1", "checkpoint.every_epochs", 1.0),
        ("val_set_size: 0.1\nevals_per_epoch: 2", "eval.every_epochs", 0.5),
        ("sample_packing: true", "sft.packing", "bfd"),
        ("train_on_inputs: true", "sft.assistant_only_loss", "false"),
        ("gradient_checkpointing: offload", "offload.activations", "layer_input"),
        ("optimizer: lion_8bit", "optimizer.name", "lion"),
        ("cosine_min_lr_ratio: 0.1", "optimizer.final_fraction", 0.1),
    ],
)
def test_axolotl(more, option, value):
    text = AXOLOTL if "num_epochs" not in more else AXOLOTL.replace("num_epochs: 2\n", "")
    assert migrate(f"{text}{more}\n", devices=8).option(option) == value


def test_axolotl_fsdp_is_as_accelerate_reads_it():
    """axolotl hands fsdp_config over as Accelerate's variables, sharding_strategy not among them."""
    found = migrate(
        f"{AXOLOTL}fsdp: [full_shard]\n"
        "fsdp_config: {fsdp_offload_params: true, fsdp_sharding_strategy: NO_SHARD}\n",
        devices=8,
    )
    c = found.config
    assert c.sharding.strategy == "full_shard"
    assert c.offload.parameters
    assert c.offload.optimizer_state
    assert "does not read it" in found.why("fsdp_config.fsdp_sharding_strategy")


def test_axolotl_lora():
    more = (
        "adapter: qlora\nload_in_4bit: true\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
    )
    text = f"{AXOLOTL}{more}"
    c = migrate(text, devices=8).config
    assert (c.lora.r, c.lora.alpha, c.lora.base_dtype) == (8, 16.0, "nf4")
    assert c.lora.target_modules == "all-linear"
    without = migrate(f"{AXOLOTL}lora_r: 8\n", devices=8)
    assert without.config.lora.r == 0
    assert "no adapter" in without.why("lora_r")


@pytest.mark.parametrize(
    "key",
    ["rl: dpo", "reinit_weights: true", "fp8: true", "peft_use_dora: true", "val_set_size: 200"],
)
def test_axolotl_refuses(key):
    assert migrate(f"{AXOLOTL}{key}\n", devices=8).refused() == {key.partition(":")[0]}


FACTORY = """
model_name_or_path: org/model
stage: sft
template: qwen3
dataset: identity
cutoff_len: 1024
learning_rate: 1.0e-5
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
"""


def test_llama_factory_is_lora_and_recomputes_unless_told():
    found = migrate(FACTORY, devices=4)
    c = found.config
    assert (c.lora.r, c.lora.alpha, c.lora.dropout) == (8, 16.0, 0.0)
    assert c.train.remat == "full"
    assert any("finetuning_type is not given" in n for n in found.m.notes)
    full = migrate(
        FACTORY + "finetuning_type: full\ndisable_gradient_checkpointing: true\n", devices=4
    ).config
    assert (full.lora.r, full.train.remat) == (0, "none")
    assert (full.optimizer.schedule, full.optimizer.weight_decay, full.train.epochs) == (
        "linear",
        0.0,
        3.0,
    )


def test_llama_factory_by_megatron():
    """D = 8 / (TP 1 x PP 4): a step has 1 x 8 x 2 sequences."""
    more = "finetuning_type: full\npipeline_model_parallel_size: 4\nexpert_model_parallel_size: 2\n"
    text = FACTORY.replace("gradient_accumulation_steps: 2", "gradient_accumulation_steps: 8")
    c = migrate(text + more, devices=8).config
    assert (c.mesh.stage, c.mesh.expert, c.train.batch_size) == (4, 2, 16)
    assert (c.sharding.strategy, c.train.remat) == ("zero1", "none")


@pytest.mark.parametrize(
    ("key", "refused"),
    [
        ("stage: dpo", "stage"),
        ("finetuning_type: freeze", "finetuning_type"),
        ("use_galore: true", "use_galore"),
    ],
)
def test_llama_factory_refuses(key, refused):
    text = FACTORY.replace("stage: sft\n", "") if key.startswith("stage") else FACTORY
    assert refused in migrate(f"{text}{key}\n", devices=4).refused()


def test_llama_factory_v1_optimizer_has_a_rate_of_its_own():
    """create_muon_optimizer reads optim_config.lr (1e-3), and not learning_rate."""
    text = "model: org/model\ndist_config: {name: fsdp2}\ntrain_dataset: d.yaml\n"
    text += "learning_rate: 1.0e-5\nmax_steps: 5\n"
    muon = migrate(text + "optim_config: {name: muon}\n", devices=2)
    assert muon.option("optimizer.learning_rate") == 1e-3
    plain = migrate(text, devices=2)
    assert plain.option("optimizer.learning_rate") == 1e-5
    assert plain.option("optimizer.weight_decay") == 0.01  # torch's AdamW
    assert plain.option("optimizer.schedule") == "constant"


SWIFT = """
model: org/model
tuner_type: full
dataset: ['org/chats#500']
max_length: 1024
split_dataset_ratio: 0.0
"""


def test_swift_fills_16_sequences():
    """gradient_accumulation_steps is ceil(16 / (micro-batch x world)) where nobody sets it."""
    c = migrate(SWIFT, devices=4).config
    assert (c.train.batch_size, c.train.accumulation) == (16, 4)
    assert (c.optimizer.b2, c.optimizer.weight_decay, c.optimizer.learning_rate) == (
        0.95,
        0.1,
        1e-5,
    )
    assert (c.optimizer.schedule, c.train.remat, c.sft.truncation) == ("cosine", "full", "drop")
    lora = migrate(SWIFT.replace("full", "lora"), devices=4).config
    assert (lora.lora.r, lora.lora.alpha, lora.optimizer.learning_rate) == (8, 32.0, 1e-4)


def test_swift_names_deepspeeds_files_and_modelscopes_hub():
    found = migrate(SWIFT + "deepspeed: zero3_offload\n", devices=4)
    c = found.config
    assert c.sharding.strategy == "full_shard"
    assert c.offload.parameters
    assert c.offload.optimizer_state
    assert "modelscope download --model org/model" in found.launch
    assert "hf download org/model" in migrate(SWIFT + "use_hf: true\n", devices=4).launch


def test_swift_by_megatron():
    text = "model: org/model\ndataset: [org/chats]\nmax_length: 64\n"
    text += "micro_batch_size: 1\nlr: 1e-5\nmoe_aux_loss_coeff: 1e-3\n"
    c = migrate(text, devices=4).config
    assert (c.train.batch_size, c.train.accumulation) == (16, 4)  # global_batch_size is 16 there
    assert c.lora.r == 0  # megatron sft trains all weights unless told
    assert c.sharding.strategy == "zero1"
    assert (c.model.aux_loss_alpha, c.model.seq_aux) == (1e-3, False)


def test_open_instruct():
    text = "model_name_or_path: org/model\ndataset_mixer: {org/a-v3.1: 1.0, org/b: 1.0}\nmax_seq_length: 64\n"
    text += "checkpointing_steps: epoch\nfinal_lr_ratio: 0.1\n"
    c = migrate(text, devices=4).config
    assert c.data.path == "data/a-v3.1,data/b"
    assert (c.optimizer.grad_clip, c.optimizer.final_fraction, c.optimizer.warmup_fraction) == (
        0.0,
        0.1,
        0.03,
    )
    assert (c.checkpoint.every_epochs, c.train.batch_size, c.train.epochs) == (1.0, 32, 2.0)
    share = migrate(text.replace("org/b: 1.0", "org/b: 0.5"), devices=4)
    assert share.refused() == {"dataset_mixer.org/b"}


def test_automodel():
    text = """
recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler: {global_batch_size: 64, local_batch_size: 2, max_steps: 100, ckpt_every_steps: 50}
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained
  pretrained_model_name_or_path: org/model
distributed: {strategy: fsdp2, tp_size: 2, ep_size: 2}
dataset:
  _target_: nemo_automodel.components.datasets.llm.megatron_dataset.MegatronPretraining
  paths: /data/x
  seq_length: 64
optimizer: {_target_: torch.optim.AdamW, lr: 1.0e-4, weight_decay: 0.1}
"""
    c = migrate(text, devices=8).config
    assert (c.mesh.tensor, c.mesh.expert, c.train.accumulation) == (2, 2, 64 // (2 * 4))
    assert (c.optimizer.schedule, c.optimizer.b2) == ("constant", 0.999)
    decayed = migrate(text + "lr_scheduler: {lr_decay_style: cosine}\n", devices=8).config
    # LRSchedulerConfig.build: from 0.1 to 0.01 of the peak, a tenth of the steps to warm up
    assert decayed.optimizer.warmup_init_fraction == pytest.approx(0.1)
    assert decayed.optimizer.final_fraction == pytest.approx(0.01)
    assert decayed.optimizer.warmup_steps == 10


NEOX = """{
  "pipe_parallel_size": 1, "model_parallel_size": 2,
  "num_layers": 2, "hidden_size": 64, "intermediate_size": 384,
  "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32, "norm": "rmsnorm",
  "pos_emb": "rotary",
  "activation": "swiglu", "use_bias_in_attn_linear": false, "use_bias_in_mlp": false,
  "no_weight_tying": true,
  "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95]}}, "min_lr": 0.00006,
  "zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2,
  "precision": "bfloat16", "train_iters": 1000, "lr_decay_style": "cosine", "warmup": 0.1,
  "data_path": "/data/x", "split": "969,30,1"
}"""


def test_gpt_neox():
    c = migrate(NEOX, devices=8).config
    assert (c.mesh.tensor, c.train.batch_size, c.train.accumulation) == (2, 4 * 2 * 4, 2)
    assert (c.sharding.strategy, c.train.dtype) == ("zero1", "bfloat16")
    assert (c.optimizer.warmup_fraction, c.optimizer.final_fraction) == (0.1, pytest.approx(0.1))
    assert c.model.vocab_size == 50432  # GPT-2's 50,257, padded to a multiple of 128 x 2
    assert c.data.split == "969,30,1"
    assert c.model.intermediate_size == 128  # ParallelMLP: int(384 x 2 / 3) // 2, of a gated one
    dense = migrate(NEOX.replace('"seq_length"', '"moe_num_experts": 1, "seq_length"'), devices=8)
    assert not dense.config.model.has_experts
    linear = migrate(NEOX.replace("cosine", "linear"), devices=8)
    assert linear.refused() == {"min_lr"}
    plain = migrate(NEOX.replace('"use_bias_in_mlp": false,', ""), devices=8)
    assert plain.refused() == {"use_bias_in_mlp"}
