"""Where the state of a run comes from. The order decides: the first that there is.

1. The newest checkpoint of the run that is whole: the run goes on after its step.
2. `config.init_from`: a Hugging Face checkpoint gives the weights of step 0.
3. An import: `python -m deepseek_jax.hf import` has put such a checkpoint into WORKDIR/hf. It
   counts as `config.init_from` from when the options are read (init_from.with_what_is_known).
4. Random numbers, of config.seed.
"""

import dataclasses
import os

import jax

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import Config
from deepseek_jax.data import tokenizer_folder
from deepseek_jax.data.chat import Chat
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.loader import Loader
from deepseek_jax.errors import UserError
from deepseek_jax.hf import base as identity
from deepseek_jax.hf import fine_tuned
from deepseek_jax.hf.configuration import family_of
from deepseek_jax.hf.provenance import FOLDER
from deepseek_jax.hf.tensors import HfTensors
from deepseek_jax.run import base, init_from, resume
from deepseek_jax.run.progress import Progress
from deepseek_jax.run.stages import Stage
from deepseek_jax.run.teacher import Teacher
from deepseek_jax.train import trainable
from deepseek_jax.train.state import Layout, TrainState, init_state, saved, to_tree


@dataclasses.dataclass
class Start:
    """A start of a run.

    Attributes:
      layout: of the state over the mesh.
      source: the opened checkpoint of `config.init_from`, None where there is none.
      continuation: what goes on besides the state.
      step: of the checkpoint that the run goes on from; None: from its beginning.
      progress: up to `step`.
      teacher: of a distillation.
      other_teacher: whether its weights are not those that the run had so far.
      stage: that begins or goes on, of a run with stages.
    """

    config: Config
    workdir: str
    layout: Layout
    checkpoints: Checkpointer
    source: HfTensors | None
    continuation: resume.Continuation
    step: int | None
    progress: Progress
    teacher: Teacher | None = None
    stage: Stage | None = None

    def __post_init__(self) -> None:
        """The base of LoRA is looked at before anything is compiled.

        Raises:
          UserError: it is gone, or another one than the run began with.
        """
        if self.config.lora.r:
            found = identity.check(self.config, self.source, self.progress.base)
            self.progress = self.progress._replace(base=found)
        before = self.progress.teacher
        now = self.teacher.identity if self.teacher else before
        self.other_teacher = before not in ("", now)
        self.progress = self.progress._replace(teacher=now)

    def state(self) -> tuple[TrainState, Progress]:
        """The state to begin with, in the shards of the mesh, and the progress up to it.

        Raises:
          UserError: what it comes from cannot be read, or is of another run, model or tokenizer.
        """
        return self._state(self.step)

    def after_bad_numbers(self) -> tuple[TrainState, Progress]:
        """The same once more, from what is the newest good checkpoint by now."""
        abstract = to_tree(saved(self.layout.abstract_sharded(), self.config.lora))
        return self._state(self.checkpoints.newest_good(abstract))

    def write_files(self, data: Loader | ExampleLoader) -> None:
        """Makes WORKDIR/hf say how a fine-tuned model is asked and where its answers end, in process 0.

        Raises:
          UserError: it cannot be written.
        """
        folder, sft = os.path.join(self.workdir, FOLDER), self.config.sft
        if not isinstance(data, ExampleLoader) or not os.path.isdir(folder):
            return
        if jax.process_index() != 0:
            return
        used = tokenizer_folder.file_of(self.config.data.tokenizer)
        of_folder = os.path.basename(used) in (tokenizer_folder.JSON, tokenizer_folder.RANKS)
        template = None
        if sft.chat_template:
            chat = Chat(os.path.dirname(used))
            template, _ = chat.source(sft.chat_template, False, "config.sft.chat_template")
        elif of_folder:
            template = fine_tuned.template_of(os.path.dirname(used))
        try:
            if of_folder:
                fine_tuned.take_tokenizer(folder, used)
            fine_tuned.state(folder, template, data.trained_stops(), sft.eos_token)
        except OSError as e:
            raise UserError(
                f"{folder} cannot be written ({e.strerror}). Make room, or name another --workdir."
            ) from e

    def _state(self, step: int | None) -> tuple[TrainState, Progress]:
        first = self.stage.first_step if self.stage else 0
        if (step or 0) < first:  # as a rollback in the first steps of a stage may find
            raise UserError(
                f"The checkpoint of step {first}, with which config.distill.stages goes on, is damaged. Run "
                f"the same command again: it goes on after step {step or 0}, in the stage before."
            )
        if step is not None:
            begins = bool(first) and step == first
            state, _ = resume.restore(
                self.checkpoints, self.layout, first, begins, self.config.lora
            )
            progress = self.continuation.progress(int(state.step))
            return self._with_base(state), self._with_identity(progress)
        if self.config.init_from:
            state = init_from.initial_state(self.source, self.config, self.layout, self.workdir)
        else:
            state = init_state(self.config, self.layout)
        return state, self._with_identity(self.continuation.progress(None))

    def _with_identity(self, progress: Progress) -> Progress:
        """The progress with what the base of LoRA and a teacher are known by, and the stages so far."""
        of_start = self.progress
        return progress._replace(
            base=of_start.base, teacher=of_start.teacher, stages=of_start.stages
        )

    def _with_base(self, state: TrainState) -> TrainState:
        """A restored state with the base of LoRA, which its checkpoint does not hold."""
        if not self.config.lora.r:
            return state
        assert self.source is not None
        family = family_of(self.source.config)
        weights = base.read(self.source, self.config, family, self.layout.model, everything=False)
        self.source.close()
        # Factors that lr_multipliers freezes are of the checkpoint.
        return state._replace(frozen=trainable.join(weights.params, state.frozen))
