"""A run around its steps: checkpoints, logs, the watchdog, compiled programs and traces."""

from dataclasses import dataclass

from deepseek_jax.config.option import NAMES, Alias, option

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "clearml")  # of log.trackers


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written, in which form and where, and which ones stay."""

    every_steps: int = option(
        250,
        "Steps between checkpoints.",
        unit="steps",
        at_least=0,
        special={0: "only at the end"},
        on_resume="free",
        aliases={"nemo": "every_n_train_steps", "hf": "save_steps"},
    )
    every_minutes: float = option(
        0.0,
        "Also after this many minutes since the last one.",
        unit="minutes",
        at_least=0,
        special={0: "only by steps"},
        on_resume="free",
        aliases={"nemo": "train_time_interval"},
    )
    every_epochs: float = option(
        0.0,
        "Also at the first step after each so many passes over the training data.",
        unit="passes",
        at_least=0,
        special={0: "only by steps"},
        example=1.0,
        on_resume="free",
        aliases=[
            Alias(
                1.0,
                hf="save_strategy: epoch",
                also={"checkpoint.every_steps": 0},
                note="of axolotl's `saves_per_epoch` the inverse",
            )
        ],
    )
    keep: int = option(
        3,
        "Newest checkpoints kept.",
        unit="checkpoints",
        at_least=0,
        special={0: "all"},
        on_resume="free",
        aliases=[Alias(hf="save_total_limit", note="the newest; 0: all")],
    )
    keep_best: int = option(
        0,
        "Beside them those of lowest held-out loss, which is then measured at each checkpoint.",
        unit="checkpoints",
        at_least=0,
        special={0: "none"},
        on_resume="free",
        aliases=[
            Alias(nemo="save_top_k", note="of lowest held-out loss, beside the newest"),
            Alias(
                1,
                hf="load_best_model_at_end: true",
                note="keeps the best; nothing is loaded at the end",
            ),
        ],
    )
    keep_every: int = option(
        0,
        "And those of every Nth step.",
        unit="steps",
        at_least=0,
        special={0: "none"},
        on_resume="free",
    )
    kind: str = option(
        "sharded",
        "What is written.",
        choices={
            "sharded": "every process its shards, asynchronously",
            "full": "whole tensors in safetensors",
            "local": "on each process's disk",
        },
        on_resume="free",
        aliases=[
            Alias(
                "sharded",
                fsdp="SHARDED_STATE_DICT",
                hf="fsdp_state_dict_type: SHARDED_STATE_DICT",
                note="the default: each process saves its shards; restores on any other mesh",
            ),
            Alias(
                "full",
                fsdp="FULL_STATE_DICT",
                hf="fsdp_state_dict_type: FULL_STATE_DICT",
                note="whole tensors, written by process 0; also `python -m deepseek_jax.checkpoint "
                "export DIR`",
            ),
            Alias(
                "local",
                fsdp="LOCAL_STATE_DICT",
                hf="fsdp_state_dict_type: LOCAL_STATE_DICT",
                also={"checkpoint.local_dir": "/nvme/ckpt"},
                note="node-local checkpoints",
            ),
        ],
    )
    async_checkpointing: bool = option(
        True,
        "Train on while a checkpoint is written; False: wait, so that a kill costs one interval at most.",
        on_resume="free",
    )
    dir: str = option(
        "",
        "Folder of the checkpoints; empty: WORKDIR/checkpoints. gs:// and s3:// are taken as they are.",
        path=True,
    )
    take_over: bool = option(
        False, "Go on from the checkpoints in dir though the run of another workdir wrote them."
    )
    local_dir: str = option("", "Of kind local: a folder on each host's own disk.", path=True)


@dataclass(frozen=True)
class WatchdogConfig:
    """What ends a run that does not move any more, with exit code 4 or 6, so that a launcher can start it
    again.
    """

    heartbeat_timeout: float = option(
        60.0,
        "Several processes: time without a sign of life after which one is lost; a killed one is noticed "
        "at once.",
        unit="seconds",
        at_least=1,
        on_resume="free",
    )
    step_timeout: float = option(
        -1.0,
        "Time that a step may take (compiling and saving not counted) before it counts as hung.",
        unit="seconds",
        at_least=0,
        special={0: "any", -1: "20 medians, at least 600"},
        on_resume="free",
    )


@dataclass(frozen=True)
class LogConfig:
    """Rows of metrics.jsonl, and where else they go (docs/tracking.md)."""

    every_steps: int = option(
        10,
        "Steps between rows of metrics.",
        unit="steps",
        at_least=1,
        on_resume="free",
        aliases={
            "deepspeed": "steps_per_print",
            "nemo": "log_every_n_steps",
            "hf": "logging_steps",
        },
    )
    spike_deviations: float = option(
        10.0,
        "A loss so many robust deviations above the median of the last 100 is logged as a spike with its "
        "data.",
        at_least=0,
        special={0: "none"},
        on_resume="free",
    )
    trackers: str = option(
        "tensorboard",
        "Where rows go besides metrics.jsonl. All but tensorboard are extras of these names to install.",
        choices={"": "nowhere", NAMES: "one or more, separated by commas"},
        names=TRACKERS,
        on_resume="free",
        aliases=[
            Alias(
                hf=("report_to", "log_with"),
                note="names with commas; `all` is not taken: what happens to be installed decides nothing",
            ),
            Alias("", hf="report_to: none"),
            Alias(
                "wandb",
                hf="report_to: wandb",
                nemo="create_wandb_logger: true",
                deepspeed="wandb.enabled: true",
            ),
            Alias("mlflow", hf="report_to: mlflow", nemo="create_mlflow_logger: true"),
            Alias("trackio", hf="report_to: trackio"),
            Alias("clearml", hf="report_to: clearml", nemo="create_clearml_logger: true"),
            Alias(
                "tensorboard",
                hf="report_to: tensorboard",
                nemo=("create_tensorboard_logger: true", "--tensorboard-dir"),
                deepspeed="tensorboard.enabled: true",
                note="the default; in WORKDIR/tensorboard",
            ),
        ],
    )
    project: str = option(
        "",
        "Of W&B, Trackio and ClearML, and the experiment of MLflow; empty: what the tool's environment says "
        "(WANDB_PROJECT, ...), else deepseek_jax.",
        on_resume="free",
        aliases={
            "hf": ("project", "wandb_project", "mlflow_experiment_name"),
            "nemo": ("wandb_logger_kwargs.project", "--wandb-project"),
            "deepspeed": "wandb.project",
        },
    )
    run_name: str = option(
        "",
        "Of the run in these tools; empty: what the tool's environment says (WANDB_NAME, ...), else the "
        "workdir's name.",
        on_resume="free",
        aliases={
            "hf": ("run_name", "wandb_name"),
            "nemo": ("wandb_logger_kwargs.name", "--wandb-exp-name"),
            "deepspeed": "tensorboard.job_name",
        },
    )
    names: str = option(
        "own",
        "What metrics are called there; metrics.jsonl keeps its names.",
        choices={
            "own": "as in metrics.jsonl: loss, lr, eval_loss",
            "hf": "as on dashboards of Hugging Face's Trainer: train/loss, train/learning_rate, eval/loss",
        },
        on_resume="free",
    )
    peak_tflops: float = option(
        0.0,
        "Peak of a device in the compute dtype, for the utilisation metric.",
        unit="TFLOP/s per device",
        at_least=0,
        special={0: "known from the GPU's name"},
        on_resume="free",
    )


@dataclass(frozen=True)
class CompileConfig:
    """Where compiled programs are kept."""

    cache_dir: str = option(
        "",
        "Folder of compiled programs, for the next start; empty: $XDG_CACHE_HOME/deepseek_jax or "
        "~/.cache/deepseek_jax.",
        choices={"off": "no folder"},
        path=True,
        on_resume="free",
    )


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps."""

    start: int = option(
        0,
        "First step to trace into WORKDIR/profile, and then to print where its time went.",
        unit="steps",
        at_least=0,
        special={0: "no profile"},
        on_resume="free",
        aliases=[
            Alias(
                fsdp="torch.profiler",
                nemo="profile_step_start",
                note="a trace, and a table of where a step's time goes",
            )
        ],
    )
    steps: int = option(
        3, "How many steps to trace, from there on.", unit="steps", at_least=1, on_resume="free"
    )
