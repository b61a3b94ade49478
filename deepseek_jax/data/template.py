"""Chats to text by a checkpoint's chat template.

Templates are programs of whoever made the checkpoint. They run in jinja2's sandbox, see plain data only, and
render as in transformers' `apply_chat_template` (template_program.py). What a template does not read is
refused; transformers leaves it out silently.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepseek_jax.data import template_program
from deepseek_jax.data.messages import (
    Message,
    arguments_as_objects,
    checked,
    objects,
    plain,
    spellings,
    unwritten_call,
    with_reasoning,
)
from deepseek_jax.data.template_program import FAILURES, Rendered, names_read
from deepseek_jax.errors import UserError

TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own


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
    chat = checked(messages)
    if continue_final_message:
        _tag(chat[-1])
    begins = (
        not continue_final_message if add_generation_prompt is None else bool(add_generation_prompt)
    )
    given = _given(source, where, {"tools": tools, "documents": documents, **variables})
    shared = {"add_generation_prompt": begins, **special, **given}
    text = _rendered(
        lambda shown: template_program.run(source, {"messages": shown, **shared}), chat, where
    ).text
    return _cut(text, chat[-1], where) if continue_final_message else text


def render_watched(
    source: str,
    where: str,
    messages: Sequence[Message],
    special: Mapping[str, str],
    /,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> Rendered:
    """The text of `render` for a whole chat, with what the template wrote at each message.

    Raises:
      UserError: as of `render`.
    """
    given = _given(source, where, {"tools": tools, **variables})
    shared = {"add_generation_prompt": add_generation_prompt, **special, **given}
    return _rendered(
        lambda shown: template_program.run_watched(source, shown, {"messages": shown, **shared}),
        checked(messages),
        where,
    )


def _given(source: str, where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a template is given beside messages, as plain data."""
    out = {
        name: objects(value, name) if name in ("tools", "documents") else plain(value, name)
        for name, value in given.items()
    }
    acting = [name for name, value in out.items() if value not in (None, [])]
    if unread := [name for name in acting if name not in names_read(source, where)[0]]:
        raise UserError(
            f"the chat template of {where} does not read {unread[0]!r}, which would have no effect. Leave "
            f"it out."
        )
    return out


def _rendered(
    program: Callable[[list[dict[str, Any]]], Rendered], chat: list[dict[str, Any]], where: str
) -> Rendered:
    """What a program makes of a chat, in the first of its spellings that the template takes and of which it
    writes the tool calls; else in the first that it takes."""
    first: Exception | None = None
    taken: Rendered | None = None
    for spelling in spellings(chat):
        try:
            if any(isinstance(m.get("content"), list) for m in spelling):
                out = _by_parts(program, spelling)
            else:
                out = program([with_reasoning(m) for m in spelling])
            if (read := arguments_as_objects(spelling, out.text)) is not None:
                out = program([with_reasoning(m) for m in read])
        except FAILURES as e:
            first = first or e
            continue
        if all(unwritten_call(m, out.of(i)) is None for i, m in enumerate(chat)):
            return out
        taken = out if taken is None else taken
    if taken is not None:
        return taken
    raise UserError(
        f"the chat template of {where} refuses these messages "
        f"({' '.join(str(first).split())[:200] or type(first).__name__}). "
        f"Give messages in the form that it was made for."
    ) from first


def _by_parts(
    program: Callable[[list[dict[str, Any]]], Rendered], chat: list[dict[str, Any]]
) -> Rendered:
    """A chat with contents that are lists of parts: as they are where the template reads parts, else as one
    text each, as vLLM makes it.

    A template that does not read parts raises, writes the list out or leaves it out.
    """
    in_parts = [isinstance(m.get("content"), list) and m["role"] != "tool" for m in chat]
    lists = [m["content"] for m, yes in zip(chat, in_parts, strict=True) if yes]

    def written(parts, text):
        return str(parts) not in text and all(p["text"].strip() in text for p in parts)

    try:
        out = program([with_reasoning(m) for m in chat])
        if all(written(parts, out.text) for parts in lists):
            return out
    except FAILURES:
        pass

    def joined(m):
        return {**m, "content": "\n".join(part["text"] for part in m["content"])}

    pairs = zip(chat, in_parts, strict=True)
    return program([with_reasoning(joined(m) if yes else m) for m, yes in pairs])


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
