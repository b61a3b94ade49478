"""Which tool a source is of."""

from collections.abc import Sequence
from typing import NamedTuple

from deepseek_jax.errors import UserError
from deepseek_jax.migrate.registry import TOOLS
from deepseek_jax.migrate.source import Source
from deepseek_jax.migrate.tool import Tool


class Assigned(NamedTuple):
    """A source and the tool that reads it."""

    source: Source
    tool: Tool
    guessed: bool  # from its keys, and not said by --from


def assign(sources: Sequence[Source], wanted: Sequence[str] = ()) -> list[Assigned]:
    """The tool of each source: the one that recognises it best.

    Args:
      sources: files, launcher and flags.
      wanted: names of --from. A source of one of their families is theirs; where no tool that stands beside a
        recipe recognises a source, the first of them has it.

    Raises:
      UserError: an unknown name; or nothing recognises a source.
    """
    wanted = [name.replace("-", "_").lower() for name in wanted]
    for name in wanted:
        if name not in TOOLS:
            raise UserError(f"--from={name} is not known. Choose of {', '.join(TOOLS)}.")
    named = [TOOLS[name] for name in wanted]
    out = [Assigned(s, *_best(s, named)) for s in sources if s.form != "flags"]
    out = [_with_its_kin(a, out) for a in out]
    recipe = next((a for a in out if not a.tool.companion), None)
    for source in sources:
        if source.form == "flags" and recipe:  # of a script: they are of the recipe's tool
            out.append(Assigned(source, recipe.tool, False))
        elif source.form == "flags" and source.entries:
            out.append(Assigned(source, *_best(source, named)))
    return out


def _with_its_kin(one: Assigned, others: Sequence[Assigned]) -> Assigned:
    """Files of one family are of one tool: a part of a recipe says less of its version than the rest."""
    kin = [a for a in others if a.tool.kin == one.tool.kin and not a.tool.companion]
    if one.tool.companion or len(kin) < 2:
        return one
    surest = max(kin, key=lambda a: a.tool.recognise(a.source))
    return one._replace(tool=surest.tool)


def _best(source: Source, named: Sequence[Tool]) -> tuple[Tool, bool]:
    scores = {name: tool.recognise(source) for name, tool in TOOLS.items()}
    best = TOOLS[max(scores, key=lambda name: scores[name])]
    found = scores[best.name] > 0
    for tool in named:
        if found and tool.kin == best.kin:
            return tool, False
    if found and (best.companion or not named):
        return best, best.recognise(source) < 100
    if named:
        return named[0], False
    raise UserError(
        f"{source.name} is of no tool that is known here: its keys are "
        f"{', '.join(list(dict.fromkeys(source.keys()))[:6]) or 'none'}. Say which one with --from=, of "
        f"{', '.join(TOOLS)}."
    )
