"""Names of metrics on dashboards: ours (run/metrics.py), or those of Hugging Face's Trainer and TRL.

Theirs are of transformers 5.24 (integrations/integration_utils.py, `rewrite_logs`) and trl 1.16: TensorBoard,
W&B and Trackio have train/ and eval/ before a name, ClearML has them as titles of charts, MLflow has neither.
"""

from collections.abc import Mapping
from typing import Any

OWN, HF = "own", "hf"  # config.log.names
EVAL = "eval_"  # begins the names of held-out figures, ours and theirs
STEP = {OWN: "step", HF: "train/global_step"}  # the step, where it is a metric itself
_THEIRS = {
    "lr": "learning_rate",
    "tokens_seen": "num_input_tokens_seen",
    "token_accuracy": "mean_token_accuracy",  # of TRL's SFTTrainer
    "samples_per_sec": "train_samples_per_second",
    "tokens_per_sec": "train_tokens_per_second",
}


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """What of a row can be drawn: its numbers, without the step. Lists and texts are in metrics.jsonl."""
    return {n: v for n, v in row.items() if n != "step" and isinstance(v, (int, float))}


def logged(name: str, naming: str) -> str:
    """A metric as a Trainer logs it: "lr" is learning_rate, "eval_loss" is eval_loss."""
    if naming == OWN:
        return name
    prefix = EVAL if name.startswith(EVAL) else ""
    name = name.removeprefix(EVAL)
    return prefix + _THEIRS.get(name, name)


def tagged(name: str, naming: str) -> str:
    """The same where charts are grouped by what stands before a slash: train/learning_rate, eval/loss."""
    if naming == OWN:
        return name
    title, series = in_groups(name, naming)
    return f"{title}/{series}"


def in_groups(name: str, naming: str) -> tuple[str, str]:
    """(title of a chart, name of a line in it), for ClearML: ("train", "learning_rate"); with our names one
    chart has the line of training and that of held-out data: ("loss", "train"), ("loss", "eval").
    """
    part = "eval" if name.startswith(EVAL) else "train"
    if naming == OWN:
        return name.removeprefix(EVAL), part
    return part, logged(name, naming).removeprefix(EVAL)
