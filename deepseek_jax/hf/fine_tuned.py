"""What a fine-tuned run learnt to read and to end with, in its own files: WORKDIR/hf, which answers and
exports are made with.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

from deepseek_jax.config import paths
from deepseek_jax.data import tokenizer_folder
from deepseek_jax.data.chat import Chat, end_ids
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.hf import provenance, tokenizer_files
from deepseek_jax.hf.tensors import dump

TEMPLATE = "chat_template.jinja"


def state(folder: str, template: str | None, stop_ids: Sequence[int], eos_token: str = "") -> None:
    """Makes a checkpoint's files say how its fine-tuned model is asked and where its answers end.

    The template becomes the folder's only default one. The stop tokens that were trained stand before those
    that the checkpoint named, in generation_config.json and config.json; a padding token among the latter is
    left out: an answer that begins with padding would be empty.

    Args:
      folder: with config.json and the tokenizer's files.
      template: the text of the chat template that the examples were rendered with; None: no chats.
      stop_ids: tokens that ended an answer in training, the first one first.
      eos_token: config.sft.eos_token: the tokenizer's, too.

    Raises:
      UserError: a file is damaged.
      OSError: a file cannot be written.
    """
    if template is not None and template != template_of(folder):
        _put(folder, TEMPLATE, template)
        _change(folder, tokenizer_folder.CONFIG, lambda c: c.pop("chat_template", None))
        _change(folder, "chat_template.json", lambda c: c.pop("chat_template", None))
    if eos_token:
        _change(folder, tokenizer_folder.CONFIG, lambda c: c.update(eos_token=eos_token), True)
    if not stop_ids:
        return
    ends = _ends(folder, stop_ids)
    value = ends if len(ends) > 1 else ends[0]
    _change(folder, "generation_config.json", lambda c: c.update(eos_token_id=value), True)
    _change(folder, "config.json", lambda c: c.update(eos_token_id=value))


def take_tokenizer(folder: str, path: str) -> None:
    """Puts the tokenizer that a run was trained with, and what lies beside it, in place of the checkpoint's,
    if that is another one. What the checkpoint said of its stop tokens goes too: the ids mean other text now.

    Args:
      folder: with the checkpoint's config.json.
      path: a tokenizer.json or tiktoken.model.

    Raises:
      UserError: one of the two cannot be read.
      OSError: a file cannot be written.
    """
    kept = tokenizer_folder.find(folder)
    if kept and load_tokenizer(kept).name == load_tokenizer(path).name:
        return
    tokenizer_files.remove(folder)
    provenance.copy_files(os.path.dirname(path), folder, tokenizer_files.FILES)
    for name in ("generation_config.json", "config.json"):
        _change(folder, name, lambda c: c.pop("eos_token_id", None))


def template_of(folder: str) -> str | None:
    """The default chat template of a folder; None where it has none.

    Raises:
      UserError: a file is damaged.
    """
    if not tokenizer_folder.find(folder):
        return None
    try:
        return Chat(folder).template()
    except UserError:
        return None


def _ends(folder: str, stop_ids: Sequence[int]) -> list[int]:
    before = sorted(end_ids(folder))
    if tokenizer_folder.find(folder):
        chat = Chat(folder)
        pad = chat.tokenizer.token_to_id(chat.special.get("pad_token", ""))
        eos = chat.tokenizer.token_to_id(chat.special.get("eos_token", ""))
        before = [i for i in before if i != pad or i == eos]
    return list(dict.fromkeys((*stop_ids, *before)))


def _put(folder: str, name: str, text: str) -> None:
    path = os.path.join(folder, name)
    temporary = paths.temporary(path)
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(temporary, path)


def _change(
    folder: str, name: str, change: Callable[[dict[str, Any]], Any], create: bool = False
) -> None:
    """Changes an object in a file, where there is one."""
    path = os.path.join(folder, name)
    there = os.path.exists(path)
    if not there and not create:
        return
    value = tokenizer_folder.read_json(folder, name)
    before = dump(value)
    change(value)
    if not there or dump(value) != before:
        _put(folder, name, dump(value))
