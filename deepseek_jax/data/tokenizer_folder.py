"""The tokenizer of a folder, of all the files that make it up.

`tokenizer.json` (or `tiktoken.model`) is most of it. Files beside it can name more: tokenizer_config.json's
`added_tokens_decoder` and added_tokens.json say which text is which id, special tokens may have no entry of
their own, and `add_bos_token` says that a text begins with bos. transformers' AutoTokenizer puts them
together; so does this, and the ids are the same.
"""

import hashlib
import json
import os
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, processors

from deepseek_jax.cli.texts import clean
from deepseek_jax.data import tiktoken
from deepseek_jax.errors import UserError

MAX_BYTES = 1 << 24  # of a template or a tokenizer_config.json
JSON, RANKS, CONFIG = "tokenizer.json", "tiktoken.model", "tokenizer_config.json"
# In the order that new ids are given.
SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
MOST_IDS = 1 << 24  # more than any vocabulary
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Files(NamedTuple):
    """What a folder says.

    Attributes:
      tokenizer: without truncation and padding.
      identity: `sha256:...` of what decides ids.
      special: {"bos_token": "<s>", ...}.
      config: tokenizer_config.json.
    """

    tokenizer: tokenizers.Tokenizer
    identity: str
    special: dict[str, str]
    config: dict[str, Any]


def find(folder: str) -> str | None:
    """The file of a folder's tokenizer; None: it has none that can be read here."""
    return next(
        (path for name in (JSON, RANKS) if os.path.isfile(path := os.path.join(folder, name))), None
    )


def file_of(path: str) -> str:
    """The file of the tokenizer that a user names: by itself, or by its folder; ~ is expanded."""
    path = os.path.expanduser(path)
    return (find(path) or path) if os.path.isdir(path) else path


def read(path: str, specials: bool = True, vocab_size: int | None = None) -> Files:
    """The tokenizer of a tokenizer.json or tiktoken.model and of what lies beside it.

    Args:
      specials: bos, eos and other special tokens that no file gives an id become tokens too, with
        the next ids, and a text begins with bos where `add_bos_token` says so: as in transformers.
        False: only tokens with an id, as training text is encoded.
      vocab_size: of the model, where it is known. Padding and the like that would come after its ids are left
        out: no text needs them.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no tokenizer; says why.
      UserError: the files contradict each other, or one is damaged.
    """
    with open(path, "rb") as f:
        data = f.read()
    folder, named = os.path.split(path)
    beside = named in (JSON, RANKS)  # another name: a file of its own, whatever else lies there
    config = read_json(folder, CONFIG) if beside else {}
    digest = hashlib.sha256(data)
    try:
        text = tiktoken.to_json(data, config) if named == RANKS else data.decode()
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # the library raises plain Exception
        raise ValueError(" ".join(str(e).split())[:300]) from None
    named_ids = _stated(folder, config) if beside else {}
    if named == RANKS or named_ids.keys() - tokenizer.get_added_tokens_decoder().keys():
        rows = [
            [i, t.content, *(getattr(t, f) for f in FLAGS)] for i, t in sorted(named_ids.items())
        ]
        digest.update(json.dumps(rows).encode())
    tokenizer = _with_ids(tokenizer, named_ids, path)
    more = read_json(folder, "special_tokens_map.json") if beside else {}
    special = {
        name: found for name in SPECIAL if (found := _text(config.get(name, more.get(name))))
    }
    if specials:
        _add_specials(tokenizer, special, config, more, vocab_size)
        _add_bos(tokenizer, special, config)
    tokenizer.no_truncation()  # files come with those of whoever saved them
    tokenizer.no_padding()
    return Files(tokenizer, "sha256:" + digest.hexdigest(), special, config)


def read_text(folder: str, file: str) -> str | None:
    """A small text of a checkpoint; None where there is none. Raises UserError: it cannot be read, or is not
    small."""
    path = os.path.join(folder, file)
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{path} cannot be read ({e}). Copy it again from where the checkpoint came from."
        ) from e
    if len(text) > MAX_BYTES:
        raise UserError(
            f"{path} is longer than {MAX_BYTES} characters, which no such file is. Copy it again."
        )
    return text


def read_json(folder: str, file: str) -> dict[str, Any]:
    """An object of a checkpoint, its texts cleaned; {} where there is none. Raises UserError: it cannot be
    read, or is not JSON."""
    try:
        # Not bounded_json: model_max_length has 31 digits in many.
        value = json.loads(read_text(folder, file) or "{}")
    except (ValueError, RecursionError) as e:
        raise UserError(
            f"{os.path.join(folder, file)} is not JSON ({str(e)[:100]}). Copy it again from where the "
            f"checkpoint came from."
        ) from e
    return clean(value) if isinstance(value, dict) else {}


