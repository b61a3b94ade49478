"""What every expert does on calibration text, in one pass over it, and the scores that are made of it.

With g_j a token's weight for expert j as it is applied (renormalised where the model does), f_j(x) the
expert's output before it, and X_j the tokens that chose j, padding left out:

    frequency           |X_j|
    weighted_frequency  sum over X_j of g_j
    ean_sum             sum of ||f_j(x)||                  (expert activation norm)
    ean_mean            its mean over X_j
    weighted_ean_sum    sum of g_j ||f_j(x)||
    reap                its mean over X_j                  (REAP, arXiv:2510.13999, equation 9)
    max_activation      largest |f_j(x)| of any token and element
    router_norm         norm of the router's row
    random              drawn

An expert that no token chose has 0 in all but the last two. REAP's own script takes softmax for every router
and its top-k without bias and groups; here the router is the model's.

`influence` of a layer is 1 - mean cos(input, output) over tokens (block influence, arXiv:2403.03853).

Shape letters: L rows of layers with experts, those of multi-token prediction last; E experts, B sequences, S
positions, K choices.
"""

import dataclasses
import functools
import hashlib
import json
import operator
import os
from typing import Any

import jax
import numpy as np

from deepseek_jax.compress.calibration import Calibration, on_mesh
from deepseek_jax.compress.source import Source
from deepseek_jax.config import paths
from deepseek_jax.config.options import ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf.compression_map import expert_rows
from deepseek_jax.inference.loaded import LoadedModel
from deepseek_jax.objectives.forward import run_model
from deepseek_jax.tensorfile import bounded_json, files
from deepseek_jax.tensorfile.arrays import TensorSpec
from deepseek_jax.tensorfile.bounded_json import BadFile

METHODS = (
    "reap",
    "frequency",
    "weighted_frequency",
    "ean_sum",
    "ean_mean",
    "weighted_ean_sum",
    "max_activation",
    "router_norm",
    "random",
)
NEED_NO_TEXT = ("router_norm", "random")
# float64 [L, E], added up over tokens (max_activation: the largest); mean_score is the router's scores,
# normalised, of all tokens, chosen or not.
SUMS = (
    "frequency",
    "weighted_frequency",
    "ean_sum",
    "weighted_ean_sum",
    "max_activation",
    "mean_score",
)
VERSION = 1
MOST_BYTES = 1 << 26
_TAPS = ("router_choices", "router_weights", "expert_norms", "expert_peaks", "layer_cosines")


@dataclasses.dataclass
class Scores:
    """What was found.

    Attributes:
      arrays: those of SUMS, and router_norm: float64 [L, E].
      influence: float64, of every layer but those of multi-token prediction.
      layers: the layer of each row; those of multi-token prediction are counted after the last.
      tokens: that were read.
      notes: `identity` of the model, `calibration`.
    """

    arrays: dict[str, np.ndarray]
    influence: np.ndarray
    layers: tuple[int, ...]
    tokens: int
    notes: dict[str, Any]

    def of(self, method: str, seed: int = 0) -> np.ndarray:
        """float64 [L, E]: the scores of a method; experts with the largest are kept."""
        counts_LE = np.maximum(self.arrays["frequency"], 1.0)
        if method == "reap":
            return self.arrays["weighted_ean_sum"] / counts_LE
        if method == "ean_mean":
            return self.arrays["ean_sum"] / counts_LE
        if method == "random":
            return np.random.default_rng(seed).random(self.arrays["frequency"].shape)
        return self.arrays[method]

    def unseen(self) -> np.ndarray:
        """bool [L, E]: experts that no token chose."""
        return self.arrays["frequency"] == 0

    def super_experts(self) -> np.ndarray:
        """bool [L, E]: experts of huge activations, that REAP's script can keep: above the 99.5th percentile
        of max_activation and a tenth of the largest, in the first three quarters of the layers, those of
        multi-token prediction not counted.
        """
        peak_LE = self.arrays["max_activation"]
        if not peak_LE.size:
            return np.zeros(peak_LE.shape, bool)
        main = sum(layer < len(self.influence) for layer in self.layers)
        early_L = np.arange(len(peak_LE)) < int(0.75 * main)
        high = max(np.quantile(peak_LE[:main], 0.995), peak_LE[:main].max() / 10)
        return (peak_LE > high) & early_L[:, None]

    def warning(self) -> str:
        """A line on experts that the text did not reach; "" if it reached all."""
        unseen_L = self.unseen().sum(axis=1)
        if not unseen_L.sum():
            return ""
        return (
            f"{int(unseen_L.sum())} of {self.unseen().size} experts, in {int((unseen_L > 0).sum())} of "
            f"{len(unseen_L)} layers, were chosen by no token: the calibration text is too short for them, "
            f"and they score 0. Give more of it (--text, --tokens)."
        )


