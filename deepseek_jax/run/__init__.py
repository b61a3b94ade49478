"""A run, from its options to its last checkpoint.

    from deepseek_jax import run
    result = run.train(config, "runs/first")     # what train.py does, from Python; raises errors.Failure

What enters is a Config and a folder; what leaves are checkpoints, metrics.jsonl and a `Result`.
Read job.py first, then start.py (where the state comes from) and loop.py.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_jax.run.call import train as train
    from deepseek_jax.run.job import Job as Job
    from deepseek_jax.run.loop import Result as Result

# Looked up when they are asked for: who reads a lock or a profile does not load the model.
_FACE = {
    "Job": "deepseek_jax.run.job",
    "Result": "deepseek_jax.run.loop",
    "train": "deepseek_jax.run.call",
}
__all__ = ["Job", "Result", "train"]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FACE[name]), name)
