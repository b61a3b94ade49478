"""Fine-tuning of a Hugging Face checkpoint on examples: chats, prompts with completions, texts.

  python train.py --config=configs/post/sft.py --config.init_from=MODEL --config.data.path=chats.jsonl \\
    --workdir=runs/sft

The model and its tokenizer are those of init_from, a folder with config.json and safetensors. The examples
are JSONL or Parquet, with messages, prompt and completion, instruction and output, conversations, text, or
input_ids and labels (config.sft.format; docs/data.md). Before the first step the run says what is scored.

Hardware: by the model; a dense one of 0.1B trains on 2 CPU cores. Full fine-tuning holds 16 bytes per
  parameter over all devices, beside activations: config.mesh.fsdp=8 divides them over 8.
Source: the defaults of TRL's SFTTrainer (learning rate 2e-5, 3 epochs) and the recipe of open-r1's
  distillations (cosine to a tenth, packing). Adam's b2 and the weight decay are as of Hugging Face's Trainer.
Chosen here: 16 rows of 2,048 tokens per step, 5 steps of warmup, packing.
Experts: the router learns like any weight. Its selection bias stays as it came (bias_update_rate 0): a few
  hundred steps of a narrow task would bend the balance of a model that is balanced on everything. The balance
  loss has the weight that the checkpoint's config.json names (aux_loss_alpha).
"""

from ml_collections import ConfigDict

from deepseek_jax.config import base_config


def get_config(arg: str = "") -> ConfigDict:
    """The options.

    Args:
      arg: none is known.

    Raises:
      UserError: any arg.
    """
    c = base_config(arg)
    c.objective = "sft"

    # Experts
    c.moe.bias_update_rate = 0.0

    # Mesh and sharding
    c.mesh.fsdp = -1

    # Data
    c.data.path = "chats.jsonl"
    c.data.eval_fraction = 0.02

    # Training
    c.train.steps = 0
    c.train.epochs = 3.0
    c.train.batch_size = 16
    c.train.sequence_length = 2048
    c.train.mtp_loss_weight = 0.1
    c.train.mtp_loss_weight_final = 0.1

    # Optimizer
    c.optimizer.learning_rate = 2e-5
    c.optimizer.b2 = 0.999
    c.optimizer.weight_decay = 0.0
    c.optimizer.schedule = "cosine"
    c.optimizer.final_fraction = 0.1
    c.optimizer.warmup_steps = 5

    # Checkpoints and evaluation
    c.checkpoint.every_steps = 200
    c.eval.every_steps = 100
    c.eval.sample_prompt = ""
    c.log.every_steps = 1
    return c
