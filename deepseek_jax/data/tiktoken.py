"""A `tiktoken.model` as a tokenizer of the tokenizers library. Nothing of the checkpoint's own code runs.

The file is a line `base64(bytes of a token) rank` for each token. tiktoken joins, again and again, the two
neighbours whose bytes together have the lowest rank. The library joins by a list of pairs, so the one pair
that each token is made of is found by doing the same with the token's own bytes: wherever a token comes about
in a text, its bytes were joined in that order. A piece that is a token as a whole is that token at once in
both (`ignore_merges`).

How text is cut into pieces, and the names of tokens that tokenizer_config.json does not name, stand in the
checkpoint's code alone. Known are those of Moonshot's models (tokenization_moonshot.py, tokenization_kimi.py:
`pat_str`, 256 reserved tokens).
"""

import base64
import binascii
import json
from typing import Any

from tokenizers import pre_tokenizers

# As auto_map names them.
MOONSHOT = ("tokenization_moonshot.TikTokenTokenizer", "tokenization_kimi.TikTokenTokenizer")
RESERVED = 256
MOST = 1 << 16  # added tokens, whatever a file says
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def to_json(data: bytes, config: dict[str, Any]) -> str:
    """The tokenizer.json of a rank file.

    Args:
      data: of tiktoken.model.
      config: tokenizer_config.json.

    Raises:
      ValueError: it is no such file, or of a tokenizer whose pattern is not known here; says which.
    """
    automatic = config.get("auto_map")
    names = automatic.get("AutoTokenizer") if isinstance(automatic, dict) else None
    named = [
        str(n).rpartition("--")[2] for n in (names if isinstance(names, list) else [names]) if n
    ]
    if not set(named) & set(MOONSHOT):
        raise ValueError(
            f"tokenizer_config.json names {', '.join(named) or 'no tokenizer in auto_map'}, and "
            f"only the patterns of {' and '.join(MOONSHOT)} are known"
        )
    ranks = read_ranks(data)
    spelt = _spelling()

    def spell(token):
        return "".join(spelt[b] for b in token)

    pairs = (_pair(token, ranks) for token in sorted(ranks, key=ranks.__getitem__))
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    pieces = {
        "type": "Split",
        "pattern": {"Regex": PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": {spell(token): rank for token, rank in ranks.items()},
        "merges": [(spell(pair[0]), spell(pair[1])) for pair in pairs if pair],
    }
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "post_processor": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pieces, level]},
        "decoder": level,
        "added_tokens": _added(config, len(ranks)),
        "model": model,
    }
    return json.dumps(tree, ensure_ascii=False)


def read_ranks(data: bytes) -> dict[bytes, int]:
    """{bytes of a token: its rank, which is its id} of a rank file.

    Raises:
      ValueError: a line is none, the ranks are not 0, 1, 2, ..., or a byte has no token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number} is not base64 and a rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(
        bytes([b]) in ranks for b in range(256)
    ):
        raise ValueError("its ranks are not 0, 1, 2, ... with a token for each byte")
    return ranks


def _pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that are joined last; None for a byte, and for a token that joining never arrives at."""
    never = len(ranks)
    parts = [token[i : i + 1] for i in range(len(token))]
    # The rank of parts[i] + parts[i + 1].
    found = [ranks.get(token[i : i + 2], never) for i in range(len(token) - 1)]
    while len(parts) > 2:
        best = min(found)
        if best == never:
            return None
        at = found.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del found[at]
        if at:
            found[at - 1] = ranks.get(parts[at - 1] + parts[at], never)
        if at < len(found):
            found[at] = ranks.get(parts[at] + parts[at + 1], never)
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _added(config: dict[str, Any], first: int) -> list[dict[str, Any]]:
    """added_tokens of a tokenizer.json: the ids from `first` on by tokenizer_config.json, and the reserved
    ones between them."""
    stated = config.get("added_tokens_decoder")
    stated = {
        int(i): t
        for i, t in (stated.items() if isinstance(stated, dict) else ())
        if i.isdigit() and isinstance(t, dict)
    }
    out = []
    for i in range(first, max(first + RESERVED, min(max(stated, default=0) + 1, first + MOST))):
        token = stated.get(i, {"content": f"<|reserved_token_{i}|>", "special": True})
        out.append(
            {
                "id": i,
                "content": str(token.get("content")),
                **{
                    flag: bool(token.get(flag))
                    for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")
                },
            }
        )
    return out


def _spelling() -> list[str]:
    """The character that stands for each byte (GPT-2's table): printable bytes are themselves, the rest
    follow from U+0100 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    rest = iter(range(256, 512))
    out = [chr(b) if chr(b) in alphabet and b < 256 else chr(next(rest)) for b in range(256)]
    assert set(out) == alphabet
    return out
