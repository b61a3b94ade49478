"""Distillation: a student learns from a teacher's probabilities, on texts or chats.

  python train.py --config=configs/post/distil.py --config.init_from=STUDENT \\
    --config.distill.teacher=TEACHER --config.data.path=chats.jsonl --workdir=runs/distil

Student and teacher are folders of Hugging Face checkpoints with the same tokenizer; the teacher may be the
workdir of a run, too. The student is what `python -m deepseek_jax.compress` made of the teacher, or any
smaller model. The data are documents or examples, by their first row (config.distill.data); of examples
only the tokens are scored that fine-tuning scores (configs/post/sft.py).

The loss is (1 - alpha) CE + alpha T^2 KL(teacher || student), each a mean over the scored tokens;
config.distill has the reverse KL and what is between (beta), schedules, and the K likeliest words in place
of all (top_k).

Hardware: by the models. Beside what training the student takes, all devices together hold the teacher's
  weights once, 2 bytes per parameter in bfloat16 or 1 in int8 (config.distill.teacher_dtype):
  config.mesh.fsdp=8 divides both over 8. A step costs the teacher's forward pass more.
  `python -m deepseek_jax.plan` says whether it fits.
Source: temperature 2 and alpha 0.5 are those of MoE_Factorize_Compress and of Tunix; the sequence length and
  the learning rate of the first, 5e-5, after a warmup of 100 steps. Adam's b2 and the weight decay are as of
  Hugging Face's Trainer.
Chosen here: 16 rows of 2,048 tokens per step, cosine to a tenth.
Experts: as in configs/post/sft.py, the router learns and its selection bias stays as it came.
make distil (half of the experts of configs/tiny.py pruned, 100 steps at its own learning rate, alpha from 0.9
  to 0), held-out loss, mean of 3 seeds: teacher 1.402, pruned 1.555, by cross-entropy 1.436, distilled 1.426,
  with the router too 1.425, each within 0.02. Distillation wins by at least 0.005.
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
    c.objective = "distill"

    # Loss
    c.distill.alpha = 0.5
    c.distill.temperature = 2.0

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
    c.optimizer.learning_rate = 5e-5
    c.optimizer.b2 = 0.999
    c.optimizer.weight_decay = 0.0
    c.optimizer.schedule = "cosine"
    c.optimizer.final_fraction = 0.1
    c.optimizer.warmup_steps = 100

    # Checkpoints and evaluation
    c.checkpoint.every_steps = 200
    c.eval.every_steps = 100
    c.eval.sample_prompt = ""
    c.log.every_steps = 1
    return c
