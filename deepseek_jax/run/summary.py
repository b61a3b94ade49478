"""What a run says before it starts and after it ends."""

import dataclasses
from typing import Any

import jax
from rich.console import Console

from deepseek_jax.cli.texts import human
from deepseek_jax.config.lora_targets import EXPERTS, targets
from deepseek_jax.config.options import Config
from deepseek_jax.config.sections.distill import SCHEDULED
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.loader import Loader
from deepseek_jax.experts import implementations
from deepseek_jax.model.count import Count
from deepseek_jax.objectives.features import features_of
from deepseek_jax.parallel import xla_options
from deepseek_jax.parallel.mesh import axes_across_hosts
from deepseek_jax.parallel.pipeline import make_schedule
from deepseek_jax.run import answers, passes
from deepseek_jax.run.loop import Result
from deepseek_jax.run.report import held_out_text
from deepseek_jax.run.stages import Stage
from deepseek_jax.run.teacher import Teacher
from deepseek_jax.run.trackers.every import TENSORBOARD, named
from deepseek_jax.train import projection, schedules
from deepseek_jax.train.compiled_step import CompiledStep
from deepseek_jax.train.history import History
from deepseek_jax.train.state import Layout


@dataclasses.dataclass(frozen=True)
class Run:
    """What is about to happen.

    Attributes:
      count: parameters and FLOPs of the model.
      resume_step: of the checkpoint that the run goes on from, or None.
      teacher: of a distillation.
      changed: a line for each option that differs from the last start's.
      compiler_options: of XLA.
      history: which rows of the data every step reads.
      stages: the table of config.distill.stages. stage: the one that begins or goes on.
    """

    config: Config
    mesh: jax.sharding.Mesh
    layout: Layout
    count: Count
    data: Loader | ExampleLoader
    workdir: str
    resume_step: int | None
    changed: list[str]
    teacher: Teacher | None
    compiler_options: dict[str, Any]
    history: History
    stages: list[str] = dataclasses.field(default_factory=list)
    stage: Stage | None = None


def show(run: Run, brief: bool = False) -> None:
    """Prints model, mesh, memory, data. In process 0 only.

    Args:
      brief: all that is not known from a stage before.
    """
    if jax.process_index() != 0:
        return
    console = Console(highlight=False, soft_wrap=True)
    lines = [*_model(run), *_devices(run), *_training(run), *_going_on(run)]
    if brief:
        lines = [*_stage(run), *_learning(run), *_memory(run)]
    for name, text in lines:
        console.print(f"{name:<17}{text}", markup=False)


Lines = list[tuple[str, str]]  # (name, text)


def _model(run: Run) -> Lines:
    m, count = run.config.model, run.count
    parameters = f"{human(count.total)} parameters, {human(count.active)} active per token"
    if count.mtp:
        parameters += f", and {human(count.mtp)} in {m.num_nextn_predict_layers} MTP layers"
    shape = (
        f"{m.num_hidden_layers} layers ({m.first_k_dense_replace} dense), hidden {m.hidden_size}"
    )
    if m.has_experts:
        shape += (
            f", {m.n_routed_experts} experts, {m.num_experts_per_tok} per token, "
            f"{m.n_shared_experts} shared"
        )
    return [("model", parameters), ("", shape), *_distillation(run)]


def _distillation(run: Run) -> Lines:
    """The teacher, and what is learnt from it."""
    d = run.config.distill
    if run.config.objective != "distill":
        return []
    teacher = [] if run.teacher is None else [("teacher", run.teacher.description)]

    def text(name: str) -> str:
        first, kind = getattr(d, name), getattr(d, f"{name}_schedule")
        last = f" to {getattr(d, f'{name}_final'):g} ({kind})" if kind != "constant" else ""
        return f"{name} {first:g}{last}"

    words = f"its {d.top_k} likeliest words, tail {d.tail}" if d.top_k else "all words"
    said = f"{', '.join(map(text, SCHEDULED))}; of {words}"
    return [*teacher, ("distillation", said), *_inside(run)]


