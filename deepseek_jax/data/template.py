"""Chats to text by a checkpoint's chat template.

Templates are programs of whoever made the checkpoint. They run in jinja2's sandbox, see plain data only, and
render as in transformers' `apply_chat_template`, whose environment this is: utils/chat_template_utils.py
there. What a template does not read is refused; transformers leaves it out silently.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np

from deepseek_jax.cli.texts import clean_text
from deepseek_jax.errors import UserError

# Names of a message's reasoning; templates read the first, gpt-oss's the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own
FAILURES = (
    jinja2.TemplateError,
    TypeError,
    KeyError,
    AttributeError,
    ValueError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
FORM = '[{"role": "user", "content": "..."}].'

Message = Mapping[str, Any]  # {"role": "user", "content": "..."} and what else a template reads


def render(
    source: str,
    where: str,
    messages: Sequence[Message],
    special: Mapping[str, str],
    /,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """A chat as a text.

    Args:
      source: of the template.
      where: whose it is, for messages.
      special: the tokenizer's special tokens by name. The other arguments: as of Chat.render.

    Raises:
      UserError: the messages are none, the template refuses them, or it does not read what is given.
    """
    flags = {
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }
    for name, value in flags.items():
        if not isinstance(value, bool | None):
            raise UserError(f"{name} is {value!r}, and neither true nor false.")
    if add_generation_prompt and continue_final_message:
        raise UserError(
            "add_generation_prompt begins an answer and continue_final_message goes on with one. Set one of "
            "them."
        )
    chat = _checked(messages)
    given = {
        "tools": _objects(tools, "tools"),
        "documents": _objects(documents, "documents"),
        **{k: plain(v, k) for k, v in variables.items()},
    }
    acting = [name for name, value in given.items() if value not in (None, [])]
    if unread := [name for name in acting if name not in names_read(source, where)[0]]:
        raise UserError(
            f"the chat template of {where} does not read {unread[0]!r}, which would have no effect. Leave "
            f"it out."
        )
    if continue_final_message:
        _tag(chat[-1])
    begins = (
        not continue_final_message if add_generation_prompt is None else bool(add_generation_prompt)
    )

    def once(chat: list[dict[str, Any]]) -> str:
        return _compiled(source).render(
            messages=[_with_reasoning(m) for m in chat],
            add_generation_prompt=begins,
            **{**special, **given},
        )

    try:
        text = (
            _by_parts(once, chat)
            if any(isinstance(m.get("content"), list) for m in chat)
            else once(chat)
        )
    except FAILURES as e:
        raise UserError(
            f"the chat template of {where} refuses these messages "
            f"({' '.join(str(e).split())[:200] or type(e).__name__}). "
            f"Give messages in the form that it was made for."
        ) from e
    return _cut(text, chat[-1], where) if continue_final_message else text


@functools.lru_cache(32)
def names_read(source: str, where: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names of variables, and of attributes and items, that a template reads anywhere.

    Raises:
      UserError: it is no template.
    """
    try:
        tree = _environment().parse(source)
    except FAILURES as e:
        raise UserError(
            f"the chat template of {where} is none ({' '.join(str(e).split())[:200]}). Copy it again from "
            f"where the checkpoint came from."
        ) from e
    variables = frozenset(n.name for n in tree.find_all(jinja2.nodes.Name) if n.ctx == "load")
    texts = {n.value for n in tree.find_all(jinja2.nodes.Const) if isinstance(n.value, str)}
    return variables, frozenset({n.attr for n in tree.find_all(jinja2.nodes.Getattr)} | texts)


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


def _checked(messages: Any) -> list[dict[str, Any]]:
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


def _objects(value: Any, name: str) -> list[dict[str, Any]] | None:
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


def _by_parts(once, chat: list[dict[str, Any]]) -> str:
    """A chat with contents that are lists of parts: as they are where the template reads parts, else as one
    text each, as vLLM makes it.

    A template that does not read parts raises, writes the list out or leaves it out.
    """
    in_parts = [isinstance(m.get("content"), list) and m["role"] != "tool" for m in chat]
    lists = [m["content"] for m, yes in zip(chat, in_parts, strict=True) if yes]

    def written(parts, text):
        return str(parts) not in text and all(p["text"].strip() in text for p in parts)

    try:
        text = once(chat)
        if all(written(parts, text) for parts in lists):
            return text
    except FAILURES:
        pass

    def joined(m):
        return {**m, "content": "\n".join(part["text"] for part in m["content"])}

    return once([joined(m) if yes else m for m, yes in zip(chat, in_parts, strict=True)])


def _tag(message: dict[str, Any]) -> None:
    """Marks where a message ends."""
    content = message.get("content")
    last = content[-1] if isinstance(content, list) and content else None
    if isinstance(last, dict) and isinstance(last.get("text"), str):
        last["text"] += TAG
    elif isinstance(content, str):
        message["content"] += TAG
    else:
        raise UserError(
            "continue_final_message: the last message has no text as 'content' to go on with."
        )


def _cut(text: str, message: dict[str, Any], where: str) -> str:
    """The text up to the mark, without spaces before it where the template has stripped the message."""
    at = text.rfind(TAG.strip())
    if at < 0:
        raise UserError(
            f"continue_final_message: the chat template of {where} does not write out the last message "
            f"({message['role']}) as it is."
        )
    return text[:at] if text[at:].startswith(TAG) else text[:at].rstrip()


@functools.lru_cache(32)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the model said; its contents are rendered."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inner"), [], [], body).set_lineno(line)

    def _inner(self, caller):
        return caller()


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}