def without_text(source: Source) -> Scores:
    """Scores of what needs no text: of the router's rows alone."""
    rows = expert_rows(source.model)
    zeros = np.zeros((len(rows), source.model.n_routed_experts))
    arrays = dict.fromkeys(SUMS, zeros) | {"router_norm": router_norms(source)}
    nothing = np.zeros(source.model.num_hidden_layers)
    return Scores(arrays, nothing, rows, 0, {"identity": source.identity(), "calibration": None})


def router_norms(source: Source) -> np.ndarray:
    """float64 [L, E]: the norm of each expert's row of the router."""
    rows = [source.layer(n, "mlp/gate/kernel") for n in expert_rows(source.model)]
    norms = [np.linalg.norm(kernel_DE.astype(np.float64), axis=0) for kernel_DE in rows]
    return np.stack(norms) if norms else np.zeros((0, source.model.n_routed_experts))


def collect(source: Source, model: LoadedModel, text: Calibration) -> Scores:
    """One pass over calibration text.

    Args:
      source: the model's files.
      model: the same on a mesh.
      text: what it reads.
    """
    rows, experts = expert_rows(model.config), model.config.n_routed_experts
    layers = model.config.num_hidden_layers
    arrays = {name: np.zeros((len(rows), experts)) for name in SUMS}
    cosines_L, tokens = np.zeros(layers), 0
    program = jax.jit(functools.partial(_run, model))
    for batch in text.progress("Scoring"):
        with jax.set_mesh(model.mesh):
            found = program(model.params, model.bias, on_mesh(model, batch))
        found = {name: np.asarray(a) for name, a in found.items()}
        valid_BS = batch["segment_ids"] > 0
        tokens += int(np.sum(valid_BS))
        cosines_L += np.sum(
            found["layer_cosines"][:layers], axis=(1, 2), where=valid_BS, dtype=float
        )
        for row in range(len(rows)):
            _add(arrays, row, found)
    arrays["mean_score"] /= max(tokens, 1)
    arrays["router_norm"] = router_norms(source)
    notes = {"identity": source.identity(), "calibration": text.notes()}
    return Scores(arrays, 1 - cosines_L / max(tokens, 1), rows, tokens, notes)


def _run(model: LoadedModel, params: Any, bias: Any, batch: dict[str, jax.Array]) -> Any:
    taps = _TAPS if model.config.has_experts else ("layer_cosines",)
    out = run_model(model.layout.merge_for_inference(params, bias), batch, taps)
    scores = {"score_sum": out.stats.score_sum} if out.stats is not None else {}
    # The same on every device, so that the host of each reads them without asking others.
    return {n: jax.sharding.reshard(a, jax.P()) for n, a in (out.taps | scores).items()}