def _stated(folder: str, config: dict[str, Any]) -> dict[int, AddedToken]:
    """The tokens that tokenizer_config.json and added_tokens.json give an id."""
    out: dict[int, AddedToken] = {}
    found = config.get("added_tokens_decoder")
    for key, token in found.items() if isinstance(found, dict) else ():
        if isinstance(token, dict) and token.get("content") == "":
            continue
        if not key.isdecimal() or not int(key[:20]) < MOST_IDS or not _text(token):
            raise UserError(
                f"{os.path.join(folder, CONFIG)}: added_tokens_decoder has {key[:40]!r}: {str(token)[:60]}, "
                f"and not an id and a token. Correct it."
            )
        out[int(key)] = AddedToken(
            _text(token),
            **{f: bool(token.get(f)) for f in FLAGS} if isinstance(token, dict) else {},
        )
    special = {_text(config.get(name)) for name in SPECIAL} | set(_extra(config))
    for content, i in read_json(folder, "added_tokens.json").items():
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < MOST_IDS:
            raise UserError(
                f"{os.path.join(folder, 'added_tokens.json')}: {content[:40]!r} has the id {str(i)[:40]}, "
                f"which is none. Correct it."
            )
        if i not in out and content:
            out[i] = AddedToken(
                content, special=content in special, normalized=content not in special
            )
    return out


def _with_ids(
    tokenizer: tokenizers.Tokenizer, wanted: dict[int, AddedToken], path: str
) -> tokenizers.Tokenizer:
    """The tokenizer with these tokens at these ids."""
    for i, token in wanted.items():
        here, there = tokenizer.token_to_id(token.content), tokenizer.id_to_token(i)
        if here not in (None, i) or there not in (None, token.content):
            raise UserError(
                f"{path}: token {i} is {there!r}, and {token.content!r} is token {here}; "
                f"tokenizer_config.json or added_tokens.json beside it says that {token.content!r} is token "
                f"{i}. Copy all three again from where the checkpoint came from."
            )
    known = tokenizer.get_added_tokens_decoder()
    new = {i: t for i, t in sorted(wanted.items()) if i not in known}
    if not new:
        return tokenizer
    missing = {i: t for i, t in new.items() if tokenizer.token_to_id(t.content) is None}
    first = max([tokenizer.get_vocab_size(with_added_tokens=False) - 1, *known]) + 1
    # The library gives the next id and no other, but reads any from a file.
    if list(missing) != list(range(first, first + len(missing))):
        tree = json.loads(tokenizer.to_str())
        vocab = tree["model"].get("vocab")
        if not isinstance(vocab, dict):
            i, token = next(iter(missing.items()))
            raise UserError(
                f"{path}: {token.content!r} is token {i} by tokenizer_config.json or added_tokens.json, and "
                f"the next token of this tokenizer is {first}. Save both files anew with transformers."
            )
        vocab |= {t.content: i for i, t in missing.items()}
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tree))
    tokenizer.add_tokens(list(new.values()))
    return tokenizer


def _add_specials(
    tokenizer: tokenizers.Tokenizer,
    special: dict[str, str],
    config: dict[str, Any],
    more: dict[str, Any],
    vocab_size: int | None,
) -> None:
    """Makes tokens of special ones that no file gives an id, in transformers' order."""
    known = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    for name, content in [
        *special.items(),
        *((None, text) for text in (*_extra(config), *_extra(more))),
    ]:
        if content in known:
            continue
        known.add(content)
        size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        beyond = (
            tokenizer.token_to_id(content) is None and vocab_size is not None and size >= vocab_size
        )
        if beyond and name in SPECIAL[2:]:
            continue
        tokenizer.add_tokens([AddedToken(content, special=True, normalized=False)])


def _add_bos(
    tokenizer: tokenizers.Tokenizer, special: dict[str, str], config: dict[str, Any]
) -> None:
    """Makes texts begin with bos where tokenizer_config.json asks for it.

    DeepSeek's files ask by `add_bos_token` alone, and transformers 4, which these were made for and evaluated
    with, adds it; transformers 5 reads it no more where there is a tokenizer.json
    (tokenization_utils_base.py).
    """
    bos = special.get("bos_token")
    i = tokenizer.token_to_id(bos) if bos else None
    if config.get("add_bos_token") is not True or i is None or tokenizer.encode("a").ids[:1] == [i]:
        return
    begin = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, i)]
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = processors.Sequence([before, begin]) if before is not None else begin


def _extra(config: dict[str, Any]) -> list[str]:
    """Special tokens without a name."""
    found = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    return [text for t in found if (text := _text(t))] if isinstance(found, list) else []


def _text(token: Any) -> str | None:
    """A special token, as a text or as an object with one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None
