"""The tokenizer files of an export, and what it says of the tokens that begin and end a text.

A run knows them by its options: config.data.tokenizer, which may be bytes, and the token that ended its
documents. Readers of a checkpoint know what tokenizer_config.json, config.json and generation_config.json
say, and take the defaults of a class, other tokens, where these say nothing.
"""

import filecmp
import json
import os
import shutil
from typing import Any, NamedTuple

import tokenizers

from deepseek_jax.config.options import Config
from deepseek_jax.data import tokenizer_folder
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.contents import Contents, check_tokenizer
from deepseek_jax.data.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.hf import provenance
from deepseek_jax.hf.tensors import dump

# Of provenance.FILES those that belong to a tokenizer; the others belong to a model.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
)
END_OF_BYTES = "<|endoftext|>"


class Companions(NamedTuple):
    """What goes with the weights of an export.

    Attributes:
      files_from: folder with config.json, tokenizer and chat templates to be copied.
      tokenizer: bytes or a tokenizer.json, in place of that folder's; None: that folder's.
      ends: tokens that ended documents in training.
    """

    files_from: str | None
    tokenizer: str | None = None
    ends: tuple[int, ...] = ()


def contents_of(extra: dict[str, Any]) -> Contents | None:
    """What a checkpoint says of the data that its run read last; None of an earlier version."""
    return extra["data"][-1]["contents"] if extra.get("data") else None


def tokenizer_of(
    workdir: str, run: Config, trained: Contents | None, moved: str | None = None
) -> str:
    """The tokenizer that a run was trained with: `bytes` or a path, that of WORKDIR/hf before others.

    Args:
      workdir: of the run.
      run: its options.
      trained: of its checkpoint. None: of an earlier version, which did not keep the tokenizer's hash; the
        option is believed.
      moved: where it is now, by the user.

    Raises:
      UserError: none of the files is it, or it is gone.
    """
    special, given = run.data.special_tokens, moved or run.data.tokenizer
    kept = tokenizer_folder.find(os.path.join(workdir, provenance.FOLDER))
    there = given in ("bytes", "auto") or os.path.exists(os.path.expanduser(given))
    if trained is None:
        if moved or given in ("bytes", "auto"):
            return "bytes" if given == "auto" else given
        path = tokenizer_folder.file_of(given)
        if kept and (not there or os.path.isfile(path) and filecmp.cmp(path, kept, shallow=False)):
            return kept
    elif trained["tokenizer"] == "bytes":
        return "bytes"
    elif (
        not moved
        and kept
        and load_tokenizer(kept, special_tokens=special).name == trained["tokenizer"]
    ):
        return kept
    if not there and not moved:
        raise UserError(
            f"config.data.tokenizer={given!r} of {workdir} is not there any more. Put it back; "
            f"hf export takes its new place with --tokenizer=PATH."
        )
    option = "--tokenizer" if moved else "config.data.tokenizer"
    check_tokenizer(trained, load_tokenizer(given, option, special).name, given)
    return given


def ends_of(saved: Config, tokenizer: str) -> tuple[int, ...]:
    """The tokens that ended a run's documents, by its options and by its tokenizer, as `tokenizer_of`. What
    ends the answers of a fine-tuned run stands in its files (fine_tuned.py).

    Raises:
      UserError: the tokenizer cannot be read.
    """
    if saved.reads_examples:
        return ()
    stated = (saved.data.eos_token_id,) if saved.data.eos_token_id >= 0 else ()
    return tuple(dict.fromkeys((*stated, load_tokenizer(tokenizer).eos_id)))


def of_run(saved: Config, workdir: str, tokenizer: str) -> Companions:
    """What a trained run knows of its text.

    Args:
      saved: its options.
      workdir: of the run.
      tokenizer: as `tokenizer_of`.

    Raises:
      UserError: the tokenizer cannot be read.
    """
    folder = os.path.join(workdir, provenance.FOLDER)
    files = folder if provenance.read_notes(workdir) else None
    stated = (saved.data.eos_token_id,) if saved.data.eos_token_id >= 0 else ()
    size = ByteTokenizer.vocab_size
    if tokenizer == "bytes" and (saved.model.vocab_size < size or any(i >= size for i in stated)):
        # It was trained on token files whose tokenizer it does not know.
        return Companions(files, None, stated)
    same = files is not None and tokenizer == tokenizer_folder.find(files)
    return Companions(files, None if same else tokenizer, ends_of(saved, tokenizer))