def _inside(run: Run) -> Lines:
    """Which hidden states and routers are compared with the teacher's."""
    asked = run.teacher and features_of(run.config, run.teacher.config.model, run.teacher.map)
    lines: Lines = []
    if asked and (h := asked.hidden):
        first, last = (f"{s}:{t}" for s, t in (h.pairs[0], h.pairs[-1]))
        pairs = first if len(h.pairs) == 1 else f"{len(h.pairs)} pairs of layers, {first} to {last}"
        said = f"hidden states x {h.weight:g}, {h.kind}: {pairs}"
        if own := jax.tree.leaves(projection.split(run.layout.abstract.params)[1]):
            said += f", by {human(sum(a.size for a in own))} parameters that no export has"
        lines.append(("", said))
    if asked and (r := asked.router):
        lines.append(("", f"router x {r.weight:g}: of {len(r.layers)} layers"))
    return lines


def _devices(run: Run) -> Lines:
    config, mesh = run.config, run.mesh
    axes = " x ".join(f"{a} {n}" for a, n in mesh.shape.items() if n > 1) or "1 device"
    where = f"{mesh.devices.flat[0].device_kind}, {mesh.size} in all"
    if across := ", ".join(axes_across_hosts(mesh)):
        where += f"; {across} between processes"
    lines = [("mesh", f"{axes} ({where})")]
    if mesh.shape["stage"] > 1:
        s = make_schedule(config, mesh.shape["stage"])
        virtual = f"{s.virtual_stages} virtual stage{'s' * (s.virtual_stages > 1)}"
        lines.append(
            (
                "pipeline",
                f"{s.layers} blocks on {s.stages} stages, each with {virtual} of {s.blocks} blocks, "
                f"{s.micro_batches} micro-batches: bubble share {s.bubble_share:.1%}",
            )
        )
    strategy = config.sharding.canonical
    if (method := config.sharding.gradient_compression) != "none":
        strategy += f", gradients summed over data in {method}"
    lines.append(
        (
            "strategy",
            f"{strategy}, dispatch {config.moe.dispatch}, {config.train.dtype} compute, "
            f"remat {config.train.remat}",
        )
    )
    lines += [("fp8", text) for text in implementations.fp8_notes(config, mesh)]
    if run.compiler_options:
        given = run.compiler_options.items()
        options = [f"{name.removeprefix('xla_')}={str(value).lower()}" for name, value in given]
        lines.append(("XLA options", " ".join(options)))
    notes = xla_options.notes(config, mesh.devices.flat[0].platform)
    lines += [("prefetch", note) for note in notes]
    return [*lines, *_memory(run)]


def _memory(run: Run) -> Lines:
    state_bytes = run.layout.bytes_per_device(run.mesh)
    if run.teacher is not None and run.layout.frozen is None:  # asked before the step, not in it
        state_bytes["teacher"] = run.teacher.place(run.mesh).bytes_per_device()
    host = state_bytes.pop("host", 0)
    parts = " + ".join(f"{human(n)} {name.replace('_', ' ')}" for name, n in state_bytes.items())
    memory = f"{parts} = {human(sum(state_bytes.values()))}"
    if host:
        memory += f", and {human(host)} in the memory of its host"
    return [("bytes per device", memory)]


def _training(run: Run) -> Lines:
    t = run.config.train
    tokens = run.history.tokens(t.steps)
    passes = tokens / max(run.data.num_train_rows * t.sequence_length, 1)
    flops = run.count.flops_per_token
    return [
        ("data", run.data.description),
        *[("", note) for note in run.data.notes],
        *_scored(run.data),
        *_router(run.config),
        *zip(["stages", *[""] * len(run.stages)], run.stages, strict=False),
        *_stage(run),
        *_learning(run),
        (
            "training",
            f"{t.steps} steps of {t.batch_size} x {t.sequence_length} tokens = {human(tokens)} tokens "
            f"({passes:.2f} passes over the data{_not_asked(run, passes)})",
        ),
        *_shares_of_steps(run),
        ("compute", f"{human(flops)} FLOPs per token, {human(flops * tokens)} in all"),
    ]


def _shares_of_steps(run: Run) -> Lines:
    """The steps that shares of them and passes over the data come to."""
    c, rows, lines = run.config, run.data.num_train_rows, []
    if c.optimizer.warmup_fraction and run.stage is None:
        lines.append(("", f"the first {schedules.warmup_steps(c)} steps warm up"))
    for what, every in (("saved", c.checkpoint.every_epochs), ("evaluated", c.eval.every_epochs)):
        if every:
            first = passes.first_step_after(run.history, passes.rows_of(every, rows))
            unit = "pass" if every == 1 else f"{every:g} passes"
            lines.append(("", f"{what} after every {unit}, first after step {first}"))
    return lines


