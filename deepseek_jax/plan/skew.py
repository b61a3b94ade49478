"""How many rounds the dispatch takes when experts are loaded unevenly.

A round has places for capacity_factor times the mean load of an expert (experts/rounds.py), so a layer
takes ceil(largest load / places) of them. How uneven the load is depends on the text and on the router,
which a plan cannot know: --skew states it.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.plan import exchange

DRAWS = 32


class Rounds(NamedTuple):
    """Attributes:
    skew: as given.
    violation: largest load of an expert / mean load - 1, metrics.jsonl's max_violation.
    rounds: of every MoE layer; 1 for a model without experts.
    said: what was assumed.
    """

    skew: str
    violation: float
    rounds: int
    said: str


def rounds_at(skew: str, config: Config, mesh_shape: dict[str, int]) -> Rounds:
    """Rounds of a config at a stated skew.

    Args:
      skew: "zipf", or a max_violation.

    Raises:
      UserError: neither.
    """
    m = config.model
    buffers = exchange.buffers(config, mesh_shape)
    if skew == "zipf":
        if buffers is None:
            return Rounds(skew, 0.0, 1, "the model has no routed experts")
        violation = zipf_violation(m.vocab_size, m.n_routed_experts, m.num_experts_per_tok)
        said = (
            "tokens fall like 1/rank and each of the vocabulary goes to experts of its own, drawn at random "
            f"(mean of {DRAWS} draws): a first layer without balance. Every layer is counted as it"
        )
    else:
        violation = _number(skew)
        said = "the same in every layer and on every device"
    if buffers is None:
        return Rounds(skew, violation, 1, "the model has no routed experts")
    if not buffers.places:
        return Rounds(
            skew, violation, 1, f"{said}; experts are computed as they are loaded, without rounds"
        )
    # Tokens of a device, or with all_gather of the expert axis, that share an expert's places.
    mean = buffers.mean_load
    rounds = max(1, math.ceil(round((1 + violation) * mean / buffers.places, 9)))
    return Rounds(skew, violation, rounds, said)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise UserError(
            f"--skew={text} is no skew. Set it to zipf, or to a max_violation as metrics.jsonl has it "
            "(largest load / mean load - 1), for instance --skew=0.9."
        )
    return value


@functools.cache
def zipf_violation(vocabulary: int, experts: int, top_k: int) -> float:
    """Largest load / mean load - 1, of tokens that fall by Zipf's law, where each word has its own experts.

    The mean over draws of the experts; NumPy's generator with a fixed seed, so that it is the same always.
    """
    share = 1 / np.arange(1, vocabulary + 1)
    share /= share.sum()
    rng = np.random.default_rng(0)
    # The many rare words even out: only the most frequent are drawn one by one.
    common = min(vocabulary, 4096)
    largest = []
    for _ in range(DRAWS):
        chosen = rng.random((common, experts)).argpartition(top_k - 1, axis=1)[:, :top_k]
        load = np.zeros(experts)
        np.add.at(load, chosen, share[:common, None])
        load += share[common:].sum() * top_k / experts
        largest.append(load.max() * experts / top_k)
    return float(np.mean(largest)) - 1
