"""YAML and JSON files as sources: every value with its line, floats as people mean them, nothing run.

PyYAML follows YAML 1.1, in which 5e-5 and 1e8 are texts: what reads these files elsewhere (OmegaConf,
argparse, `float()`) makes numbers of them. Keys that stand twice in one mapping are kept with the source.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import yaml

from deepseek_jax.errors import UserError
from deepseek_jax.migrate.source import Entry, Rank, Source

LARGEST = 1 << 20  # bytes of a file: recipes are small
MOST = 20_000  # keys and items of a file, as aliases multiply them
DEEPEST = 60
MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Only plain values: no timestamps, whose dates nobody trains by."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}


def read_file(path: str, name: str = "") -> Source:
    """A YAML or JSON file.

    Args:
      path: of the file.
      name: what it is called in messages; "": the path.

    Raises:
      UserError: it cannot be read, is too large, is not YAML or JSON, or holds tags that would run code.
    """
    name = name or path
    if path.endswith((".py", ".ipynb")):
        raise UserError(
            f"{name} is a program, which is not run. Give its settings: DeepSpeed's dict as a JSON file, "
            f"arguments as --command='python {name} --learning_rate=...'."
        )
    return from_text(read_text(path, name), name)


def read_text(path: str, name: str) -> str:
    """The text of a file.

    Args:
      path: of the file.
      name: what it is called in messages.

    Raises:
      UserError: it cannot be read, is too large, or no text.
    """
    try:
        if os.path.isfile(path) and os.path.getsize(path) > LARGEST:
            raise UserError(
                f"{name} has {os.path.getsize(path)} bytes, and a recipe at most {LARGEST}."
            )
        with open(path, encoding="utf-8-sig") as f:
            text = f.read(LARGEST + 1)  # of a pipe nobody knows how much comes
        if len(text) > LARGEST:
            raise UserError(f"{name} has more than {LARGEST} characters, the most of a recipe.")
        return text
    except OSError as e:
        raise UserError(f"{name}: {e.strerror}. Name a YAML or JSON file.") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{name} is no text in UTF-8. Name a YAML or JSON file.") from e


def from_text(text: str, name: str) -> Source:
    """The same of its text.

    Raises:
      UserError: as `read_file`.
    """
    form = "yaml"
    # gpt-neox writes YAML with braces, comments and commas at the end, in .yml
    if text.lstrip().startswith(("{", "[")) and not name.endswith((".yml", ".yaml")):
        form, text = "json", _checked_json(text, name)
    try:
        documents = list(yaml.compose_all(text, Loader=_Loader))
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = " ".join(str(getattr(e, "problem", None) or e).split())
        raise UserError(f"{where} is not YAML: {problem}. Correct it there.") from e
    except RecursionError as e:
        raise UserError(f"{name} has keys or lists that lie too deep for a recipe.") from e
    except ValueError as e:
        raise UserError(f"{name} is not YAML that can be read: {e}.") from e
    documents = [d for d in documents if d is not None]
    if len(documents) != 1 or not isinstance(documents[0], yaml.MappingNode):
        what = {0: "is empty", 1: "holds no mapping of keys"}.get(
            len(documents), f"holds {len(documents)} documents"
        )
        raise UserError(f"{name} {what}. A recipe is one mapping of keys to values.")
    walk = _Walk(name)
    walk.mapping(documents[0], "", 0)
    return Source(name, tuple(walk.entries), form, tuple(walk.duplicates))


def scalar(text: str) -> Any:
    """A plain value as a file would hold it: "5e-5" is a number, "no" is False."""
    try:
        node = _Loader(text).get_single_node() if _one_line(text) else None
    except yaml.YAMLError:  # a quotation mark alone
        return text
    if not isinstance(node, yaml.ScalarNode) or node.tag not in PLAIN or node.style:
        return text
    return _scalar_value(node)


def flattened(tree: Any, where: str, rank: Rank = Rank.RECIPE, key: str = "") -> Iterator[Entry]:
    """The entries of nested dicts and lists: of one that stands in a flag, for instance."""
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from flattened(value, where, rank, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list) and any(isinstance(v, (dict, list)) for v in tree):
        for i, value in enumerate(tree):
            yield from flattened(value, where, rank, f"{key}.{i}")
    else:
        yield Entry(key, tree, where, rank)


Pairs = list[tuple[yaml.Node, yaml.Node]]


class _Walk:
    """Entries and duplicates, collected.

    Args:
      name: of the file.
      budget: how many keys and items may still be seen; shared by walks of one file.
    """

    def __init__(self, name: str, budget: list[int] | None = None) -> None:
        self.name = name
        self.entries: list[Entry] = []
        self.duplicates: list[tuple[Entry, Entry]] = []
        self._budget = [MOST] if budget is None else budget

    def mapping(self, node: yaml.MappingNode, prefix: str, depth: int) -> None:
        pairs = self._merged(node, depth)
        if not pairs and prefix:  # << of an empty mapping
            self.entries.append(Entry(prefix, {}, f"{self.name}:{node.start_mark.line + 1}"))
        last = {self._key(k): i for i, (k, _) in enumerate(pairs)}
        earlier: list[tuple[str, list[Entry]]] = []
        begins: dict[str, int] = {}  # key -> place of its first entry
        for i, (key_node, value) in enumerate(pairs):
            key = self._key(key_node)
            full = f"{prefix}.{key}" if prefix else key
            if last[key] != i:
                aside = _Walk(self.name, self._budget)
                aside.value(value, full, key_node, depth + 1)
                earlier.append((full, aside.entries))
            else:
                begins[full] = len(self.entries)
                self.value(value, full, key_node, depth + 1)
        for full, found in earlier:
            if begins[full] < len(self.entries):
                self.duplicates += [(e, self.entries[begins[full]]) for e in found]

    def _merged(self, node: yaml.MappingNode, depth: int) -> Pairs:
        """The pairs of a mapping; before them what `<<` brings from others and it does not have itself."""
        self._spend(1, depth)
        own = [pair for pair in node.value if pair[0].tag != MERGE]
        names = {self._key(key) for key, _ in own}
        brought: Pairs = []
        for key_node, value in node.value:
            if key_node.tag != MERGE:
                continue
            for base in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(base, yaml.MappingNode):
                    raise UserError(
                        f"{self.name}:{key_node.start_mark.line + 1} has << with no mapping. Write "
                        f"<<: *NAME, of an anchor before it."
                    )
                found = {self._key(key): (key, v) for key, v in self._merged(base, depth + 1)}
                brought += [pair for name, pair in found.items() if name not in names]
                names |= found.keys()
        return brought + own

    def _spend(self, count: int, depth: int) -> None:
        self._budget[0] -= count
        if depth > DEEPEST or self._budget[0] < 0:
            raise UserError(
                f"{self.name} has more than {MOST} keys and items, or they lie too deep."
            )

    def value(self, node: yaml.Node, key: str, at: yaml.Node, depth: int) -> None:
        items = len(node.value) if isinstance(node, yaml.SequenceNode) else 0
        self._spend(1 + items, depth)
        where = f"{self.name}:{at.start_mark.line + 1}"
        if isinstance(node, yaml.MappingNode) and node.value:
            self._check_tag(node, where)
            self.mapping(node, key, depth)
        elif isinstance(node, yaml.SequenceNode) and any(
            not isinstance(item, yaml.ScalarNode) for item in node.value
        ):
            self._check_tag(node, where)
            for i, item in enumerate(node.value):
                self.value(item, f"{key}.{i}", item, depth + 1)
        else:
            self.entries.append(Entry(key, self._plain(node, where), where))

    def _plain(self, node: yaml.Node, where: str) -> Any:
        self._check_tag(node, where)
        if isinstance(node, yaml.ScalarNode):
            return _scalar_value(node)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, where) for item in node.value]
        return {}

    def _check_tag(self, node: yaml.Node, where: str) -> None:
        if node.tag not in PLAIN | {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise UserError(
                f"{where} has the tag {tag}: objects and code are not read. Write a plain value there."
            )

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise UserError(
                f"{self.name}:{node.start_mark.line + 1} has a key that is no plain text."
            )
        return _whole_characters(str(node.value))


def _scalar_value(node: yaml.ScalarNode) -> Any:
    text = _whole_characters(node.value)
    kind = node.tag.rpartition(":")[2]
    if kind == "str" or (kind in ("int", "float") and ":" in text):
        return text  # 00:03:30:00 is a time, and not a number to the base of 60
    try:
        if kind == "float" and "e" in text.lower():
            return float(text.replace("_", ""))  # also where YAML 1.1 has a text
        return _Loader("").construct_object(node)
    except (yaml.YAMLError, ValueError, KeyError):  # thousands of digits; `!!bool x`
        return text


def _whole_characters(text: str) -> str:
    """JSON writes a character beyond the first 65,536 as two escapes, which YAML reads as two halves."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _checked_json(text: str, name: str) -> str:
    """JSON that YAML reads with its lines. Tabs stand between tokens only: in a string JSON escapes them."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as e:
        if text.lstrip().startswith("{{"):
            raise UserError(f"{name} is a template and no JSON. Fill it in first.") from e
        if isinstance(e, RecursionError):
            raise UserError(f"{name} has keys or lists that lie too deep for a recipe.") from e
        where = f"{name}:{e.lineno}" if isinstance(e, json.JSONDecodeError) else name
        why = e.msg if isinstance(e, json.JSONDecodeError) else str(e)
        raise UserError(f"{where} is not JSON: {why}. Correct it there.") from e
    return text.replace("\t", " ")


def _one_line(text: str) -> bool:
    return bool(text.strip()) and "\n" not in text and not re.search(r"[{}\[\]&*!|>%@`#:]", text)
