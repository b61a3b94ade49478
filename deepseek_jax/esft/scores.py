"""How much a task uses every expert, by the model's own router, and the experts that it uses most.

Both scores are of ESFT (arXiv:2407.01906), equations 5 to 7, and those of a layer sum to 1:

    gate    an expert's share of the weights that tokens give to the experts they choose
    token   its share of the choices

DeepSeek's own script (generate_expert_config.py of the repository ESFT) divides by the sum over layers where
it should divide by that over experts: its scores of a layer do not sum to 1, and its `top_p` is not the
paper's. The same top_p chooses other experts here.

Shape letters: L layers with experts, those of multi-token prediction last; E experts, B sequences, S
positions, K choices.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from deepseek_jax.config.options import Config, DataConfig
from deepseek_jax.config.sections.sft import SftConfig
from deepseek_jax.data import fields
from deepseek_jax.data.documents import DataNotes
from deepseek_jax.data.fields import Rows
from deepseek_jax.data.open import objective_of, open_data
from deepseek_jax.data.packing import PackedRows
from deepseek_jax.data.sources import open_corpora, split
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.inference.loaded import LoadedModel
from deepseek_jax.objectives.forward import run_model
from deepseek_jax.parallel.mesh import BATCH_AXES
from deepseek_jax.train import expert_table

SCORES = ("gate", "token")
TAPS = ("router_choices", "router_weights")


@dataclasses.dataclass
class Usage:
    """What tokens chose, added up: float64 [L, E]."""

    weights_LE: np.ndarray
    choices_LE: np.ndarray
    tokens: int = 0

    def scores(self, name: str) -> np.ndarray:
        """float64 [L, E]: `gate` or `token`, 1 in sum over the experts of a layer."""
        sums_LE = self.weights_LE if name == "gate" else self.choices_LE
        return sums_LE / np.maximum(np.sum(sums_LE, axis=1, keepdims=True), 1e-300)


def usage(model: LoadedModel, batches: Iterable[Rows]) -> Usage:
    """What the tokens of packed sequences choose.

    Args:
      batches: fields [B, S] each, with the same B, which the mesh divides; next_tokens where the model
        predicts several tokens ahead.
    """
    layers = len(expert_table.expert_layers(model.config))
    experts = model.config.n_routed_experts
    out = Usage(np.zeros((layers, experts)), np.zeros((layers, experts)))

    def taps(params: Any, bias: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return run_model(model.layout.merge_for_inference(params, bias), batch, TAPS).taps

    program = jax.jit(taps)
    for rows in batches:
        out.tokens += int(np.sum(rows["segment_ids"] > 0))
        with jax.set_mesh(model.mesh):
            batch = {name: jax.device_put(a, jax.P(BATCH_AXES)) for name, a in rows.items()}
            found = program(model.params, model.bias, batch)
        choices, weights = (np.asarray(found[name]).reshape(layers, -1) for name in TAPS)
        for layer in range(layers):
            kept = choices[layer] < experts  # not of padding
            chosen, weight = choices[layer][kept], weights[layer][kept].astype(np.float64)
            out.weights_LE[layer] += np.bincount(chosen, weight, experts)
            out.choices_LE[layer] += np.bincount(chosen, minlength=experts)
    return out


def chosen(scores_E: np.ndarray, top_p: float) -> tuple[int, ...]:
    """Experts in falling score, of equal ones the first, until their sum reaches top_p."""
    order = np.argsort(-scores_E, kind="stable")
    sums = np.cumsum(scores_E[order])
    # Sums of float64 end a little below 1.
    count = int(np.searchsorted(sums, top_p - 1e-9)) + 1
    return tuple(int(e) for e in order[:count])


def packed(
    config: Config, tokenizer: Tokenizer, tokens: int, batch: int, option: str = "--data"
) -> Iterator[Rows]:
    """Batches of packed sequences of a task's data, drawn at random from all of them, as many as have so many
    tokens.

    Args:
      config: as `data_config`.
      tokens: at least; 0: all there are.
      batch: sequences of a batch; padding fills the last.
      option: what messages call the data.

    Raises:
      UserError: the data cannot be read, or are none.
    """
    length = config.train.sequence_length
    rows = (
        _examples(config, tokenizer)
        if config.objective == "sft"
        else _texts(config, tokenizer, option)
    )
    wanted = fields.TEXT if config.model.num_nextn_predict_layers else fields.INPUTS
    names = [name for name in wanted if name != "targets"]
    count = math.ceil(tokens / length) if tokens else None
    taken = itertools.islice(rows, count)
    while here := list(itertools.islice(taken, batch)):
        here += [fields.padding_row(fields.TEXT, length)] * (batch - len(here))
        yield {name: np.stack([row[name] for row in here]) for name in names}


def _texts(config: Config, tokenizer: Tokenizer, option: str) -> Iterator[Rows]:
    """The sequences of texts or token files in a random order, to the last token."""
    corpora = open_corpora(config, tokenizer, True, DataNotes())
    length = config.train.sequence_length
    rows = [PackedRows(split(c, 0.0)[0], length, config.seed, True, pad_last=True) for c in corpora]
    places = [(i, j) for i, of in enumerate(rows) for j in range(len(of))]
    if not places:
        raise UserError(f"{option}={config.data.path} has no text. Name a file that has.")
    for n in np.random.default_rng(config.seed).permutation(len(places)):
        source, row = places[n]
        yield rows[source].row(row)


def _examples(config: Config, tokenizer: Tokenizer) -> Iterator[Rows]:
    """The sequences of one epoch of examples, as fine-tuning packs them."""
    loader = open_data(config, tokenizer, progress=True)
    for i in range(loader.num_train_rows):
        yield {name: a[0] for name, a in loader.train_rows(i, 1).items()}


def data_config(
    model: LoadedModel,
    path: str,
    tokenizer: str,
    length: int,
    seed: int = 0,
    option: str = "--data",
) -> Config:
    """Options to read a task's data with; `option` is what messages call them."""
    config = model.full_config
    everything = SftConfig(assistant_only_loss="false", completion_only_loss="false")
    return dataclasses.replace(
        config,
        objective=objective_of(path, option),
        seed=seed,
        data=DataConfig(path=path, tokenizer=tokenizer, eval_fraction=0.0),
        sft=everything,  # whose tokens count does not depend on what is trained
        train=dataclasses.replace(config.train, sequence_length=length, batch_size=1),
    )
