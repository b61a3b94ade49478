"""What of the data is held out, as options say it: `data.eval_fraction`, or `data.split` in Megatron's form.

Which documents these are is in data/sources.py.
"""

import math

from deepseek_jax.config.options import Config, DataConfig
from deepseek_jax.errors import UserError

OPTION = "config.data.split"


def shares(text: str) -> tuple[float, float, float]:
    """Shares of training, held-out and unread documents, adding up to 1: "969,30,1" -> (0.969, 0.03, 0.001).
    What is not written is 0.

    Raises:
      UserError: no list of one to three numbers of 0 or more, the first above 0.
    """
    try:
        given = [float(part) for part in text.split(",")]
    except ValueError:
        given = []
    if not 1 <= len(given) <= 3 or not all(0 <= n < math.inf for n in given) or not given[0]:
        raise UserError(
            f"{OPTION}={text!r} is no list of the shares of training, held-out and unread documents. Write "
            'it as "969,30,1".'
        )
    train, valid, test = (n / sum(given) for n in (*given, 0.0, 0.0)[:3])
    return train, valid, test


def is_any(data: DataConfig) -> bool:
    """Whether documents are held out, as far as options tell."""
    return bool(shares(data.split)[1] if data.split else data.eval_fraction)


def option(data: DataConfig) -> str:
    """The option that says what is held out, with its value, for messages."""
    if data.split:
        return f"{OPTION}={data.split}"
    return f"config.data.eval_fraction={data.eval_fraction}"


def check(config: Config) -> None:
    """Raises UserError: data.split is no list of shares, or of examples, or eval_fraction is set as well."""
    data = config.data
    if not data.split:
        return
    shares(data.split)
    if data.eval_fraction != DataConfig().eval_fraction:
        raise UserError(
            f"{OPTION}={data.split} and config.data.eval_fraction={data.eval_fraction} both say what is held "
            f"out. Leave one of them at its default, '' and {DataConfig().eval_fraction}."
        )
    if config.reads_examples:
        raise UserError(
            f"{OPTION}={data.split} divides documents, and config.objective={config.objective} reads "
            "examples. Set config.data.eval_fraction, and data.split=''."
        )