def write(
    folder: str, config: dict[str, Any], companions: Companions, max_length: int
) -> dict[str, Any]:
    """Writes a run's tokenizer and generation_config.json into an export, which holds `files_from`'s already.

    Args:
      folder: of the export.
      config: of the export.
      companions: what goes with it.
      max_length: max_position_embeddings.

    Returns:
      config.json with the ids of the tokens that begin and end a text; null where there is none.

    Raises:
      UserError, OSError: the tokenizer cannot be read.
    """
    spec, ends = companions.tokenizer, companions.ends
    generation = tokenizer_folder.read_json(folder, "generation_config.json")
    if spec is not None:
        _replace(folder, spec, ends, max_length)
    _without_code(folder)
    if spec is not None or companions.files_from is None:
        special = _special_ids(folder) if spec is not None else {}
        stop = [*ends, *(i for i in (special.get("eos_token"),) if i is not None and i not in ends)]
        ids = {
            "bos_token_id": special.get("bos_token"),
            "eos_token_id": stop[0] if stop else None,
            "pad_token_id": special.get("pad_token"),
        }
        config = {k: v for k, v in config.items() if not k.endswith("_token_id")} | ids
        generation = {k: v for k, v in generation.items() if not k.endswith("_token_id")}
        generation |= {k: v for k, v in ids.items() if v is not None}
    else:
        stated = generation.get("eos_token_id", config.get("eos_token_id"))
        stop = list(stated) if isinstance(stated, list) else []
        if isinstance(stated, int):
            stop = [stated]
        if ends and tokenizer_folder.find(folder):
            _state_bos(folder)
            eos = _special_ids(folder).get(
                "eos_token"
            )  # our own generate ends an answer there, too
            ends += (eos,) if eos is not None and eos < config["vocab_size"] else ()
        if set(ends) <= set(stop):
            return config
        stop += [i for i in dict.fromkeys(ends) if i not in stop]
        config = {"eos_token_id": stop[0]} | config
    if stop:
        generation["eos_token_id"] = stop if len(stop) > 1 else stop[0]
        with open(os.path.join(folder, "generation_config.json"), "w", encoding="utf-8") as f:
            f.write(dump(generation))
    return config


def remove(folder: str) -> None:
    """Removes a tokenizer with its chat templates."""
    for name in FILES:
        if os.path.exists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    shutil.rmtree(os.path.join(folder, provenance.TEMPLATES), ignore_errors=True)


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
    remove(folder)
    target = os.path.join(folder, "tokenizer.json")
    if spec == "bytes":
        byte_tokenizer().save(target)
    else:
        path = tokenizer_folder.file_of(spec)
        if os.path.basename(path) in (tokenizer_folder.JSON, tokenizer_folder.RANKS):
            provenance.copy_files(os.path.dirname(path) or ".", folder, FILES)
        if os.path.basename(path) == tokenizer_folder.RANKS:  # few programs read it
            ranks = load_tokenizer(path)
            assert isinstance(ranks, FileTokenizer)
            ranks.save(target)
        else:
            shutil.copyfile(path, target)
    inner = tokenizers.Tokenizer.from_file(target)
    # The cleaning is transformers 4's default, and takes the space before a full stop away.
    config = tokenizer_folder.read_json(folder, tokenizer_folder.CONFIG) or {
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    # Another class may read the file otherwise: Llama's drops the space that begins a text in transformers 5.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if _bare(target, inner) or config.get("add_bos_token") or config.get("add_eos_token"):
        config |= {"add_bos_token": False, "add_eos_token": False}
    if (
        not Chat(folder).special.get("eos_token")
        and ends
        and inner.id_to_token(ends[-1]) is not None
    ):
        config["eos_token"] = inner.id_to_token(ends[-1])
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        f.write(dump(config))


def _without_code(folder: str) -> None:
    """Drops auto_map, which names code that no export holds: transformers would load the tokenizer with that
    code or not at all."""
    config, path = (
        tokenizer_folder.read_json(folder, tokenizer_folder.CONFIG),
        tokenizer_folder.find(folder),
    )
    if path is None or config.pop("auto_map", None) is None:
        return
    target = os.path.join(folder, tokenizer_folder.JSON)
    if path != target:
        try:
            tokenizer_folder.read(path, specials=False).tokenizer.save(target)
        except ValueError:
            return  # a tiktoken.model whose pattern only that code knows
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    with open(os.path.join(folder, tokenizer_folder.CONFIG), "w", encoding="utf-8") as f:
        f.write(dump(config))


def _bare(path: str, inner: tokenizers.Tokenizer) -> bool:
    """Takes out of a tokenizer.json what it puts before and after a text; whether there was something.

    Training text has no such tokens (data/tokenizer.py): a model answers badly after a bos it never saw.
    """
    if not inner.num_special_tokens_to_add(False):
        return False
    post = json.loads(inner.to_str())["post_processor"]
    kept = [p for p in post.get("processors", [post]) if p["type"] == "ByteLevel"]
    _set_post_processor(path, kept[0] if kept else None)
    return True


def _state_bos(folder: str) -> None:
    """Makes tokenizer.json say what `add_bos_token` says, which transformers 5 does not read."""
    path = os.path.join(folder, tokenizer_folder.JSON)
    if os.path.exists(path):
        said, meant = tokenizers.Tokenizer.from_file(path), Chat(folder).tokenizer
        if said.num_special_tokens_to_add(False) < meant.num_special_tokens_to_add(False):
            _set_post_processor(path, json.loads(meant.to_str())["post_processor"])


def _set_post_processor(path: str, value: Any) -> None:
    with open(path, encoding="utf-8") as f:
        tree = json.load(f)
    with open(path, "w", encoding="utf-8") as f:
        f.write(dump(tree | {"post_processor": value}))


def _special_ids(folder: str) -> dict[str, int]:
    chat = Chat(folder)
    ids = {name: chat.tokenizer.token_to_id(text) for name, text in chat.special.items()}
    return {name: i for name, i in ids.items() if i is not None}
