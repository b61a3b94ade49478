"""Which layers of a teacher a student's are compared with, and which of its experts they stand for: by the
options, and by the map that compression wrote.
"""

import re
from typing import NamedTuple

import numpy as np

from deepseek_jax.config.options import Config, ModelConfig
from deepseek_jax.errors import UserError
from deepseek_jax.hf.compression_map import CompressionMap

NO_TEACHER = -1  # fills up the list of a merged expert's teachers


class Hidden(NamedTuple):
    """Which hidden states are compared, and how."""

    weight: float
    kind: str  # cosine | mse
    pairs: tuple[tuple[int, int], ...]  # (student's layer, teacher's layer), ascending in the first
    widths: tuple[int, int]  # of student and teacher

    @property
    def student_layers(self) -> tuple[int, ...]:
        return tuple(s for s, _ in self.pairs)

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        return tuple(sorted({t for _, t in self.pairs}))


class Router(NamedTuple):
    """Which routers are compared, and which experts of the teacher stand for which."""

    weight: float
    scoring: tuple[str, str]  # scoring_func of student and teacher
    layers: tuple[
        int, ...
    ]  # of each MoE layer of the student: the teacher's, counted from its first
    teachers_LEG: np.ndarray  # int32: experts of the teacher, NO_TEACHER after the last


def layer_pairs(
    config: Config, teacher: ModelConfig, found: CompressionMap | None
) -> tuple[tuple[int, int], ...]:
    """The pairs of layers whose hidden states are compared: those of config.distill.hidden_layers; else all
    of the student's, with those that compression kept or spread evenly, the last with the last.

    Raises:
      UserError: hidden_layers is not understood, or names a layer twice or one that is not there.
    """
    text = config.distill.hidden_layers
    ours, theirs = config.model.num_hidden_layers, teacher.num_hidden_layers
    if not text:
        if found is not None:
            return tuple(enumerate(found.layer_map))
        return tuple((i, max(round((i + 1) * theirs / ours) - 1, 0)) for i in range(ours))
    option = f"config.distill.hidden_layers={text}"
    pairs = []
    for part in text.split(","):
        m = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", part)
        if not m:
            raise UserError(
                f"{option}: {part.strip()!r} is no pair of layers. Write STUDENT:TEACHER, counted from 0, as "
                f"in 2:4,5:11."
            )
        pair = int(m[1]), int(m[2])
        for layer, layers, who in zip(pair, (ours, theirs), ("student", "teacher"), strict=True):
            if layer >= layers:
                raise UserError(
                    f"{option}: the {who} has {layers} layers, 0 to {layers - 1}, and no layer {layer}. Name "
                    f"layers that are there."
                )
        pairs.append(pair)
    students = [s for s, _ in pairs]
    if twice := [s for s in students if students.count(s) > 1]:
        raise UserError(
            f"{option}: layer {twice[0]} of the student stands in two pairs. Leave one."
        )
    return tuple(sorted(pairs))


def router_of(config: Config, teacher: ModelConfig, found: CompressionMap | None) -> Router:
    m, weight = config.model, config.distill.router_weight
    option = f"config.distill.router_weight={weight:g}"
    for model, who in ((m, "the model that is trained"), (teacher, "the teacher")):
        if not model.has_experts:
            raise UserError(f"{option}: {who} has no experts, and so no router. Set it to 0.")
    dense, of_teacher = m.first_k_dense_replace, teacher.first_k_dense_replace
    if found is None:
        for name in ("n_routed_experts", "num_hidden_layers", "first_k_dense_replace"):
            ours, theirs = getattr(m, name), getattr(teacher, name)
            if ours != theirs:
                raise UserError(
                    f"{option}: {name} is {ours}, and {theirs} of the teacher, and nothing says which of its "
                    f"experts are which. Set config.distill.map to the compression.json that made this model."
                )
        layers = tuple(range(m.num_hidden_layers - dense))
        experts = [[[e] for e in range(m.n_routed_experts)] for _ in layers]
    else:
        chosen = found.layer_map[dense:]
        for student, layer in enumerate(chosen, dense):
            if layer < of_teacher:
                raise UserError(
                    f"{option}: layer {student} stands for layer {layer} of the teacher, which has no "
                    f"experts. Set it to 0."
                )
        layers = tuple(layer - of_teacher for layer in chosen)
        experts = [[list(e) for e in layer] for layer in found.expert_map[: len(layers)]]
    most = max(len(e) for layer in experts for e in layer)
    full = [[[*e, *[NO_TEACHER] * (most - len(e))] for e in layer] for layer in experts]
    scoring = m.scoring_func, teacher.scoring_func
    return Router(weight, scoring, layers, np.asarray(full, np.int32))


def check_map(config: Config, teacher: ModelConfig, found: CompressionMap) -> None:
    """Raises UserError: the map is not of this student and this teacher."""
    m, where = config.model, f"config.distill.map={config.distill.map or config.init_from}"
    other = "Name the compression.json of this model, and the teacher that it was made from."
    for layers, has, who in (
        (found.num_hidden_layers, teacher.num_hidden_layers, "the teacher"),
        (len(found.layer_map), m.num_hidden_layers, "this model"),
    ):
        if layers != has:
            raise UserError(f"{where} is of {layers} layers, and {who} has {has}. {other}")
    if outside := [
        layer for layer in found.layer_map if not 0 <= layer < teacher.num_hidden_layers
    ]:
        raise UserError(
            f"{where} names layer {outside[0]}, and the teacher has {teacher.num_hidden_layers}. {other}"
        )
    if not config.distill.router_weight or not (m.has_experts and teacher.has_experts):
        return
    moe_layers = m.num_hidden_layers - m.first_k_dense_replace
    if found.num_experts != teacher.n_routed_experts:
        raise UserError(
            f"{where} is of {found.num_experts} experts, and the teacher has {teacher.n_routed_experts}. "
            f"{other}"
        )
    if len(found.expert_map) not in (moe_layers, moe_layers + m.num_nextn_predict_layers):
        raise UserError(
            f"{where} has experts of {len(found.expert_map)} layers, and this model has {moe_layers} with "
            f"experts. {other}"
        )
    # Rows of multi-token prediction come after those of the main layers.
    rows = found.expert_map[:moe_layers]
    for layer, experts in enumerate(rows, m.first_k_dense_replace):
        if len(experts) != m.n_routed_experts:
            raise UserError(
                f"{where} has {len(experts)} experts in layer {layer}, and this model has "
                f"{m.n_routed_experts}. {other}"
            )
        named = [e for of_one in experts for e in of_one]
        bad = [e for e in named if not 0 <= e < found.num_experts or named.count(e) > 1]
        if bad or not all(experts):
            said = (
                f"expert {bad[0]} twice, or is not there" if bad else "an expert without a teacher"
            )
            raise UserError(
                f"{where}: layer {layer} has {said}. Each expert stands for other experts of the teacher: "
                f"make the file again with python -m deepseek_jax.compress."
            )
