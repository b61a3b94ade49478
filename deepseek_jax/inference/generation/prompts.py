"""The prompts of a file: what a line may say, and its token ids."""

import sys
from collections.abc import Sequence
from typing import Any

from deepseek_jax.data import messages, prompt_files
from deepseek_jax.data.encoder import Encoder
from deepseek_jax.errors import UserError

FORM = 'Give one prompt per line, or with the ending .jsonl objects with "prompt" or "messages".'
# As of Chat.render.
CHAT_KEYS = {
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
}
_FLAGS = {
    "max_tokens": "max-tokens",
    "max_new_tokens": "max-tokens",
    "max_completion_tokens": "max-tokens",
    "temperature": "temperature",
    "top_p": "top-p",
    "top_k": "top-k",
    "stop": "stop",
    "seed": "seed",
}
_REQUESTS = (
    "n",
    "tool_choice",
    "response_format",
    "functions",
    "function_call",
    "logit_bias",
    "logprobs",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "do_sample",
    "num_beams",
    "stop_token_ids",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "stream",
    "extra_body",
)
OPTIONS = (
    {key: f"It is the same for all prompts: give --{flag}." for key, flag in _FLAGS.items()}
    | {key: "Leave it out." for key in _REQUESTS}
    | {"system": 'Give it as the first of "messages".'}
)
RESULTS = {"index", "text", "tokens", "finish_reason"}


def read_prompts(path: str) -> list[dict[str, Any]]:
    """The prompts of a file, each with "prompt" or "messages". Empty lines are none.

    Raises:
      UserError: the file cannot be read, a line is no prompt, or has a key that looks as if it acted and does
        not.
    """
    lines = prompt_files.read_lines(path, "--prompts", FORM)
    if not path.endswith((".jsonl", ".json")):
        return [{"prompt": line} for _, line in lines]
    out, unread = [], set()
    for number, line in lines:
        where = f"--prompts={path}: line {number}"
        row = prompt_files.read_object(line, where, FORM)
        if ("prompt" in row) == ("messages" in row):
            both, what = ("both", "and") if "prompt" in row else ("neither", "nor")
            raise UserError(f'{where} has {both} "prompt" {what} "messages". {FORM}')
        if "prompt" in row and not isinstance(row["prompt"], str):
            raise UserError(
                f'{where} has a "prompt" that is {type(row["prompt"]).__name__} and not a text. {FORM}'
            )
        if isinstance(row.get("messages"), str):
            raise UserError(
                f'{where} has "messages" that are a text and not a list. Give it as "prompt", or as '
                f"{messages.FORM}"
            )
        chat = CHAT_KEYS | {"chat_template_kwargs"}
        if "prompt" in row and (given := sorted(row.keys() & chat)):
            raise UserError(
                f"{where} has the key {given[0]!r}, which acts on messages, and a prompt. Give messages, or "
                f"leave it out."
            )
        variables = row.get("chat_template_kwargs", {})
        if not isinstance(variables, dict) or (
            twice := sorted(variables.keys() & {*CHAT_KEYS, "messages"})
        ):
            raise UserError(
                f"{where} has chat_template_kwargs with {twice[0]!r}, a key of the line itself."
                if isinstance(variables, dict)
                else f"{where} has chat_template_kwargs that are {type(variables).__name__} and no object."
            )
        unread |= prompt_files.unread_keys(
            row, where, {"prompt", "messages", *chat}, OPTIONS, RESULTS
        )
        out.append(row)
    if unread:
        print(
            f"--prompts={path}: nothing reads {', '.join(map(repr, sorted(unread)))}; it comes back with "
            f"the answers.",
            file=sys.stderr,
        )
    return out


def encode(encoder: Encoder, row: dict[str, Any]) -> list[int]:
    """Token ids of a prompt of `read_prompts`.

    Raises:
      UserError: the chat template refuses it, or does not read what it has.
    """
    if "messages" not in row:
        return encoder.encode_prompt(row["prompt"])
    options = {k: row[k] for k in CHAT_KEYS & row.keys()}
    ids = encoder.chat.encode(row["messages"], **options, **row.get("chat_template_kwargs", {}))
    if not ids:
        raise UserError("the chat template makes no text of these messages.")
    return ids


def encode_all(
    encoder: Encoder, prompts: Sequence[dict[str, Any]], path: str | None, longest: int
) -> list[list[int]]:
    """Token ids of all prompts, so that what is wrong with the last is known before the first is answered."""
    out, unread = [], set()
    for number, row in enumerate(prompts, 1):
        name = f"--prompts={path}: prompt {number}" if path else "--prompt"
        try:
            out.append(encode(encoder, row))
            unread |= (
                encoder.chat.unread(row["messages"], row.get("chat_template"))
                if "messages" in row
                else set()
            )
        except UserError as e:
            raise UserError(f"{name}: {e}") from None
        fits(out[-1], name, longest)
    if unread:
        print(
            f"--prompts={path}: the chat template does not read {', '.join(map(repr, sorted(unread)))} of "
            f"messages.",
            file=sys.stderr,
        )
    return out


def fits(prompt: Sequence[int], name: str, longest: int) -> None:
    """Raises UserError for a prompt that leaves no place for a token after it."""
    if len(prompt) >= longest:
        raise UserError(
            f"{name} has {len(prompt)} tokens, but the model ends at max_position_embeddings={longest}. "
            f"Shorten it."
        )
