"""Messages of a chat as templates are given them: plain data, checked, in the spellings that templates ask
for."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.errors import UserError

# Names of a message's reasoning; templates read the first, gpt-oss's the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
FORM = '[{"role": "user", "content": "..."}].'

Message = Mapping[str, Any]  # {"role": "user", "content": "..."} and what else a template reads


def plain(value: Any, name: str) -> Any:
    """A copy of JSON's types alone, texts cleaned: the sandbox knows nothing of other objects' methods.

    Raises:
      UserError: there is another object in it.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        return plain(value.item(), name)
    if isinstance(value, str):
        return clean_text(str.__str__(value))
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(k, name): plain(v, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{name}[{i}]") for i, v in enumerate(value)]
    more = (
        "its JSON schema, as transformers.utils.get_json_schema makes it of a function"
        if callable(value)
        else "what JSON can say"
    )
    raise UserError(
        f"{name} is a {type(value).__name__}, which a chat template cannot read. Give {more}."
    )


def checked(messages: Any) -> list[dict[str, Any]]:
    """Messages as plain data, without keys that are None: many APIs return content=None, which templates
    would write out."""
    if not isinstance(messages, (list, tuple)):
        raise UserError(
            f"messages are a {type(messages).__name__} and not a list. Give messages as {FORM}"
        )
    if not messages:
        raise UserError(f"messages are an empty list. Give messages as {FORM}")
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(
                f"messages[{i}] is a {type(message).__name__} and not an object. Give messages as {FORM}"
            )
        m = {k: v for k, v in plain(message, f"messages[{i}]").items() if v is not None}
        if not isinstance(m.get("role"), str):
            raise UserError(
                f"messages[{i}] has {'no' if 'role' not in m else 'a'} "
                f"'role'{'' if 'role' not in m else ' that is not a text'}. Give messages as {FORM}"
            )
        content = m.get("content")
        if content is None and not any(m.get(k) for k in ("tool_calls", *REASONING)):
            raise UserError(f"messages[{i}] has no 'content'. Give messages as {FORM}")
        if not isinstance(content, (str, list, type(None))) and m["role"] != "tool":
            raise UserError(
                f"messages[{i}] has a 'content' that is {type(content).__name__} and not a text. Give "
                f"messages as {FORM}"
            )
        for n, part in enumerate(
            content if isinstance(content, list) and m["role"] != "tool" else ()
        ):
            kind = part.get("type", "nothing") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise UserError(
                    f"messages[{i}]['content'][{n}] is of the type {kind!r} and no text, which is all that "
                    f"models here read. Give messages as {FORM}"
                )
        out.append(m)
    return out


def objects(value: Any, name: str) -> list[dict[str, Any]] | None:
    """tools or documents as plain data."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{name} are a {type(value).__name__} and not a list of objects.")
    out = plain(value, name)
    if wrong := [i for i, v in enumerate(out) if not isinstance(v, dict)]:
        raise UserError(
            f"{name}[{wrong[0]}] is a {type(value[wrong[0]]).__name__} and not an object."
        )
    return out


def functions(message: Message) -> list[Mapping[str, Any]]:
    """The functions that a message calls: objects with "name" and "arguments"."""
    calls = message.get("tool_calls")
    found = [
        call.get("function", call)
        for call in (calls if isinstance(calls, (list, tuple)) else ())
        if isinstance(call, Mapping)
    ]
    return [f for f in found if isinstance(f, Mapping)]


def unwritten_call(message: Message, text: str) -> str | None:
    """The name of a function that a message calls and that is not in what a template wrote."""
    names = [f["name"] for f in functions(message) if isinstance(f.get("name"), str)]
    return next((name for name in names if name not in text), None)


def spellings(chat: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """A chat as it is, and, if it has tool calls, in other spellings of the same: content None where there is
    none (DeepSeek-R1's template leaves the calls out else), arguments as JSON text and not as objects
    (DeepSeek-V3's puts strings together)."""
    yield chat
    if not any(m.get("tool_calls") for m in chat):
        return
    none = [{**m, "content": m.get("content") or None} if m.get("tool_calls") else m for m in chat]
    if none != chat:
        yield none
    text = [_with_arguments(m, lambda a: a if isinstance(a, str) else _json(a)) for m in none]
    if text != none:
        yield text


def arguments_as_objects(chat: list[dict[str, Any]], text: str) -> list[dict[str, Any]] | None:
    """The chat with arguments of tool calls as objects, if they were given as JSON text, as OpenAI has it,
    and the template wrote that text as a JSON string within JSON; else None."""
    given = [f.get("arguments") for m in chat for f in functions(m)]
    if not any(isinstance(a, str) and a not in text and _json(a) in text for a in given):
        return None

    def read(arguments):
        try:
            value = json.loads(arguments) if isinstance(arguments, str) else None
        except (ValueError, RecursionError):
            value = None
        return value if isinstance(value, dict) else arguments

    return [_with_arguments(m, read) for m in chat]


def _with_arguments(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A message with the arguments of its tool calls changed."""

    def changed(call):
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call

    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [changed(c) for c in calls]}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A copy of a message, with its reasoning under each name that templates read."""
    found = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return (
        dict(message)
        if found is None
        else {"thinking": found, **message, "reasoning_content": found}
    )
