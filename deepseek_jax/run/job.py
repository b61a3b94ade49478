"""A run, part by part.

train.py goes through the parts where a reader begins, after the command line and the processes; call.py
does so for callers from Python.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from deepseek_jax import objectives
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.cluster.signals import Stopper
from deepseek_jax.config.options import Config
from deepseek_jax.data import contents
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.open import open_data, settled
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import BadNumbers, SaveFailed
from deepseek_jax.hf.tensors import HfTensors
from deepseek_jax.inference.generation.sample import check_prompt
from deepseek_jax.model.count import Count, count
from deepseek_jax.model.layout import ModelWeights
from deepseek_jax.objectives.base import Objective
from deepseek_jax.parallel import xla_options
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import answers, init_from, kernels, lock, passes, remat, started, summary
from deepseek_jax.run.batches import Batch
from deepseek_jax.run.evaluator import Evaluator
from deepseek_jax.run.loop import Loop, Result
from deepseek_jax.run.processes import Processes
from deepseek_jax.run.profile import make_profiler
from deepseek_jax.run.progress import Progress
from deepseek_jax.run.report import Report
from deepseek_jax.run.resume import Continuation
from deepseek_jax.run.staged import StagedRun
from deepseek_jax.run.start import Start
from deepseek_jax.run.teacher import Teacher
from deepseek_jax.run.teacher_records import TeacherRecords
from deepseek_jax.run.trackers.every import Trackers, check_installed
from deepseek_jax.run.watchdog import Watchdog, end_alone
from deepseek_jax.runtime import compile_cache
from deepseek_jax.train import workdir as workdirs
from deepseek_jax.train.batch import abstract_batch
from deepseek_jax.train.compiled_step import CompiledStep
from deepseek_jax.train.state import Layout, TrainState, saved, to_tree
from deepseek_jax.train.step import StepMetrics, make_eval_step


class Job:
    """A run, to be gone through in this order: open, and then, for the options of each of its `stages`,
    find_start, compile, loop.

    A context manager: leaving it waits for checkpoints that are being written and gives up the
    workdir.

    Args:
      config: the options, validated.
      workdir: the folder of the run.
      processes: that take part, joined.
      stopper: says after which step to stop early.

    Attributes:
      teacher: of a distillation, from `open` on; None where there is none.
    """

    teacher: Teacher | None = None

    def __init__(
        self,
        config: Config,
        workdir: str,
        processes: Processes,
        stopper: Stopper | None = None,
    ):
        self._config = self._given = config
        self._workdir = workdir
        self._processes = processes
        self._stopper = stopper or Stopper()
        self._started = time.perf_counter()
        self._stack = contextlib.ExitStack()
        self._changed: list[str] = []  # options that differ from the last start's
        self._source: HfTensors | None = None  # of config.init_from
        self._staged: StagedRun | None = None  # with config.distill.stages
        self._frozen: ModelWeights | None = None  # the objective's: read once for all stages
        self._result: Result | None = None  # of the last loop
        self._trackers: Trackers | None = None  # opened once for all stages
        # Set on the way.
        self._mesh: jax.sharding.Mesh
        self._objective: Objective
        self._data: Loader | ExampleLoader
        self._prompts: list[answers.Prompt]  # that evaluations answer
        self._records: TeacherRecords
        self._checkpoints: Checkpointer
        self._compiler_options: dict[str, Any]
        self._count: Count
        self._about: summary.Run

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def say(self, text: str) -> None:
        """A line on stdout, of process 0."""
        if self._processes.index == 0:
            print(text)

    def open(self) -> tuple[jax.sharding.Mesh, Config]:
        """Makes a mesh of the devices and opens the data; the workdir is this run's from here on.

        Everything that can be wrong is found out here, before anything is compiled.

        Returns:
          The mesh, and the options with config.train.steps, where config.train.epochs says how often the
          data are read.

        Raises:
          UserError: something is.
        """
        config = self._config = self._given = settled(self._config)
        if first := self._processes.index == 0:
            check_installed(config)
        self._mesh = make_mesh(config)
        kernels.agree(config, self._processes)
        tokenizer = load_tokenizer(config.data.tokenizer, special_tokens=config.data.special_tokens)
        check_prompt(config.eval.sample_prompt, "config.eval.sample_prompt", tokenizer, config)
        self._changed = workdirs.prepare(self._workdir, config, tokenizer.name)
        if first:
            self._stack.enter_context(lock.all_locked(self._workdir, config))
        fields = objectives.make(config).fields  # whatever the number of steps
        self._data = open_data(config, tokenizer, fields, self._workdir, progress=first)
        self._prompts = answers.prompts_of_run(config, self._data)
        if config.init_from or config.lora.r:
            self._source = init_from.open_for_training(config, self._workdir)
        digest = contents.digest(self._data.contents)
        what = f"{self._data.description}, sha256 {digest[:12]}"
        self._processes.agree("data files", {"what config.data reads": what})
        if not config.distill.stages:
            self._config = passes.with_steps(
                config, self._workdir, self._data.num_train_rows, self._data.contents
            )
        self._checkpoints = Checkpointer(
            workdirs.checkpoints(self._workdir, config), options=config.checkpoint
        )
        compile_cache.use_cache(config.compile.cache_dir, warn=self.say)
        self._stack.enter_context(jax.set_mesh(self._mesh))
        self._stack.enter_context(contextlib.closing(self._checkpoints))
        # A failure from here on ends this process before the line above waits for others to save.
        self._stack.enter_context(self._processes.failures(BadNumbers, SaveFailed))
        if config.distill.stages:
            self._processes.agree("stages", {"config.distill.stages": config.distill.stages})
            self._staged = StagedRun(config, self._mesh, self._checkpoints, self._data)
            self._config = self._staged.config
        self._records = TeacherRecords(self._config, self._workdir, self._data, self._mesh, first)
        self.teacher = self._records.teacher
        return self._mesh, self._config

    def stages(self) -> Iterator[Config]:
        """The options of each stage that is left (stages.py); of a run without stages its own."""
        where = self._mesh, self.teacher, self._processes
        if self._staged is None:
            self._config = remat.settled(self._config, *where)
            yield self._config
            return
        while self._staged.begin(self._result):
            yield remat.settled(self._staged.stage.options, *where)

    def find_start(self, model: Layout, objective: Objective) -> Start:
        """Where the state comes from (start.py). Says what is about to happen.

        Args:
          model: the model's parameters and the optimizer's state, laid out over the mesh.
          objective: what is learnt.

        Raises:
          UserError: the newest checkpoint is of another run, model or tokenizer, or of other data.
        """
        config, mesh = self._config, self._mesh
        self._objective = objective
        bytes_per_layer = xla_options.bytes_of_a_layer(config, model.model.abstract.params, mesh)
        platform = mesh.devices.flat[0].platform
        self._compiler_options = xla_options.xla_options(config, platform, bytes_per_layer)
        self._count = count(config.model, model.model.abstract.params, config.train.sequence_length)
        if self.teacher is not None:
            self._count = self._count.beside(self.teacher.count)
        staged = self._staged
        step = (
            staged.newest
            if staged
            else self._checkpoints.newest_good(
                to_tree(saved(model.abstract_sharded(), config.lora))
            )
        )
        seen: dict[str, Any] = {"the newest checkpoint in --workdir": step}
        seen |= {"the last step": config.train.steps, "config.esft": model.multipliers.digest}
        self._processes.agree("folder, one that all hosts see", seen)
        continuation = Continuation(self._checkpoints, self._workdir, config, self._data.contents)
        start = Start(
            config=config,
            workdir=self._workdir,
            layout=model,
            checkpoints=self._checkpoints,
            source=self._source,
            continuation=continuation,
            step=step,
            progress=continuation.progress(step)._replace(stages=staged.begun if staged else ()),
            teacher=self.teacher,
            stage=staged.stage if staged else None,
        )
        if start.other_teacher:
            self._changed.append("the teacher has other weights than it had before")
        self._about = summary.Run(
            config=config,
            mesh=mesh,
            layout=model,
            count=self._count,
            data=self._data,
            workdir=self._workdir,
            resume_step=step,
            changed=self._changed,
            teacher=self.teacher,
            compiler_options=self._compiler_options,
            history=start.progress.history,
            stages=staged.lines if staged else [],
            stage=start.stage,
        )
        summary.show(self._about, brief=self._result is not None)
        return start

    def compile(self, train_step: Callable, start: Start) -> CompiledStep:
        """Begins to compile a step in a thread, for the batches that the run begins with.

        Args:
          train_step: (state, batch, frozen weights or None) -> (state, metrics).
        """
        step = CompiledStep(train_step, self._mesh, self._compiler_options, self.say)
        done = start.step or 0
        if done < self._config.train.steps:
            step.compile_ahead(
                start.layout.abstract_sharded(),
                self._abstract_batch(done),
                start.layout.abstract_frozen(),
            )
        return step

    def _abstract_batch(self, done: int) -> dict[str, jax.ShapeDtypeStruct]:
        return abstract_batch(self._objective.fields, self._config, self._mesh, done)

    def loop(self, step: CompiledStep, start: Start) -> Result:
        """Reads the state while the step compiles, trains, and says how it ended."""
        config = self._config
        if start.layout.frozen and self._frozen is None:
            self._frozen = start.layout.frozen.load()
        state, progress = start.state()
        start.write_files(self._data)
        done = int(state.step)
        if done >= config.train.steps:
            longer = f"raise config.train.{'steps' if self._given.train.steps else 'epochs'}"
            longer = "add a stage to config.distill.stages" if self._staged else longer
            self.say(f"Step {done} of {config.train.steps} is done already. To go on, {longer}.")
            self._result = Result(state, done, {}, {}, None, self._checkpoints.path(done))
            return self._result

        workdirs.write_config(
            self._workdir,
            self._given,
            self._compiler_options,
            progress.run,
            progress.history.to_json(),
            config.train.steps,
        )
        started.write(self._about)
        # Collectives wait 30 s for each other to begin (gloo's limit), and programs may take some
        # processes longer to compile: all wait here instead.
        step.program(state, self._abstract_batch(done), self._frozen)
        self._records.load()
        self._processes.agree("command", {"steps done": done})
        result = self._make_loop(step, start, progress, self._frozen).run(state, progress)
        earlier = self._result.losses if self._result else {}  # of stages before
        self._result = result = result._replace(losses=earlier | result.losses)
        if result.stopped_by is not None:
            self.say(
                f"Stopped by signal {result.stopped_by} after step {result.step}, saved in "
                f"{result.checkpoint}. The same command goes on from there."
            )
            return result
        if result.step < config.train.steps:  # of a stage
            return result
        sample = answers.sample_text(
            config, start.layout.model, self._mesh, result.state, self._data.tokenizer
        )
        result = result._replace(sample=sample)
        answers.keep_sample(self._workdir, result.step, sample)
        summary.show_end(config, self._workdir, result, time.perf_counter() - self._started)
        return result

    def _make_loop(
        self, step: CompiledStep, start: Start, progress: Progress, frozen: ModelWeights | None
    ) -> Loop:
        config, monitor = self._config, self._processes.monitor
        watchdog = Watchdog(config.watchdog.step_timeout, monitor.hung if monitor else end_alone)
        step.compiling = watchdog.paused
        last = start.stage.last_step if start.stage else config.train.steps
        done = start.step or 0
        if self._trackers is None:
            made = Trackers(self._workdir, self._config, done)
            self._trackers = self._stack.enter_context(contextlib.closing(made))
            self._stack.callback(started.report, self._workdir)
        else:
            self._trackers.rewind(done)
        eval_step = make_eval_step(start.layout, self._objective)
        evaluator = Evaluator(config, self._mesh, self._data, eval_step, self._objective, frozen)
        evaluator.records = self._records
        if self._prompts:
            evaluator.answering = answers.Answering(
                config, self._workdir, start.layout.model, self._mesh, self._data, self._prompts
            )

        def first_step() -> str:
            return summary.first_step(step, time.perf_counter() - self._started)

        report = Report(
            config, self._trackers, done, progress.tokens_seen, self._count, first_step, start.stage
        )

        def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
            return step(state, batch, frozen)

        return Loop(
            config=config,
            workdir=self._workdir,
            step=train_step,
            batches=self._records.batches(self._data),
            evaluate=evaluator,
            checkpointer=self._checkpoints,
            report=report,
            restore=start.after_bad_numbers,
            last=last,
            rows_of_pass=self._data.num_train_rows,
            profiler=make_profiler(config, self._workdir, step, last),
            stopper=self._stopper,
            watchdog=watchdog,
        )
