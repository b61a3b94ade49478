"""What a run says before it starts and after it ends."""

from typing import Any

import jax
from rich.console import Console

from deepseek_jax.config.options import Config
from deepseek_jax.data.loader import Loader
from deepseek_jax.model.count import Count
from deepseek_jax.parallel import xla_options
from deepseek_jax.parallel.mesh import axes_across_hosts
from deepseek_jax.parallel.pipeline import make_schedule
from deepseek_jax.run.loop import Result
from deepseek_jax.train.compiled_step import CompiledStep
from deepseek_jax.train.history import History
from deepseek_jax.train.state import Layout


def human(n: float) -> str:
    """1234567 -> '1.23M'."""
    n = float(f"{n:.3g}")
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.4g}{unit}"
    return f"{n:.0f}"


def show(
    config: Config,
    mesh: jax.sharding.Mesh,
    layout: Layout,
    sizes: Count,
    loader: Loader,
    workdir: str,
    resume_step: int | None,
    changed: list[str],
    compiler_options: dict[str, Any],
    history: History,
) -> None:
    """Prints what is about to happen: model, mesh, memory, data."""
    if jax.process_index() != 0:
        return
    t, m = config.train, config.model
    held = layout.bytes_per_device(mesh)
    tokens = history.tokens(t.steps)
    console = Console(highlight=False, soft_wrap=True)
    line = lambda name, text: console.print(f"{name:<15}{text}", markup=False)
    mtp = (
        f", and {human(sizes.mtp)} in {m.num_nextn_predict_layers} MTP layers" if sizes.mtp else ""
    )
    line("model", f"{human(sizes.total)} parameters, {human(sizes.active)} active a token{mtp}")
    line(
        "",
        f"{m.num_hidden_layers} layers ({m.first_k_dense_replace} dense), hidden {m.hidden_size}"
        + (
            f", {m.n_routed_experts} experts, {m.num_experts_per_tok} a token, {m.n_shared_experts} shared"
            if m.has_experts
            else ""
        ),
    )
    axes = " x ".join(f"{a} {n}" for a, n in mesh.shape.items() if n > 1) or "1 device"
    across = ", ".join(axes_across_hosts(mesh))
    line(
        "mesh",
        f"{axes} ({mesh.devices.flat[0].device_kind}, {mesh.size} in all{f'; {across} between processes' if across else ''})",
    )
    if mesh.shape["stage"] > 1:
        s = make_schedule(config, mesh.shape["stage"])
        line(
            "pipeline",
            f"{s.layers} blocks on {s.stages} stages in {s.virtual_stages} piece{'s' * (s.virtual_stages > 1)} of {s.blocks}, "
            f"{s.micro_batches} micro-batches: bubble share {s.bubble_share:.1%}",
        )
    method = config.sharding.gradient_compression
    compressed = f", gradients summed over data in {method}" if method != "none" else ""
    line(
        "strategy",
        f"{config.sharding.canonical}{compressed}, dispatch {config.moe.dispatch}, "
        f"{t.dtype} compute, remat {t.remat}",
    )
    if compiler_options:
        line(
            "XLA options",
            " ".join(
                f"{name.removeprefix('xla_')}={str(value).lower()}"
                for name, value in compiler_options.items()
            ),
        )
    for text in xla_options.notes(config, mesh.devices.flat[0].platform):
        line("prefetch", text)
    host = held.pop("host", 0)
    line(
        "bytes a device",
        f"{' + '.join(f'{human(n)} {name}' for name, n in held.items())} = {human(sum(held.values()))}"
        f"{f', and {human(host)} in the memory of its host' if host else ''}",
    )
    line("data", loader.description)
    for text in loader.notes:
        line("", text)
    line(
        "training",
        f"{t.steps} steps of {t.batch_size} x {t.sequence_length} tokens = {human(tokens)} tokens "
        f"({tokens / max(loader.train_tokens, 1):.2f} passes over the data)",
    )
    line(
        "compute",
        f"{human(sizes.flops_per_token)} FLOPs a token, {human(sizes.flops_per_token * tokens)} in all",
    )
    line(
        "workdir",
        workdir if resume_step is None else f"{workdir}, resuming after step {resume_step}",
    )
    for text in changed:
        line("changed", text)
    if resume_step and history.stretches[-1].first_step == resume_step:
        line(
            "data go on",
            f"with row {history.first_row(resume_step)}"
            if not history.begins_order(resume_step)
            else "with row 0 of a new pass: they, their order or sequence_length changed "
            "(config.data.on_change=new_pass)",
        )
    if resume_step and any(s.contents is None for s in history.stretches):
        line(
            "",
            "steps before a checkpoint of an earlier version are taken to have read the same data with "
            "the options of config.json",
        )


def first_step(train_step: CompiledStep, seconds: float) -> str:
    """The line after the first step, `seconds` after the start."""
    program = train_step.last
    return f"first step after {seconds:.1f} s ({'read from the cache' if program.cached else 'compiled'} in {program.seconds:.1f} s)"


def show_end(workdir: str, result: Result, checkpoint: str, sample: str, seconds: float) -> None:
    """Prints the sample and where everything is."""
    if jax.process_index() != 0:
        return
    console = Console(highlight=False, soft_wrap=True)
    if sample:
        console.rule("sample", align="left")
        console.print(sample, markup=False)
        console.rule()
    if result.eval:
        bits = (
            f" = {result.eval['eval_bits_per_byte']:.4f} bits a byte"
            if "eval_bits_per_byte" in result.eval
            else ""
        )
        console.print(f"held-out loss  {result.eval['eval_loss']:.4f} nats a token{bits}")
    console.print(
        f"took           {seconds / 60:.1f} min\ncheckpoint     {checkpoint}\n"
        f"metrics        {workdir}/metrics.jsonl  (tensorboard --logdir {workdir}/tensorboard)\n"
        f"more text      python -m deepseek_jax.generate --workdir={workdir} --prompt='class '",
        markup=False,
    )
