"""The program as a user runs it: its command line, a process, the losses it has logged."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from tests.support import ROOT
from tests.support.quick import older_loops

SMALL = [
    "--config.model.hidden_size=32",
    "--config.model.intermediate_size=64",
    "--config.model.moe_intermediate_size=16",
    "--config.model.num_hidden_layers=2",
    "--config.model.num_attention_heads=2",
    "--config.model.kv_lora_rank=16",
    "--config.model.num_nextn_predict_layers=1",
    "--config.train.batch_size=8",
    "--config.train.sequence_length=64",
    "--config.optimizer.warmup_steps=2",
    "--config.log.every_steps=1",
    "--config.eval.batches=2",
    "--config.eval.sample_tokens=8",
]
CONTRACT_KEYS = {
    "step",
    "loss",
    "lm_loss",
    "lr",
    "grad_norm",
    "tokens_per_sec",
    "step_time_s",
    "tokens_seen",
    "balance_loss",
    "max_violation",
    "dropped_tokens",
    "dispatch_rounds",
}


def command(workdir, corpus, *more: str) -> list[str]:
    return [
        "--config=configs/tiny.py",
        f"--workdir={workdir}",
        f"--config.data.path={corpus}",
        *SMALL,
        *more,
    ]


# By these all tests share compiled programs (conftest.py); tests of the product's cache do without.
SHARED_CACHE = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def with_own_cache(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without the folder in which all tests share programs."""
    return {name: value for name, value in environ.items() if name not in SHARED_CACHE}


def environment(args: Sequence[str] = (), devices: int = 2) -> dict[str, str]:
    """Of a process with these arguments: CPU devices, and a compiler in as much of a hurry as its dtypes
    allow (quick.py); configs/tiny.py is of float32."""
    float32 = not any("dtype=" in a for a in args)
    options = older_loops() if float32 else {}
    flags = [f"--{name}={value}".lower() for name, value in options.items()]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": " ".join([*flags, os.environ.get("XLA_FLAGS", "")]),
    }


def run(
    args: list[str],
    devices: int = 2,
    module: Sequence[str] = ("train.py",),
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *module, *args],
        cwd=ROOT,
        env=environment(args, devices),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def losses(workdir) -> dict[int, float]:
    out = {}
    with open(os.path.join(workdir, "metrics.jsonl")) as f:
        for line in f:
            row = json.loads(line)
            assert all(not isinstance(v, float) or math.isfinite(v) for v in row.values())
            if "loss" in row:
                assert CONTRACT_KEYS <= set(row), CONTRACT_KEYS - set(row)
                assert row["step"] not in out, "a step was logged twice"
                out[row["step"]] = row["loss"]
    return out


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
