"""Rows of fine-tuning data in the formats that people have, as one of three things: a chat, a text, tokens.

Formats and their names are TRL's, with DeepSeek-MoE's `instruction`, `output` (finetune.py there), DeepSeek's
`mask` of a message (the data of ESFT) and the `weight` of OpenAI's.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.config.options import IGNORE
from deepseek_jax.data.messages import FORM, Message
from deepseek_jax.errors import UserError

Row = Mapping[str, Any]

# Format -> the keys that a row of it has. In the order in which `auto` looks for them.
FORMATS = {
    "tokenized": ("input_ids",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "instruction_output": ("instruction", "output"),
    "text": ("text",),
}
_OF_CHATS = ("tools", "chat_template_kwargs")
# What else of a row is read.
ALSO_READ = {
    "tokenized": ("labels", "completion_mask", "assistant_masks", "attention_mask"),
    "messages": (*_OF_CHATS, "system"),
    "conversations": (*_OF_CHATS, "system"),
    "prompt_completion": _OF_CHATS,
    "instruction_output": ("input", "history"),
    "text": (),
}
# The names of ShareGPT's roles. TRL gives them to the template as they are, which knows none of them.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
# Words of the template that are not a row's to choose.
RESERVED = {"messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"}
SYSTEM = ("system", "developer")
INSTRUCTION = (
    "You are an AI assistant, developed by DeepSeek Company. For politically sensitive questions, "
    "security and privacy issues, you will refuse to answer.\n### Instruction:\n{instruction}\n"
    "{input}### Response:\n"
)  # DeepSeek-MoE, finetune/finetune.py: build_instruction_prompt; the input, if any, as Alpaca has it
INSTRUCTION_END = "<|EOT|>"  # what finetune.py ends an answer with


class Conversation(NamedTuple):
    """A chat.

    Attributes:
      messages: in order, as the template is given them.
      trained: for each message whether it may be trained: no for an answer that is masked.
      prompt: how many of them are the prompt; None: there is no prompt, all of it is one chat.
      tools: JSON schemas of functions.
      variables: for the template (chat_template_kwargs).
    """

    messages: Sequence[Message]
    trained: Sequence[bool]
    prompt: int | None
    tools: list[Mapping[str, Any]] | None
    variables: Mapping[str, Any]


class Passage(NamedTuple):
    """A text without eos at its end.

    Attributes:
      prompt: what `text` answers; None: it is a text by itself.
    """

    prompt: str | None
    text: str


class Tokens(NamedTuple):
    """Token ids, each mask bool [n] or None where the row has none.

    Attributes:
      labels: whether `labels` has the token (and not -100).
      completion: `completion_mask`.
      assistant: `assistant_masks`.
    """

    ids: np.ndarray
    labels: np.ndarray | None
    completion: np.ndarray | None
    assistant: np.ndarray | None


def find_format(row: Row, name: str) -> str:
    """The first format whose keys a row has.

    Raises:
      UserError: there is none.
    """
    for kind, keys in FORMATS.items():
        if all(row.get(key) is not None for key in keys):
            return kind
    forms = "; ".join(f"{' and '.join(keys)}" for keys in FORMATS.values())
    raise UserError(
        f"{name} has the keys {_keys(row)}, which are no format of sft. Rows have {forms}."
    )


def normalise(
    row: Row, kind: str, name: str, system_prompt: str = "", arrow: bool = False
) -> Conversation | Passage | Tokens:
    """A row of one format.

    Args:
      kind: of FORMATS.
      name: of the row, for messages: "chats.jsonl, line 3".
      system_prompt: put first in a chat that has no system message.
      arrow: the row comes from a table (Parquet, Arrow), whose structs have a value for every key: None is
        left out of tools and messages.

    Raises:
      UserError: the row is not of that format.
    """
    if missing := [key for key in FORMATS[kind] if row.get(key) is None]:
        raise UserError(
            f"{name} has the keys {_keys(row)}; config.sft.format={kind} needs {missing[0]!r}. Rows of one "
            f"run have one format: correct the row, or set config.sft.format."
        )
    if kind == "tokenized":
        return _tokens(row, name)
    if kind == "text":
        return Passage(None, _text(row, "text", name))
    if kind == "instruction_output":
        return _instruction(row, name)
    if kind == "prompt_completion":
        texts = [isinstance(row[key], str) for key in FORMATS[kind]]
        if all(texts):
            return Passage(row["prompt"], row["completion"])
        if any(texts):
            raise UserError(
                f"{name} has a prompt and a completion of which one is a text and one is not. Make "
                f"both texts, or both lists of messages."
            )
    return _conversation(row, kind, name, system_prompt, arrow)


def drop_none(value: Any) -> Any:
    """A value without keys that are None, at any depth: an Arrow struct has every key of every row."""
    if isinstance(value, Mapping):
        return {k: drop_none(v) for k, v in value.items() if v is not None}
    return [drop_none(v) for v in value] if isinstance(value, (list, tuple)) else value


def _conversation(row: Row, kind: str, name: str, system_prompt: str, arrow: bool) -> Conversation:
    keys = FORMATS[kind]
    parts = [_messages(row[key], key, name, arrow) for key in keys]
    messages = [m for part in parts for m in part]
    first = row.get("system") if kind != "prompt_completion" else None  # ShareGPT's column
    system = first if isinstance(first, str) and first else system_prompt
    prompt = len(parts[0]) if len(parts) > 1 else None
    if system and not any(m["role"] in SYSTEM for m in messages):
        messages.insert(0, {"role": "system", "content": system})
        prompt = None if prompt is None else prompt + 1
    trained = [_trained(m, name) for m in messages]
    tools = _read(row.get("tools"))
    if not isinstance(tools, (list, tuple, type(None))):
        raise UserError(
            f"{name} has tools that are a {type(tools).__name__} and not a list of JSON schemas, or such "
            f"a list as JSON text."
        )
    variables = _read(row.get("chat_template_kwargs")) or {}
    if not isinstance(variables, Mapping) or (taken := variables.keys() & RESERVED):
        why = f"the key {min(taken)!r}" if isinstance(variables, Mapping) else "no object"
        raise UserError(
            f"{name} has chat_template_kwargs with {why}. Give an object of a template's words, such as "
            f'{{"enable_thinking": false}}.'
        )
    return Conversation(
        [{k: v for k, v in m.items() if k not in ("mask", "weight")} for m in messages],
        trained,
        prompt,
        (drop_none(tools) if arrow else list(tools)) if tools else None,
        drop_none(variables) if arrow else variables,
    )


def _messages(value: Any, key: str, name: str, arrow: bool) -> list[dict[str, Any]]:
    """Messages of a row, from/value and ShareGPT's roles in the usual words."""
    value = _read(value)
    if not isinstance(value, (list, tuple)) or not all(isinstance(m, Mapping) for m in value):
        raise UserError(f"{name} has {key} that are not a list of messages. Give {FORM}")
    if not value:
        raise UserError(f"{name} has an empty list of {key}. Give {FORM}")
    out = []
    for i, given in enumerate(value):
        message = drop_none(given) if arrow else dict(given)
        if message.get("role") is None and "from" in message:
            message["role"] = message.pop("from")
            message["role"] = ROLES.get(message["role"], message["role"])
        if message.get("content") is None and isinstance(message.get("value"), str):
            message["content"] = message.pop("value")
        if not isinstance(message.get("role"), str):
            raise UserError(
                f"{name}: {key}[{i}] has the keys {_keys(message)} and no 'role'. Give {FORM}"
            )
        # Templates ask whether there is the key: DeepSeek-V3's then writes calls, and no content.
        if calls := _read(message.pop("tool_calls", None)):
            message["tool_calls"] = drop_none(calls) if arrow else calls
        out.append(message)
    return out


