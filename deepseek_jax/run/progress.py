"""How far a run has come, besides its state: what a checkpoint keeps as its `extra`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from deepseek_jax.config.options import Config
from deepseek_jax.data.contents import Contents
from deepseek_jax.data.windows import Window, Windows
from deepseek_jax.train.history import History


class Progress(NamedTuple):
    """Attributes:
    tokens_seen: tokens trained on in all steps so far, padding left out.
    skipped: rows of the data order that rollbacks have left out.
    rollbacks: how many there were.
    history: which rows every step reads.
    run: the name of the run, `workdir.identity`.
    base: with LoRA what identifies its base, `base.identity`.
    teacher: in distillation what identifies the teacher, `Teacher.identity`.
    stages: those that have begun, stages.begun; empty for a run without.
    """

    tokens_seen: int = 0
    skipped: Windows = Windows()
    rollbacks: int = 0
    history: History = History()
    run: str = ""
    base: str = ""
    teacher: str = ""
    stages: Sequence[dict[str, Any]] = ()

    def to_extra(self) -> dict[str, Any]:
        out = {"tokens_seen": self.tokens_seen, "data": self.history.to_json(), "run": self.run}
        if self.rollbacks:
            out["skipped_rows"] = [list(w) for w in self.skipped.skipped]
            out["rollbacks"] = self.rollbacks
        known = {"base": self.base, "teacher": self.teacher, "stages": list(self.stages)}
        return out | {name: value for name, value in known.items() if value}

    @classmethod
    def of_extra(cls, extra: dict[str, Any]) -> "Progress":
        return cls(
            tokens_seen=extra["tokens_seen"],
            skipped=Windows.of(extra.get("skipped_rows", ())),
            rollbacks=extra.get("rollbacks", 0),
            history=History.of_json(extra.get("data", ())),
            run=extra.get("run") or "",
            base=extra.get("base") or "",
            teacher=extra.get("teacher") or "",
            stages=extra.get("stages", ()),
        )

    def resumed(
        self, step: int, config: Config, contents: Contents | None, earlier: History | None = None
    ) -> "Progress":
        """For going on after `step` steps with these options and data; as History.resumed."""
        history = self.history.resumed(step, config, contents, earlier)
        skipped = Windows() if history.begins_order(step) else self.skipped
        return self._replace(history=history, skipped=skipped)

    def rows(self, step: int) -> list[Window]:
        """The ranges of the data order that the step after `step` finished ones reads."""
        return self.skipped.rows(self.history.first_row(step), self.history.count(step))
