"""What says how good an answer is: functions of this program and of the user's own Python files.

All have the signature of TRL's and open-r1's reward functions:

    def verifier(prompts, completions, **columns) -> list[float | None]

with lists as long as each other. A prompt is a text or a list of messages, a completion a text or
[{"role": "assistant", "content": ...}]; `columns` are the further keys of the rows, None where a row has it
not. None says that a row cannot be judged.
"""

import asyncio
import fractions
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepseek_jax.errors import UserError, one_line

Verifier = Callable[..., Any]
GOLD = (
    "solution",
    "answer",
    "ground_truth",
    "target",
)  # columns with the right answer, in this order

# TRL's and open-r1's accuracy_reward read the last \boxed{}; GSM8K's answers end in "#### 42".
# A number; in 10-3 the last one is 3.
_NUMBER = re.compile(
    r"(?:(?<![\d.)])[-+])?(?<!\d)(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?|\.\d+)"
)
_FORMAT = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def content(completion: Any) -> str:
    """The text of a completion."""
    if isinstance(completion, str):
        return completion
    last = completion[-1]["content"] if completion else ""
    return last if isinstance(last, str) else ""


def accuracy(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 where the extracted answer is the right one, else 0; None where the row does not say which that is.

    Compared are `extract`s, as numbers where both are some: 0.5 is 1/2, 1,000 is 1000.
    """
    rows = zip(*(columns[name] for name in GOLD if name in columns), strict=True)
    golds = [next((value for value in row if value is not None), None) for row in rows]
    golds = golds or [None] * len(completions)
    return [
        None
        if gold is None or (right := extract(str(gold), bare=True)) is None
        # an answer without anything to compare is wrong
        else float(_same(right, extract(content(completion)) or ""))
        for gold, completion in zip(golds, completions, strict=True)
    ]


def form(completions: Sequence[Any], **_: Any) -> list[float | None]:
    """1 for `<think>...</think><answer>...</answer>` with each tag once and white space alone around them,
    else 0: open-r1's format_reward without its line breaks."""
    texts = map(content, completions)
    return [
        float(bool(_FORMAT.fullmatch(t)) and all(t.count(tag) == 1 for tag in _TAGS)) for t in texts
    ]


def extract(text: str, bare: bool = False) -> str | None:
    """The answer in a text: what is in the last \\boxed{}, else in <answer>, else after "####", else the last
    number. What was thought before (`</think>`) does not count.

    Args:
      text: of a completion, or the right answer.
      bare: the whole text is the answer where there is none of these.
    """
    text = text.rpartition("</think>")[2]
    if (boxed := _last_boxed(text)) is not None:
        return _plain(boxed)
    if tagged := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL):
        inner = str(tagged[-1])
        return _plain(inner) if number(_plain(inner)) is not None else extract(inner, bare=True)
    if "####" in text:
        return _plain(text.rpartition("####")[2].strip().partition("\n")[0])
    if bare and text.strip() and not _mostly_prose(text):
        return _plain(text)
    found = _NUMBER.findall(text)
    if found:
        return _plain(found[-1])
    return _plain(text) if bare and text.strip() else None


def number(text: str) -> fractions.Fraction | None:
    """A text as a number: 1,000; -0.5; 3/4; \\frac{3}{4}; 12%; None where it is none."""
    text = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text).replace(",", "")
    text = re.sub(r"\s*\\?%$", "", text)
    if re.search(r"[eE][-+]?\d{4}", text):
        return None  # as a fraction 1e999999999 would take all memory, and a model may say that
    try:
        return fractions.Fraction(re.sub(r"\s*/\s*", "/", text))
    except (ValueError, ZeroDivisionError):
        return None


def _mostly_prose(text: str) -> bool:
    """A worked solution, whose answer is in it somewhere, and not the answer itself."""
    return len(text.split()) > 8


def _last_boxed(text: str) -> str | None:
    """What is between the braces of the last \\boxed{...} that closes."""
    at = len(text)
    while (at := text.rfind("\\boxed{", 0, at)) >= 0:
        depth, start = 0, at + len("\\boxed")
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if not depth:
                return text[start + 1 : i]
    return None


def _plain(text: str) -> str:
    """Without what does not change an answer: dollars, spaces at the ends, a full stop, \\text{}."""
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = text.replace("\\left", "").replace("\\right", "").replace("\\!", "").replace("\\$", "")
    return " ".join(text.strip().strip("$").strip().removesuffix(".").split())


def _same(one: str, other: str) -> bool:
    a, b = number(one), number(other)
    if a is not None and b is not None:
        return a == b
    return one.casefold() == other.casefold()


BUILT_IN: dict[str, Verifier] = {
    "accuracy": accuracy,
    "format": form,
    "accuracy_reward": accuracy,
    "format_reward": form,
}


def load(given: str, option: str = "--verifier") -> Verifier:
    """A verifier: one of BUILT_IN, or the function of a Python file, whose code runs.

    Args:
      given: its name, or FILE.py:FUNCTION.
      option: that named it, for messages.

    Raises:
      UserError: there is no such file or function, or the file does not run.
    """
    if given in BUILT_IN:
        return BUILT_IN[given]
    path, _, name = given.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UserError(
            f"{option}={given} is neither FILE.py:FUNCTION nor one of {', '.join(BUILT_IN)}."
        )
    path = os.path.expanduser(path)
    spec = importlib.util.spec_from_file_location(f"verifier_{abs(hash(path))}", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise UserError(f"{option}={given}: there is no file {path}. Name one that is there.")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(
        0, os.path.dirname(os.path.abspath(path))
    )  # as for a script: what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise UserError(
            f"{option}={given}: {path} does not run ({one_line(e)}). Correct it."
        ) from e
    finally:
        sys.path.pop(0)
    found = getattr(module, name, None)
    if not callable(found):
        names = [
            n
            for n, f in vars(module).items()
            if inspect.isfunction(f) and f.__module__ == module.__name__
        ]
        raise UserError(
            f"{option}={given}: {path} has no function {name}. It has {', '.join(names) or 'none'}."
        )
    return found


def score(
    verifier: Verifier,
    name: str,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> list[float | None]:
    """What a verifier says of some rows. NaN and infinities count as None.

    Args:
      verifier: is given those of the columns that it takes.
      name: of it, for messages.
      prompts, completions: of the rows.
      columns: their further keys.

    Raises:
      UserError: it fails, or gives something else than a number or None for each row.
    """
    given = {"prompts": prompts, "completions": completions, **columns}
    parameters = inspect.signature(verifier).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        given = {p.name: given[p.name] for p in parameters if p.name in given}
    try:
        found = verifier(**given)
        if inspect.iscoroutine(found):  # TRL takes such functions
            found = asyncio.run(found)
    except Exception as e:
        raise UserError(f"--verifier={name} failed ({one_line(e)}). Correct it.") from e
    try:
        values = [None if v is None else float(v) for v in found]
    except (TypeError, ValueError, OverflowError) as e:
        raise UserError(
            f"--verifier={name} gave {one_line(e)}: not a list with a number or None for each row."
        ) from e
    if len(values) != len(completions):
        raise UserError(
            f"--verifier={name} gave {len(values)} scores for {len(completions)} rows. Give one for each."
        )
    return [v if v is not None and math.isfinite(v) else None for v in values]
