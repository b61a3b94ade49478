"""Megatron's data: prefixes of .bin and .idx files with weights, and shares that are held out."""

from deepseek_jax.migrate.handlers import as_text
from deepseek_jax.migrate.migration import Migration
from deepseek_jax.migrate.source import Entry

TOKENS_ARE_READ = (
    "the .bin files hold token ids; --config.data.tokenizer names a tokenizer for samples"
)


def splits(m: Migration, entry: Entry) -> None:
    """split, splits_string: shares of the documents for training, validation and test, in their order."""
    parts = entry.value if isinstance(entry.value, list) else as_text(entry).split(",")
    words = [str(p).strip() for p in parts if str(p).strip()]
    if not words or not all(_is_number(w) for w in words):
        m.refuse(entry, "it is not three shares", "Write it as 99,1,0")
    else:
        m.tell(entry, "data.split", ",".join(words))


def prefixes(m: Migration, entry: Entry) -> None:
    """data_path: prefixes of .bin and .idx files, each with a weight before it or none."""
    words = entry.value if isinstance(entry.value, list) else as_text(entry).split()
    paths = [str(w) for w in words if not _is_number(w)]
    weights = [str(w) for w in words if _is_number(w)]
    if not paths:
        m.no_effect(entry, "null is the default")
        return
    m.tell(entry, "data.path", ",".join(paths))
    if len(weights) == len(paths) > 1:
        m.tell(entry, "data.weights", ",".join(weights))


def _is_number(word: object) -> bool:
    try:
        float(str(word))
    except ValueError:
        return False
    return True
