"""Figures of models one after another: of text, of questions, or of lm-evaluation-harness' tasks.

Models of the same options share what is compiled, and one of them is in memory at a time.
"""

import dataclasses
import importlib
import time
from collections.abc import Sequence
from typing import Any

import jax

from deepseek_jax.config.configdict import from_config_dict
from deepseek_jax.errors import UserError
from deepseek_jax.hf.tokenizer_files import tokenizer_of
from deepseek_jax.inference.evaluation import choices, perplexity
from deepseek_jax.inference.evaluation.choices import Question
from deepseek_jax.inference.evaluation.scorer import Scorer
from deepseek_jax.inference.loaded import LoadedModel
from deepseek_jax.inference.opener import Opened, open_model
from deepseek_jax.train import workdir as workdirs


@dataclasses.dataclass
class Measurement:
    """What is measured of a model.

    Attributes:
      text: files, as --text; None: what a run held out.
      questions: of multiple choice, in place of text.
      tasks: names of lm-evaluation-harness, in place of both.
      window, stride, batch_size, limit: as evaluate's options.
      dtype, mesh: as open_model.
      details: of each question of the last model.
    """

    text: str | None = None
    questions: Sequence[Question] | None = None
    tasks: Sequence[str] = ()
    window: int | None = None
    stride: int | None = None
    batch_size: int | None = None
    limit: int | None = None
    dtype: str = "float32"
    mesh: jax.sharding.Mesh | None = None
    details: list[dict[str, Any]] | None = None
    _model: LoadedModel | None = None

    def of_path(self, path: str, step: int | None, run: str = "") -> dict[str, Any]:
        """Opens a model and measures it.

        Args:
          path: a Hugging Face checkpoint or a run's workdir.
          step: of the run's checkpoint; None: the newest.
          run: whose held-out part is read with another model: the one that it began with.

        Raises:
          UserError: as open_model and `of_model`.
        """
        begun = time.perf_counter()
        if self.tasks:
            figures = self._of_tasks(path, step)
        else:
            if self._model is not None:  # two models would need twice the memory
                self._model.params = self._model.bias = None
            opened = open_model(path, step, self.dtype, self.mesh)
            if run and opened.run is None:
                opened = _as_run(opened, run)
            figures = self.of_model(self._with_programs(opened))
        return {**figures, "seconds": round(time.perf_counter() - begun, 2)}

    def of_model(self, opened: Opened) -> dict[str, Any]:
        """Measures a model.

        Raises:
          UserError: there is nothing to read, or an option does not fit the model.
        """
        if self.questions is not None:
            result, self.details = choices.evaluate(
                opened, self.questions, self.batch_size, progress=True
            )
            return result
        if self.text is None and opened.run is None:
            raise UserError(
                f"--text and --questions are missing, and {opened.model.source} is a checkpoint, not a run "
                f"that held something out. Give one of them."
            )
        window = self.window if self.window is not None else perplexity.default_window(opened)
        scorer = Scorer(opened.model, window, self.batch_size)
        stride = self.stride if self.stride is not None else max(1, window // 2)
        if self.text is None:
            return perplexity.of_held_out(opened, scorer, stride, self.limit, progress=True)
        return perplexity.of_text(opened, self.text, scorer, stride, self.limit, progress=True)

    def _with_programs(self, opened: Opened) -> Opened:
        """With the object of the model before, which the compiled programs belong to, if it is the same."""
        new, before = opened.model, self._model
        if before is None or before.full_config != new.full_config:
            self._model = new
            return opened
        before.params, before.bias, before.source = new.params, new.bias, new.source
        before.notes, before.tokenizer = new.notes, new.tokenizer
        opened.model = before
        return opened

    def _of_tasks(self, path: str, step: int | None) -> dict[str, Any]:
        harness = _harness(self.tasks)
        axes = {a: n for a, n in self.mesh.shape.items() if n > 1} if self.mesh is not None else {}
        model = harness.DeepseekJaxLM(path, step, self.dtype, self.batch_size, **axes)
        found = harness.lm_eval.simple_evaluate(
            model=model, tasks=list(self.tasks), limit=self.limit
        )
        return {"results": found["results"]}


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises UserError where there are tasks and no lm-evaluation-harness to run them."""
    if tasks:
        _harness(tasks)


def _harness(tasks: Sequence[str]) -> Any:
    """inference/lm_eval.py, which needs the harness."""
    try:
        return importlib.import_module("deepseek_jax.inference.lm_eval")
    except ImportError as e:
        raise UserError(f"--tasks={','.join(tasks)}: {e}") from None


def _as_run(opened: Opened, run: str) -> Opened:
    """The model that a run began with, to be measured on what the run holds out."""
    saved = from_config_dict(workdirs.read_config(run))
    stretches = workdirs.read_history(run)[0].stretches
    contents = stretches[-1].contents if stretches else None
    opened.model.source = run  # whose examples are read
    tokenizer = tokenizer_of(run, saved, contents)
    return dataclasses.replace(
        opened, run=saved, trained=True, tokenizer=tokenizer, contents=contents
    )
