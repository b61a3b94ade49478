"""Which devices take part in a collective, and along which mesh axes they lie."""

import math
import re
from collections.abc import Mapping

import numpy as np

from deepseek_jax.xla import hlo


def groups(
    instruction: hlo.Instruction, mesh_shape: Mapping[str, int]
) -> tuple[int, tuple[str, ...]]:
    """(size, mesh axes) of the group of a collective with replica groups."""
    devices = math.prod(mesh_shape.values())
    found = replica_groups(instruction.attributes, devices)
    return found.shape[1], _spanned(found, mesh_shape)


def pairs(
    instruction: hlo.Instruction, mesh_shape: Mapping[str, int]
) -> tuple[int, tuple[str, ...]]:
    """(most devices reached from one along the axes, mesh axes) of a permutation; (1, ()) if every
    device sends to itself."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
    numbers = [int(n) for n in re.findall(r"\d+", found[1] if found else "")]
    sent = np.array(numbers, int).reshape(-1, 2)
    moving = sent[sent[:, 0] != sent[:, 1]]
    if not len(moving):
        return 1, ()
    axes = _moving_axes(moving, mesh_shape)
    return math.prod(mesh_shape[a] for a in axes), axes


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """[groups, size] of device numbers, from any of XLA's spellings.

    {{0,1},{2,3}}   [2,2]<=[4]   [2,2]<=[2,2]T(1,0)   mesh['a'=2,'b'=2] {'a'}   mesh['a'=4] {'a':(1)2}
    mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}
    An empty list is one group of all.

    Raises:
      ValueError: another spelling.
    """
    found = re.search(
        r"replica_groups=(mesh\[[^\]]*\](?:, device_ids=\(.*?\))? \{[^}]*\}|\{\}|\{\{[^=]*?\}\}|"
        r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)",
        attributes,
    )
    if not found:
        raise ValueError(f"these replica groups are not understood: {attributes[:200]!r}")
    text = found[1]
    if text.startswith("{{"):
        return np.array([[int(d) for d in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", text)])
    if text.startswith("["):
        return _iota(text)
    if text == "{}":
        return np.arange(devices).reshape(1, -1)
    return _mesh_groups(text)


def _iota(text: str) -> np.ndarray:
    """'[4,2]<=[2,4]T(1,0)': the numbers from 0, reshaped, transposed, reshaped."""
    found = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found is not None, text
    shape, base, order = found.groups()

    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    ids = np.arange(math.prod(numbers(base))).reshape(numbers(base))
    return (ids.transpose(numbers(order)) if order else ids).reshape(numbers(shape))


def _mesh_groups(text: str) -> np.ndarray:
    """The groups along axes, or factors of axes, of XLA's own mesh: "'a':(2)4" is the factor of 4
    inside the outer 2 of a."""
    axes = {name: int(n) for name, n in re.findall(r"'?(\w+)'?=(\d+)", text[: text.index("]")])}
    grouped = re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?(?:,|$)", text[text.rindex("{") + 1 : -1])
    ids = np.arange(math.prod(axes.values()))
    if given := re.search(r"device_ids=\((.*)\) \{", text):
        base = re.fullmatch(r"\[([\d,]+)\]T(\([\d,]+\))", given[1])
        ids = (
            _iota(f"[{len(ids)}]<=[{base[1]}]T{base[2]}")
            if base
            else np.array([int(n) for n in re.findall(r"\d+", given[1])])
        )
    # Split every axis that is grouped in part into (outer, grouped, inner), then bring what is grouped last.
    shape: list[int] = []
    last: dict[tuple[str, str], int] = {}
    for name, size in axes.items():
        parts = sorted((int(pre), int(n), pre) for a, pre, n in grouped if a == name and pre)
        if (name, "", "") in grouped:
            last[name, ""] = len(shape)
        done = 1
        for pre, n, key in parts:
            shape.append(pre // done)
            last[name, key] = len(shape)
            shape.append(n)
            done = pre * n
        shape.append(size // done)
    order = [last[name, pre] for name, pre, _ in grouped]
    rest = [i for i in range(len(shape)) if i not in order]
    return (
        ids.reshape(shape).transpose(*rest, *order).reshape(-1, math.prod(shape[i] for i in order))
    )


def _spanned(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ; "?" at the end if they are not all
    devices along those axes."""
    if groups.shape[1] == 1:
        return ()
    pairs = np.stack([np.repeat(groups[:, :1], groups.shape[1] - 1, 1), groups[:, 1:]], -1).reshape(
        -1, 2
    )
    axes = _moving_axes(pairs, mesh_shape)
    return axes if math.prod(mesh_shape[a] for a in axes) == groups.shape[1] else (*axes, "?")


def _moving_axes(pairs: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    places = np.stack(np.unravel_index(pairs, tuple(mesh_shape.values())))
    return tuple(
        axis for axis, p in zip(mesh_shape, places, strict=True) if (p[:, 0] != p[:, 1]).any()
    )
