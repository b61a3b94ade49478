"""Environment variables of other trainers' launch scripts, and what each does here.

docs/clusters.md has the same table for readers. The first pattern that fits counts.
"""

import fnmatch
from typing import NamedTuple


class Meaning(NamedTuple):
    """What a variable does here."""

    patterns: tuple[str, ...]  # of names, as a shell has them
    kept: bool  # it does here what it does there: files that are written have it
    text: str


MEANINGS = (
    Meaning(
        ("NCCL_ASYNC_ERROR_HANDLING", "NCCL_BLOCKING_WAIT", "NCCL_TIMEOUT", "TORCH_NCCL_*"),
        False,
        "PyTorch's, not NCCL's: here config.watchdog ends a step that hangs, and names the process",
    ),
    Meaning(
        ("NCCL_IB_CUDA_SUPPORT", "NCCL_LL_THRESHOLD"),
        False,
        "NCCL has not read it since 2.5",
    ),
    Meaning(("NCCL_*",), True, "NCCL's: XLA communicates by NCCL, so that it means the same"),
    Meaning(
        ("FI_*", "RDMAV_*", "UCX_*", "SHARP_*"),
        True,
        "the network's below NCCL: it means the same",
    ),
    Meaning(("CUDA_VISIBLE_DEVICES",), True, "which GPUs of a host are used, in this order"),
    Meaning(
        ("JAX_COORDINATOR_*", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
        False,
        "who the processes are; the file that is written, or the scheduler, says it anew",
    ),
    Meaning(("JAX_*", "XLA_*", "TF_CPP_*", "DEEPSEEK_JAX_*"), True, "JAX's, XLA's or ours"),
    Meaning(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
        False,
        "XLA has threads of its own for the CPU's work; NumPy has little to do",
    ),
    Meaning(
        ("HF_*", "WANDB_*", "MLFLOW_*", "CLEARML_*", "TRACKIO_*", "AWS_*", "GOOGLE_*"),
        True,
        "of a library that is used here too",
    ),
    Meaning(("LD_LIBRARY_PATH", "PATH", "PYTHON*"), True, "of the system or of Python"),
    Meaning(
        ("*_PROXY", "*_proxy", "TMPDIR", "LANG", "LC_*", "TZ"),
        True,
        "of the system",
    ),
    Meaning(
        tuple(
            "MASTER_ADDR MASTER_PORT RANK LOCAL_RANK GROUP_RANK NODE_RANK MAIN_PROCESS_*".split()
        ),
        False,
        "the processes find each other by the scheduler's variables, which these would override",
    ),
    Meaning(
        tuple(
            "WORLD_SIZE LOCAL_WORLD_SIZE NNODES NUM_NODES NPROC_PER_NODE GPUS_PER_NODE NUM_GPUS "
            "NUM_PROCESSES NGPU".split()
        ),
        False,
        "a count for the other launcher; --nodes and --gpus_per_node say it here",
    ),
    Meaning(
        ("PYTORCH_*", "TORCH_*", "TORCHINDUCTOR_*", "TORCHELASTIC_*", "GLOO_*"),
        False,
        "PyTorch's. The share of a GPU's memory is XLA_PYTHON_CLIENT_MEM_FRACTION",
    ),
    Meaning(
        ("CUDA_DEVICE_MAX_CONNECTIONS",),
        False,
        "for the order of Megatron's launches; XLA orders its own, and 1 can cost it overlap",
    ),
    Meaning(
        ("CUDA_LAUNCH_BLOCKING",),
        False,
        "for PyTorch's stack traces: an error names its step here without it, and 1 makes steps slow",
    ),
    Meaning(
        (
            "ACCELERATE_*",
            "FSDP_*",
            "DEEPSPEED_*",
            "DS_*",
            "MEGATRON_*",
            "NVTE_*",
            "NEMO_*",
            "TRANSFORMERS_*",
            "DATASETS_*",
            "BITSANDBYTES_*",
            "LOGLEVEL",
        ),
        False,
        "of the other trainer or a library of it; options of the config say this here",
    ),
    Meaning(("TOKENIZERS_PARALLELISM",), False, "tokens are made by threads, never after a fork"),
)


def meaning(name: str) -> Meaning | None:
    """What a variable does here; None if nothing is known of it."""
    return next(
        (m for m in MEANINGS if any(fnmatch.fnmatchcase(name, p) for p in m.patterns)), None
    )