def _stage(run: Run) -> Lines:
    """The stage that begins or goes on."""
    if (s := run.stage) is None:
        return []
    goes_on = s.first_step < (run.resume_step or 0)
    how = "goes on" if goes_on else "begins, with a schedule of its own and fresh moments"
    return [("stage", f"{s.title}: {s.steps} steps, up to step {s.last_step}; {how}")]


def _not_asked(run: Run, passes: float) -> str:
    """Whether config.train.steps wins over epochs that were named, too."""
    t = run.config.train
    if run.stages:
        return ""
    too_far = abs(passes - t.epochs) * run.data.num_train_rows > t.batch_size
    if not t.epochs or not too_far:
        return ""
    return f": config.train.steps wins over config.train.epochs={t.epochs:g}"


def _scored(data: Loader | ExampleLoader) -> Lines:
    """What of the examples is scored, where not all of the data are."""
    lines = data.summary if isinstance(data, ExampleLoader) else []
    return list(zip(["scored", *[""] * len(lines)], lines, strict=False))


def _router(config: Config) -> Lines:
    """What fine-tuning and distillation do to the balance of experts."""
    m, rate = config.model, config.moe.bias_update_rate
    if config.objective == "pretrain" or not m.has_experts:
        return []
    text = f"balance loss x {m.aux_loss_alpha:g}"
    if m.topk_method == "noaux_tc":
        text += (
            f", selection bias moved by {rate:g} a step"
            if rate
            else ", selection bias as it came (config.moe.bias_update_rate=0)"
        )
    return [("router", text)]


def _learning(run: Run) -> Lines:
    """Which weights learn, where that is not all of them alike."""
    lora, lines = run.config.lora, run.layout.multipliers.table()
    adapted = targets(run.config.model, lora.target_modules) if lora.r else ()
    if lora.dropout and any(path.startswith(EXPERTS) for path in adapted):
        lines.append(
            f"dropout {lora.dropout:g} is of linear maps; routed experts have none, as in PEFT"
        )
    return list(zip(["weights", *[""] * len(lines)], lines, strict=False))


def _going_on(run: Run) -> Lines:
    step, history = run.resume_step, run.history
    workdir = run.workdir if step is None else f"{run.workdir}, resuming after step {step}"
    lines = [("workdir", workdir), *[("changed", text) for text in run.changed]]
    if step and history.stretches[-1].first_step == step:
        data = f"with row {history.first_row(step)}"
        if history.begins_order(step):
            data = (
                "with row 0 of a new pass: they, their order or sequence_length changed "
                "(config.data.on_change=new_pass)"
            )
        lines.append(("data go on", data))
    if step and any(s.contents is None for s in history.stretches):
        lines.append(
            (
                "",
                "steps before a checkpoint of an earlier version are taken to have read the same data with "
                "the options of config.json",
            )
        )
    return lines


def first_step(train_step: CompiledStep, seconds: float) -> str:
    """The line after the first step, `seconds` after the start."""
    program = train_step.last
    assert program is not None, "no step has run"
    how = "read from the cache" if program.cached else "compiled"
    return f"first step after {seconds:.1f} s ({how} in {program.seconds:.1f} s)"


def show_end(config: Config, workdir: str, result: Result, seconds: float) -> None:
    """Prints the sample, the held-out loss and where everything is. In process 0 only.

    Args:
      seconds: since the start.
    """
    if jax.process_index() != 0:
        return
    console = Console(highlight=False, soft_wrap=True)
    if result.sample:
        console.rule("sample", align="left")
        console.print(result.sample, markup=False)
        console.rule()
    events = ""
    if TENSORBOARD in named(config):
        events = f"  (tensorboard --logdir {workdir}/tensorboard)"
    lines = [
        ("took", f"{seconds / 60:.1f} min"),
        ("checkpoint", result.checkpoint),
        ("metrics", f"{workdir}/metrics.jsonl{events}"),
        ("report", f"{workdir}/report.html"),
    ]
    generate = f"python -m deepseek_jax.generate --workdir={workdir}"
    if config.reads_examples:
        lines.append(("chat", f"{generate} --chat"))
    else:
        lines.append(("more text", f"{generate} --prompt='class '"))
    if config.sft.eval_prompts:
        lines.append(("answers", f"{workdir}/{answers.FOLDER}/{result.step}.jsonl"))
    if result.evaluation:
        lines.insert(0, ("held-out loss", held_out_text(result.evaluation)))
    for name, text in lines:
        console.print(f"{name:<15}{text}", markup=False)
