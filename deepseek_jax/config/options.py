"""Every option once: `Config`, which all the code reads, and the table of what is known about each option.

`Config` and its sections are frozen dataclasses (sections/). configdict.py makes of them the
`ml_collections.ConfigDict` that `configs/*.py` and flags change, and reads it back; validation.py checks
values and what they mean together. Of an option, `of("train.steps")` says its help, unit, limits, choices and
names in other tools.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from deepseek_jax.config.option import Alias, Option, option, options_of, section
from deepseek_jax.config.sections.data import DataConfig, EvalConfig
from deepseek_jax.config.sections.distill import DistillConfig
from deepseek_jax.config.sections.esft import EsftConfig
from deepseek_jax.config.sections.lora import LoraConfig
from deepseek_jax.config.sections.model import ModelConfig
from deepseek_jax.config.sections.moe import MoeConfig
from deepseek_jax.config.sections.optimizer import OptimizerConfig
from deepseek_jax.config.sections.parallel import (
    SECOND_WORDS,
    MeshConfig,
    OffloadConfig,
    ShardingConfig,
)
from deepseek_jax.config.sections.rope import RopeScaling
from deepseek_jax.config.sections.running import (
    CheckpointConfig,
    CompileConfig,
    LogConfig,
    ProfileConfig,
    WatchdogConfig,
)
from deepseek_jax.config.sections.sft import SftConfig
from deepseek_jax.config.sections.training import REMAT_NAMES, Fp16Config, TrainConfig

__all__ = [
    "CHECKPOINT_KINDS",
    "DTYPES",
    "GRADIENT_COMPRESSIONS",
    "IGNORE",
    "OPTIONS",
    "REMAT_NAMES",
    "STRATEGIES",
    "STRATEGY_ALIASES",
    "CheckpointConfig",
    "CompileConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "EsftConfig",
    "EvalConfig",
    "Fp16Config",
    "LogConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "MoeConfig",
    "OffloadConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "RopeScaling",
    "SftConfig",
    "ShardingConfig",
    "TrainConfig",
    "WatchdogConfig",
    "changes_shapes",
    "of",
    "replaced",
    "value_of",
]

IGNORE = -100  # target id of a position that predicts nothing, as in Hugging Face


@dataclass(frozen=True)
class Config:
    """All options of a run."""

    seed: int = option(
        0,
        "Seed of the weights and of the data order.",
        at_least=0,
        at_most=2**32 - 1,
        on_resume="new pass",
        aliases={"hf": "seed", "nemo": "seed"},
    )
    objective: str = option(
        "pretrain",
        "What is learnt.",
        choices={
            "pretrain": "the next token of documents",
            "sft": "the answers of examples (config.sft)",
            "distill": "a teacher's probabilities, on text or examples (config.distill)",
        },
        on_resume="refused",
        aliases=[
            Alias("sft", hf="SFTTrainer", nemo="finetune"),
            Alias("distill", hf="GKDTrainer", nemo="distill"),
        ],
    )
    init_from: str = option(
        "",
        "Folder of a Hugging Face checkpoint to begin with; its config.json sets config.model; empty: "
        "random weights.",
        path=True,
        aliases={
            "hf": ("model_name_or_path", "AutoModelForCausalLM.from_pretrained(DIR)"),
            "mfc": "student.model_path",
        },
    )
    model: ModelConfig = section(ModelConfig)
    mesh: MeshConfig = section(MeshConfig)
    sharding: ShardingConfig = section(ShardingConfig)
    moe: MoeConfig = section(MoeConfig)
    data: DataConfig = section(DataConfig)
    train: TrainConfig = section(TrainConfig)
    fp16: Fp16Config = section(Fp16Config)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    sft: SftConfig = section(SftConfig)
    distill: DistillConfig = section(DistillConfig)
    esft: EsftConfig = section(EsftConfig)
    lora: LoraConfig = section(LoraConfig)
    offload: OffloadConfig = section(OffloadConfig)
    eval: EvalConfig = section(EvalConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    log: LogConfig = section(LogConfig)
    watchdog: WatchdogConfig = section(WatchdogConfig)
    compile: CompileConfig = section(CompileConfig)
    profile: ProfileConfig = section(ProfileConfig)

    def to_json(self) -> dict[str, Any]:
        """Nested dicts of plain values: `from_config_dict` reads them back."""
        return dataclasses.asdict(self)

    @property
    def micro_batch(self) -> int:
        """Sequences in one forward and backward pass, over the whole mesh."""
        return self.train.batch_size // self.train.accumulation

    @property
    def reads_examples(self) -> bool:
        """Whether the data are examples, of which some tokens are scored, and not documents. Of
        distill.data=auto, which is settled before a run begins (run/init_from.py), nothing is known.
        """
        return self.objective == "sft" or (
            self.objective == "distill" and self.distill.data == "examples"
        )

    @property
    def pipelined_blocks(self) -> int:
        """Layers that mesh.stage divides: the MoE layers, or the dense ones where there are no others.

        Dense layers in front of MoE layers belong to the entrance, with the embedding: stages share them by
        micro-batches.
        """
        m = self.model
        return m.num_hidden_layers - m.first_k_dense_replace or m.num_hidden_layers


OPTIONS: Mapping[str, Option] = MappingProxyType({o.name: o for o in options_of(Config)})


def of(name: str) -> Option:
    """What is known about an option, by its name: "train.steps"."""
    return OPTIONS[name]


def changes_shapes(name: str) -> bool:
    """Whether another value of an option, or of any option of a section, makes arrays of another shape: a run
    cannot go on with it.
    """
    return any(o.changes_shapes for o in OPTIONS.values() if f"{o.name}.".startswith(f"{name}."))


STRATEGIES = tuple(of("sharding.strategy").choices)
STRATEGY_ALIASES = SECOND_WORDS
GRADIENT_COMPRESSIONS = tuple(of("sharding.gradient_compression").choices)
DTYPES = tuple(of("train.dtype").choices)  # of weights and computation
CHECKPOINT_KINDS = tuple(of("checkpoint.kind").choices)


def value_of(config: Config, name: str) -> Any:
    """The value of an option, by its name: "train.steps"."""
    out: Any = config
    for key in name.split("."):
        out = getattr(out, key)
    return out


def replaced(config: Config, name: str, value: Any) -> Config:
    """The options with another value of one: "train.steps"."""
    section_, _, key = name.rpartition(".")
    part = dataclasses.replace(value_of(config, section_) if section_ else config, **{key: value})
    return replaced(config, section_, part) if section_ else part
