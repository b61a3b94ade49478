"""A chat template as a program: compiled once, run in jinja2's sandbox, and watched where it is asked which
message each part of its output belongs to.

The environment is that of transformers' `apply_chat_template` (utils/chat_template_utils.py there).
"""

import contextvars
import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.visitor
from jinja2 import nodes

from deepseek_jax.errors import UserError

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
# Their output is put together before it is written: where it lands is not known while they run.
BUFFERED = (nodes.Macro, nodes.CallBlock, nodes.AssignBlock, nodes.FilterBlock)
NOBODY = -1


class Span(NamedTuple):
    """Characters start to end of a text, written while the template was at message `owner` (NOBODY: at
    none)."""

    start: int
    end: int
    owner: int


class Rendered(NamedTuple):
    """What a template made of a chat.

    Attributes:
      text: all of it.
      owned: what it wrote at each message, in order and without gaps between neighbours of one owner.
      marked: what stands within {% generation %}, in order.
    """

    text: str
    owned: list[Span]
    marked: list[Span]

    def of(self, message: int) -> str:
        """What was written at a message; all of the text where that is not known."""
        parts = [self.text[s.start : s.end] for s in self.owned if s.owner == message]
        return "".join(parts) if parts else self.text


class _Watch:
    """Where the output of a running template is, and at which message the template is."""

    def __init__(self, messages: Sequence[Any]):
        self.at = 0
        self.owned: list[Span] = []
        self.marked: list[Span] = []
        self._index = {id(m): i for i, m in enumerate(messages)}
        self._loops: list[int] = []  # of each open loop its message, the innermost last

    def enter(self, depth: int, item: Any) -> None:
        del self._loops[depth:]
        self._loops.append(self._index.get(id(item), NOBODY))

    def leave(self, depth: int) -> None:
        del self._loops[depth:]

    @property
    def owner(self) -> int:
        return next((i for i in reversed(self._loops) if i != NOBODY), NOBODY)

    def wrote(self, chunk: str) -> None:
        start, self.at, owner = self.at, self.at + len(chunk), self.owner
        if not chunk or owner == NOBODY:
            return
        if self.owned and self.owned[-1].end == start and self.owned[-1].owner == owner:
            start = self.owned.pop().start
        self.owned.append(Span(start, self.at, owner))

    def mark(self, text: str) -> None:
        if text:
            self.marked.append(Span(self.at, self.at + len(text), self.owner))


_watch: contextvars.ContextVar[_Watch | None] = contextvars.ContextVar("_watch", default=None)


def run(source: str, variables: Mapping[str, Any]) -> Rendered:
    """The output of a template, without who owns what. Raises one of FAILURES."""
    return Rendered(_compiled(source).render(**variables), [], [])


def run_watched(
    source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> Rendered:
    """The same output, with who owns what.

    The program is that of `run` with a note at the start of each pass of a loop and after its end. Notes
    write nothing. What they see is the loop's item itself, so neither slices nor lookahead
    (`loop.nextitem`) confuse them; a template that copies its messages has no owners.

    Args:
      messages: of `variables`, each an object of its own.
    """
    watch = _Watch(messages)
    token = _watch.set(watch)
    chunks = []
    try:
        for chunk in _compiled_watched(source).generate(**variables):
            watch.wrote(chunk)
            chunks.append(chunk)
    finally:
        _watch.reset(token)
    return Rendered("".join(chunks), watch.owned, watch.marked)


@functools.lru_cache(32)
def names_read(source: str, where: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names of variables, and of attributes and items, that a template reads anywhere.

    Raises:
      UserError: it is no template.
    """
    tree = _parsed(source, where)
    variables = frozenset(n.name for n in tree.find_all(nodes.Name) if n.ctx == "load")
    texts = {n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)}
    return variables, frozenset({n.attr for n in tree.find_all(nodes.Getattr)} | texts)


@functools.lru_cache(32)
def marks(source: str, where: str) -> bool:
    """Whether a template says by {% generation %} what the model said.

    Raises:
      UserError: it is no template, or says it within a macro, a {% set %} block or another such mark: where
        that is written is not known. transformers takes the place of the call there, a wrong one.
    """
    tree = _parsed(source, where)
    all_marks = sum(map(_is_mark, tree.find_all(nodes.CallBlock)))
    if all_marks > sum(map(_is_mark, _unbuffered(tree))):
        raise UserError(
            f"the chat template of {where} has {{% generation %}} in a macro, a {{% set %}} block or another "
            f"{{% generation %}}, so that what it marks is not known. Mark where the text is written "
            f"(config.sft.chat_template)."
        )
    return all_marks > 0


def _unbuffered(node: nodes.Node) -> Iterator[nodes.Node]:
    """The nodes below one whose output is written at once, and the buffering ones among them."""
    for child in node.iter_child_nodes():
        yield child
        if not isinstance(child, BUFFERED):
            yield from _unbuffered(child)


def _is_mark(node: nodes.Node) -> bool:
    called = node.call.node if isinstance(node, nodes.CallBlock) else None
    return isinstance(called, nodes.ExtensionAttribute) and called.name == "_mark"


def _parsed(source: str, where: str) -> nodes.Template:
    try:
        return _environment().parse(source)
    except FAILURES as e:
        raise UserError(
            f"the chat template of {where} is none ({' '.join(str(e).split())[:200]}). Copy it again from "
            f"where the checkpoint came from."
        ) from e


@functools.lru_cache(32)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.lru_cache(32)
def _compiled_watched(source: str) -> jinja2.Template:
    environment = _environment()
    tree = _Notes().visit(environment.parse(source))
    return environment.from_string(tree.set_environment(environment))


@functools.lru_cache(1)
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
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller):
        text = caller()
        if (watch := _watch.get()) is not None:
            watch.mark(text)
        return text

    def _enter(self, depth, item):
        if (watch := _watch.get()) is not None:
            watch.enter(depth, item)

    def _leave(self, depth):
        if (watch := _watch.get()) is not None:
            watch.leave(depth)


class _Notes(jinja2.visitor.NodeTransformer):
    """Puts the notes of `run_watched` into a template."""

    def __init__(self):
        self._depth = 0

    def visit_For(self, node: nodes.For) -> Any:
        if node.recursive:  # its output is buffered
            return node
        depth = self._depth
        self._depth += 1
        self.generic_visit(node)  # in place
        self._depth -= 1
        item = (
            nodes.Name(node.target.name, "load")
            if isinstance(node.target, nodes.Name)
            else nodes.Const(None)
        )
        node.body.insert(0, self._note("_enter", node, nodes.Const(depth), item))
        return [node, self._note("_leave", node, nodes.Const(depth))]

    def _note(self, name: str, at: nodes.Node, *args: nodes.Expr) -> nodes.Node:
        method = nodes.ExtensionAttribute(_Generation.identifier, name)
        call = nodes.Call(method, list(args), [], None, None)
        return nodes.ExprStmt(call).set_lineno(at.lineno, override=True)

    def _as_it_is(self, node: nodes.Node) -> nodes.Node:
        return node

    visit_Macro = visit_CallBlock = visit_AssignBlock = visit_FilterBlock = _as_it_is