def _add(arrays: dict[str, np.ndarray], row: int, found: dict[str, np.ndarray]) -> None:
    """Adds a batch to the sums of one layer, in float64 and in the order of the tokens."""
    experts = arrays["frequency"].shape[1]
    choice = found["router_choices"][row].reshape(-1)
    kept = choice < experts  # not of padding
    choice = choice[kept]
    weight, norm, peak = (
        found[name][row].reshape(-1)[kept].astype(np.float64)
        for name in ("router_weights", "expert_norms", "expert_peaks")
    )
    arrays["frequency"][row] += np.bincount(choice, minlength=experts)
    arrays["weighted_frequency"][row] += np.bincount(choice, weight, experts)
    arrays["ean_sum"][row] += np.bincount(choice, norm, experts)
    arrays["weighted_ean_sum"][row] += np.bincount(choice, weight * norm, experts)
    np.maximum.at(arrays["max_activation"][row], choice, peak)
    arrays["mean_score"][row] += found["score_sum"][row]


def sidecar(path: str) -> str:
    """scores.json of scores.safetensors."""
    return path.removesuffix(".safetensors") + ".json"


def write(path: str, scores: Scores) -> None:
    """Writes scores as FILE.safetensors, then FILE.json with its checksum.

    Raises:
      UserError: a file cannot be written.
    """
    stored = scores.arrays | {"influence": scores.influence}
    specs = {name: TensorSpec(a.shape, a.dtype) for name, a in stored.items()}
    folder, temporary = os.path.dirname(path) or ".", paths.temporary(path)
    try:
        division = {os.path.basename(temporary): specs}
        files.write(folder, division, lambda name: [stored[name]])
        value = {
            "version": VERSION,
            "sha256": _sha256(temporary),
            "layers": scores.layers,
            "tokens": scores.tokens,
            "notes": scores.notes,
        }
        for name, text in ((path, None), (sidecar(path), json.dumps(value, indent=1) + "\n")):
            if text is not None:
                temporary = paths.temporary(name)
                with open(temporary, "w", encoding="utf-8") as f:
                    f.write(text)
            files.fsync(temporary)
            os.replace(temporary, name)
    except OSError as e:
        raise UserError(f"OUT={path} cannot be written ({e.strerror}). Name another file.") from e
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read(path: str, source: Source) -> Scores:
    """Scores of a file that `write` made, of this model.

    Raises:
      UserError: it cannot be read, is damaged, or of another model.
    """
    try:
        value = bounded_json.read(sidecar(path), os.path.basename(sidecar(path)), MOST_BYTES)
        if value["version"] != VERSION or value["sha256"] != _sha256(path):
            raise BadFile(os.path.basename(path), "it is not the file that the .json is of")
        stored = files.find(os.path.dirname(path) or ".", [os.path.basename(path)])
        arrays = {name: _read(path, tensor) for name, tensor in stored.items()}
        influence = arrays.pop("influence")
        scores = Scores(
            {name: arrays[name] for name in (*SUMS, "router_norm")},
            influence,
            tuple(map(operator.index, value["layers"])),
            int(value["tokens"]),
            dict(value["notes"]),
        )
    except (BadFile, OSError, KeyError, TypeError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise UserError(
            f"--scores={path} cannot be read ({why}). Name a file of `python -m deepseek_jax.compress score`."
        ) from e
    shape = len(expert_rows(source.model)), _experts(source.model)
    same = scores.notes.get("identity") == source.identity()
    if not same or any(a.shape != shape for a in scores.arrays.values()):
        raise UserError(
            f"--scores={path} is of another model than MODEL={source.folder}. Score this one, or leave "
            f"--scores out and give --text."
        )
    return scores


def _experts(model: ModelConfig) -> int:
    return model.n_routed_experts


def _read(path: str, tensor: Any) -> np.ndarray:
    with open(path, "rb") as f:
        f.seek(tensor.offset)
        raw = f.read(tensor.spec.nbytes)
    return np.frombuffer(raw, tensor.spec.dtype).reshape(tensor.spec.shape).copy()


def _sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
