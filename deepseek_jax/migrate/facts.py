"""What tools say about a run, in words that none of them owns: the facts that `arithmetic/` makes options of.

A handler tells a fact where our option follows from several keys, perhaps of several files; where one key is
one option of ours, it tells the option itself.
"""

from collections.abc import Mapping
from types import MappingProxyType

FACTS: Mapping[str, str] = MappingProxyType(
    {
        # ---- devices
        "world": "GPUs in all, over all hosts",
        "nodes": "hosts",
        "gpus_per_node": "GPUs of one host",
        "tensor": "tensor parallel size",
        "stage": "pipeline parallel size",
        "expert": "expert parallel size; divides the data parallel size",
        "context": "context or sequence parallel size",
        "replicas": "data parallel replicas of hybrid sharding (dp_replicate)",
        "shards": "devices that one replica's state is divided over (dp_shard)",
        "strategy": "full_shard, shard_grad_op, zero1, hybrid_shard, no_shard",
        # ---- batch
        "per_device_batch": "sequences of one device (data parallel rank) in one micro-batch",
        "accumulation": "micro-batches of a step",
        "global_batch": "sequences of a step, over all devices",
        "sequence_length": "tokens of a sequence",
        "unpacked": "True: one example a row, padded",
        # ---- length of the run
        "steps": "optimizer steps; 0 or less: not said",
        "epochs": "passes over the data; steps win",
        "epoch_interval": "epochs between checkpoints, where save_when is epoch; 1 unless told",
        "samples": "sequences in all, in place of steps",
        # ---- learning rate: see arithmetic/schedule.py
        "learning_rate": "its peak",
        "schedule": "constant, constant_with_warmup, linear, cosine, polynomial, inverse_sqrt, "
        "cosine_with_restarts, wsd",
        "warmup_steps": "steps of the warmup; below 1: a share of the steps; 0: warmup_fraction counts",
        "warmup_fraction": "the same as a share of schedule_steps, or of all steps",
        "warmup_samples": "the same in sequences",
        "warmup_shape": "linear, log",
        "warmup_init": "learning rate at the first step",
        "min_lr": "learning rate at the end",
        "min_lr_fraction": "the same / peak",
        "schedule_steps": "steps until the end of the decay, from the first step on",
        "schedule_samples": "the same in sequences",
        "hold_steps": "last steps at the minimum",
        "decay_steps": "wsd: steps of the decay",
        "decay_samples": "the same in sequences",
        "decay_shape": "wsd: linear, cosine, sqrt, exponential",
        "stable_steps": "wsd: steps at the peak",
        "power": "polynomial: exponent",
        "cycles": "cosine: half waves x 2 (0.5: one fall); cosine_with_restarts: restarts",
        "timescale": "inverse_sqrt: steps at whose end the rate is peak / sqrt(2), about",
        # ---- checkpoints, evaluation, log: counted in steps; below 1: a share of all steps
        "save_when": "steps, epoch, no",
        "save_every": "steps between checkpoints",
        "eval_when": "steps, epoch, no",
        "eval_every": "steps between evaluations",
        "log_every": "steps between rows of the log",
        # ---- model
        "hf_aux_coef": "router_aux_loss_coef of transformers: of the pooled counts of all layers",
        "experts_per_token": "of a model that the files describe, for hf_aux_coef",
        # ---- launch
        "workdir": "folder that the run writes to",
    }
)
# Of these 0 and less are mistakes.
COUNTS = frozenset(
    "world nodes gpus_per_node tensor stage expert context replicas shards per_device_batch accumulation "
    "global_batch sequence_length".split()
)