def _trained(message: Mapping[str, Any], name: str) -> bool:
    """Whether a message may be trained: no answer with DeepSeek's `mask: 1`, or with OpenAI's `weight: 0`."""
    mask, weight = message.get("mask"), message.get("weight")
    for key, value in (("mask", mask), ("weight", weight)):
        if not isinstance(value, (int, float, type(None))) or value not in (None, 0, 1):
            raise UserError(
                f"{name} has a message with {key}={value!r}. Give 0 or 1: mask 1, or weight 0, for an "
                f"answer that is not trained."
            )
    return message["role"] != "assistant" or (mask != 1 and weight != 0)


def _instruction(row: Row, name: str) -> Passage:
    if row.get("history"):
        raise UserError(
            f"{name} has the key 'history', which is not read with instruction and output. Give earlier "
            f"turns as messages."
        )
    given = _text(row, "input", name).strip() if row.get("input") is not None else ""
    prompt = INSTRUCTION.format(
        instruction=_text(row, "instruction", name).strip(),
        input=f"### Input:\n{given}\n" if given else "",
    )
    return Passage(prompt, _text(row, "output", name) + "\n")


def _tokens(row: Row, name: str) -> Tokens:
    ids = _integers(row["input_ids"], "input_ids", name)
    masks: dict[str, np.ndarray | None] = {}
    for key in ("labels", "completion_mask", "assistant_masks"):
        value = row.get(key)
        mask = masks[key] = None if value is None else _integers(value, key, name)
        if mask is not None and len(mask) != len(ids):
            raise UserError(
                f"{name} has {len(ids)} input_ids and {len(mask)} {key}. Give one for each token."
            )
    attention = row.get("attention_mask")
    if attention is not None and 0 in _integers(attention, "attention_mask", name):
        raise UserError(
            f"{name} has an attention_mask with 0: padding is made here. Leave those input_ids out."
        )
    labels = masks.pop("labels")
    if labels is not None:
        wrong = (labels != IGNORE) & (labels != ids)
        if wrong.any():
            at = int(wrong.argmax())
            raise UserError(
                f"{name}: labels[{at}] is {labels[at]} and input_ids[{at}] is {ids[at]}. Labels are the "
                f"ids of the same places, or {IGNORE}: do not shift them."
            )
    for key, mask in masks.items():
        if mask is not None and not np.isin(mask, (0, 1)).all():
            raise UserError(f"{name} has {key} with other values than 0 and 1.")
    return Tokens(
        ids.astype(np.int32),
        None if labels is None else labels != IGNORE,
        *(None if mask is None else mask == 1 for mask in masks.values()),
    )


def _integers(value: Any, key: str, name: str) -> np.ndarray:
    try:
        array = np.asarray(value if isinstance(value, (list, tuple, np.ndarray)) else [])
    except ValueError:  # lists of several lengths
        array = np.asarray([])
    if array.dtype == bool:
        array = array.astype(np.int64)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise UserError(f"{name} has {key} that are not a list of integers.")
    return array.astype(np.int64)


def _text(row: Row, key: str, name: str) -> str:
    if not isinstance(row[key], str):
        raise UserError(f"{name} has a {key!r} that is a {type(row[key]).__name__} and not a text.")
    return row[key]


def _read(value: Any) -> Any:
    """A list or an object, also as JSON text: columns of a table hold one type."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value.tolist() if isinstance(value, np.ndarray) else value


def _keys(row: Mapping[str, Any]) -> str:
    keys: Sequence[str] = sorted(map(str, row))
    return ", ".join(keys[:12]) + (", ..." if len(keys) > 12 else "") if keys else "(none)"
