"""Sums of a few numbers as chats, made and marked by the package reasoning-gym: its task chain_sum.

What is learnt is to write the intermediate sums, a line each, and the answer between the tags of
reasoning-gym, as the system message asks. No problem of the held-out ones is among those to learn from.
"""

import importlib.util
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from deepseek_jax.errors import UserError

PACKAGE = "reasoning_gym"
SYSTEM = "Show your work step by step. Give the final answer between <answer> and </answer> tags."
# 2 or 3 numbers of up to two digits.
SHAPE = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
HELD_OUT_SEED = 1_000_000  # entry i of a seed is entry 0 of seed + i: seeds must be far apart
MOST = HELD_OUT_SEED  # entries of a seed that are none of another's


class Problem(NamedTuple):
    """An entry of reasoning-gym: its question, its answer, and what it was made of."""

    question: str
    answer: str
    expression: str

    def entry(self) -> dict[str, Any]:
        """As its score_answer takes it."""
        return {"question": self.question, "answer": self.answer, "metadata": {}}

    def asked(self) -> list[dict[str, str]]:
        """The messages before the answer."""
        return [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": self.question},
        ]


class Task:
    """chain_sum: its problems and its marks.

    Raises:
      UserError: reasoning-gym is not installed.
    """

    def __init__(self) -> None:
        chain_sum, utils = _modules()
        self._extract_answer = utils.extract_answer
        self._chain_sum = chain_sum
        self._score = self._dataset(0, 1).score_answer

    def held_out(self, count: int) -> list[Problem]:
        """Problems to measure with, each another."""
        return self._distinct(HELD_OUT_SEED, count, set())

    def to_learn(self, count: int, seed: int, held_out: list[Problem]) -> list[Problem]:
        """Problems to learn from, each another and none of the held-out ones."""
        return self._distinct(seed, count, {p.question for p in held_out})

    def score(self, text: str, problem: Problem) -> float:
        """reasoning-gym's mark for a whole answer, from 0 to 1: of what is between the tags."""
        return self._score(self._extract_answer(text), problem.entry())

    def _dataset(self, seed: int, size: int) -> Any:
        config = self._chain_sum.ChainSumConfig(seed=seed, size=size, **SHAPE)
        return self._chain_sum.ChainSumDataset(config)

    def _distinct(self, seed: int, count: int, known: set[str]) -> list[Problem]:
        known = set(known)
        out: list[Problem] = []
        for problem in self._problems(seed):
            if len(out) == count:
                return out
            if problem.question not in known:
                known.add(problem.question)
                out.append(problem)
        raise UserError(f"{PACKAGE} makes no {count} different problems. Ask for fewer.")

    def _problems(self, seed: int) -> Iterator[Problem]:
        for entry in self._dataset(seed, MOST):
            yield Problem(entry["question"], entry["answer"], entry["metadata"]["expression"])


def worked(problem: Problem) -> str:
    """The answer to learn: a line for each sum, then the result between the tags."""
    first, *rest = re.findall(r"[+-]? ?\d+", problem.expression)
    total = int(first)
    lines = []
    for term in rest:
        after = total + int(term.replace(" ", ""))
        lines.append(f"{total} {term} = {after}")
        total = after
    return "\n".join([*lines, f"<answer>{total}</answer>"])


def last_number(text: str) -> str | None:
    """The last number of a text: what an answer without tags comes to."""
    found = re.findall(r"-?\d+", text.replace(",", ""))
    return found[-1] if found else None


def _modules() -> tuple[Any, Any]:
    """reasoning_gym.arithmetic.chain_sum and reasoning_gym.utils.

    The package imports every task of its hundred when it is imported, for which it needs eleven other
    packages, one of them to be compiled. So it and its folder of arithmetic become modules without their
    __init__.py here; the two modules need the standard library and PyYAML alone.
    """
    for name in (PACKAGE, f"{PACKAGE}.arithmetic"):
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise UserError(
                    "The package reasoning-gym is not installed. Run: pip install pyyaml && pip install "
                    "--no-deps reasoning-gym (make sft does)."
                )
            sys.modules[name] = importlib.util.module_from_spec(spec)
    chain_sum = importlib.import_module(f"{PACKAGE}.arithmetic.chain_sum")
    return chain_sum, importlib.import_module(f"{PACKAGE}.utils")
