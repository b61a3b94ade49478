"""The tokenizer files of an export, and what it says of the tokens that begin and end a text.

A run knows them by its options: config.data.tokenizer, which may be bytes, and the token that ended its
documents. Readers of a checkpoint know what tokenizer_config.json, config.json and generation_config.json
say,
and take the defaults of a class, other tokens, where these say nothing.
"""

import filecmp
import json
import os
import shutil
from typing import Any, NamedTuple

import tokenizers

from deepseek_jax.config import Config, UserError
from deepseek_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from deepseek_jax.hf import start
from deepseek_jax.hf.chat import Chat
from deepseek_jax.hf.source import dump

# Of start.FILES those that belong to a tokenizer; the others belong to a model.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "vocab.json", "merges.txt", "tokenizer.model", "tiktoken.model", "chat_template.jinja",
         "chat_template.json")
END_OF_BYTES = "<|endoftext|>"


class Companions(NamedTuple):
    """What goes with the weights of an export."""

    files_from: str | None  # folder with config.json, tokenizer and chat templates to be copied
    tokenizer: str | None = None  # bytes or a tokenizer.json, in place of that folder's; None: that folder's
    ends: tuple[int, ...] = ()  # tokens that ended documents in training


def of_run(saved: Config, workdir: str, tokenizer: str | None = None) -> Companions:
    """What a trained run knows of its text.

    Args:
      saved: its options. tokenizer: where its tokenizer.json is now, if it has moved.

    Raises:
      UserError: its tokenizer.json is gone.
    """
    folder = os.path.join(workdir, start.FOLDER)
    files = folder if start.read_notes(workdir) else None
    spec, data = tokenizer or saved.data.tokenizer, saved.data
    stated = (data.eos_token_id,) if data.eos_token_id >= 0 else ()
    same = files is not None and same_tokenizer(spec, files)
    size = ByteTokenizer.vocab_size
    if spec == "bytes" and (saved.model.vocab_size < size or any(i >= size for i in stated)):
        return Companions(files, None, stated)  # trained on token files whose tokenizer it does not know
    try:
        eos = load_tokenizer(os.path.join(folder, "tokenizer.json") if same else spec, "--tokenizer").eos_id
    except UserError:
        if tokenizer is None and not os.path.exists(os.path.expanduser(spec)):
            raise UserError(f"config.data.tokenizer={spec!r} of {workdir} is not there any more. "
                            f"Give it with --tokenizer=PATH.") from None
        raise
    return Companions(files, None if same else spec, tuple(dict.fromkeys((*stated, eos))))


def same_tokenizer(spec: str, folder: str) -> bool:
    """Whether a run was trained with the tokenizer.json in a folder, as far as can still be seen."""
    given, kept = os.path.expanduser(spec), os.path.join(folder, "tokenizer.json")
    if spec == "bytes" or not os.path.exists(kept):
        return False
    return not os.path.exists(given) or filecmp.cmp(given, kept, shallow=False)


def write(folder: str, config: dict[str, Any], companions: Companions, max_length: int) -> dict[str, Any]:
    """Writes a run's tokenizer and generation_config.json into an export, which holds `files_from`'s already.

    Args:
      config: of the export. max_length: max_position_embeddings.

    Returns:
      config.json with the ids of the tokens that begin and end a text; null where there is none.

    Raises:
      UserError, OSError: the tokenizer cannot be read.
    """
    spec, ends = companions.tokenizer, companions.ends
    generation = _json(folder, "generation_config.json")
    if spec is not None:
        _replace(folder, spec, ends, max_length)
    if spec is not None or companions.files_from is None:
        special = _special_ids(folder) if spec is not None else {}
        stop = [*ends, *(i for i in (special.get("eos_token"),) if i is not None and i not in ends)]
        ids = {"bos_token_id": special.get("bos_token"), "eos_token_id": stop[0] if stop else None,
               "pad_token_id": special.get("pad_token")}
        config = {k: v for k, v in config.items() if not k.endswith("_token_id")} | ids
        generation = {k: v for k, v in generation.items() if not k.endswith("_token_id")}
        generation |= {k: v for k, v in ids.items() if v is not None}
    else:
        stop = generation.get("eos_token_id", config.get("eos_token_id"))
        stop = list(stop) if isinstance(stop, list) else [stop] if isinstance(stop, int) else []
        if set(ends) <= set(stop):
            return config
        stop += [i for i in ends if i not in stop]
        config = {"eos_token_id": stop[0]} | config
    if stop:
        generation["eos_token_id"] = stop if len(stop) > 1 else stop[0]
        with open(os.path.join(folder, "generation_config.json"), "w", encoding="utf-8") as f:
            f.write(dump(generation))
    return config


def byte_tokenizer() -> tokenizers.Tokenizer:
    """data.tokenizer=bytes for all: byte-level BPE without merges, ids 0 to 255 the bytes, 256 the end."""
    # GPT-2's table: printable characters stand for themselves.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    out = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    out.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = tokenizers.decoders.ByteLevel()
    out.add_special_tokens([tokenizers.AddedToken(END_OF_BYTES, special=True, normalized=False)])
    return out


def _replace(folder: str, spec: str, ends: tuple[int, ...], max_length: int) -> None:
    """A run's tokenizer in place of the one there, with what lies beside a file called tokenizer.json."""
    for name in FILES:
        if os.path.exists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    shutil.rmtree(os.path.join(folder, start.TEMPLATES), ignore_errors=True)
    target = os.path.join(folder, "tokenizer.json")
    if spec == "bytes":
        byte_tokenizer().save(target)
    else:
        path = os.path.expanduser(spec)
        if os.path.basename(path) == "tokenizer.json":
            start.copy_files(os.path.dirname(path) or ".", folder, FILES)
        shutil.copyfile(path, target)
    inner = tokenizers.Tokenizer.from_file(target)
    config = _json(folder, "tokenizer_config.json")
    if not config:
        encoding = inner.encode("a", add_special_tokens=True)
        # The cleaning is transformers 4's default, and takes the space before a full stop away.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length,
                  "clean_up_tokenization_spaces": False}
        if encoding.special_tokens_mask[:1] == [1]:
            config["bos_token"] = encoding.tokens[0]
    if not Chat(folder).special.get("eos_token") and ends and inner.id_to_token(ends[-1]) is not None:
        config["eos_token"] = inner.id_to_token(ends[-1])
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        f.write(dump(config))


def _special_ids(folder: str) -> dict[str, int]:
    chat = Chat(folder)
    ids = {name: chat.tokenizer.token_to_id(text) for name, text in chat.special.items()}
    return {name: i for name, i in ids.items() if i is not None}


def _json(folder: str, file: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, file), encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise UserError(f"{file} is not JSON ({str(e)[:100]}). Copy it again from where it came from.") from e
    return value if isinstance(value, dict) else {}
