"""A job that asks a teacher about every token of a run's data, and keeps what it says (distill/)."""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax

from deepseek_jax.cli.texts import human, plural
from deepseek_jax.config.options import Config
from deepseek_jax.data import contents
from deepseek_jax.data.example_loader import ExampleLoader
from deepseek_jax.data.fields import INPUTS, RECORD
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.open import open_data, settled
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.distill import checks, maker, manifest, shards
from deepseek_jax.distill.commands import describe
from deepseek_jax.distill.maker import Worker
from deepseek_jax.distill.manifest import Manifest
from deepseek_jax.distill.program import RecordProgram, devices_of_batch
from deepseek_jax.errors import UserError
from deepseek_jax.objectives.base import Frozen
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run.processes import Processes
from deepseek_jax.run.teacher import Teacher, open_teacher
from deepseek_jax.runtime import compile_cache


class Request(NamedTuple):
    """What is asked for.

    Attributes:
      out: folder of the cache.
      temperatures: 1 among them, in order.
      worker: makes its shards only.
      rows_per_call: of a forward pass, over the whole mesh; None: one for each device of the batch axes.
      rows_per_shard: of a file; None: as have room.
      command: that asks for it, without its worker.
      workdir: of a run that keeps tokenised examples; None: there is none.
    """

    out: str
    temperatures: tuple[float, ...]
    worker: Worker = Worker()
    rows_per_call: int | None = None
    rows_per_shard: int | None = None
    command: str = ""
    workdir: str | None = None


def cache_teacher(config: Config, request: Request, processes: Processes) -> None:
    """Makes what is missing of one worker's shards, and says so.

    Args:
      config: of the training that is to read them, validated; it names the teacher and top_k.
      processes: that take part, joined.

    Raises:
      UserError: data or teacher cannot be read, the folder holds another cache, or its disk has no room.
    """
    config, first = settled(config), processes.index == 0
    mesh = make_mesh(config)
    tokenizer = load_tokenizer(config.data.tokenizer, special_tokens=config.data.special_tokens)
    data = open_data(config, tokenizer, INPUTS | RECORD, request.workdir, progress=first)
    teacher = open_teacher(config, request.out, progress=first)
    assert teacher is not None  # validation wants one
    processes.agree("data files", {"what config.data reads": contents.digest(data.contents)})
    with jax.set_mesh(mesh):
        wanted = _manifest(config, request, data, teacher, mesh)
        if first:
            there = manifest.write(request.out, wanted)
            if what := there.difference(wanted):
                raise UserError(
                    f"--out={request.out} holds another cache: {what} of it. Name another folder, or ask for "
                    "what it has."
                )
            for line in _about(request, wanted, config):
                print(line, flush=True)
        compile_cache.use_cache(config.compile.cache_dir, warn=print if first else _nothing)
        placed = teacher.place(mesh)
        frozen = Frozen(placed, functools.partial(teacher.load, placed))
        top, words, rows = wanted.top, wanted.vocab_size, wanted.program["rows_per_call"]
        program = RecordProgram(
            frozen, top, words, wanted.length, mesh, rows, len(wanted.temperatures)
        )
        processes.agree("cache", {"manifest": wanted.to_bytes().decode()})
        program.compile()
        weights, started = frozen.load(), time.perf_counter()
        made = maker.make(request.out, wanted, data, program, weights, request.worker, first)
    if first:
        print(_end(request, wanted, made, time.perf_counter() - started))


def _nothing(text: str) -> None:
    pass


def _manifest(
    config: Config,
    request: Request,
    data: Loader | ExampleLoader,
    teacher: Teacher,
    mesh: jax.sharding.Mesh,
) -> Manifest:
    words = min(teacher.vocab_size, config.model.vocab_size)
    top, ways = config.distill.top_k, devices_of_batch(mesh)
    if not 0 < top <= words:
        raise UserError(
            f"--top-k={top} is not between 1 and the {words} words of the teacher and the student. Set "
            f"--top-k=64, or {words} for all of them."
        )
    rows = request.rows_per_call or ways
    if rows < 1 or rows % ways:
        raise UserError(
            f"--rows-per-call={rows} is not divisible by the {ways} devices of data x fsdp x expert. Set it "
            f"to a multiple of {ways}."
        )
    options = checks.options_of_rows(config, data)
    out = Manifest(
        top=top,
        temperatures=request.temperatures,
        vocab_size=words,
        teacher=teacher.identity,
        dtype=teacher.config.lora.base_dtype,
        program=_program(config, mesh, rows),
        options=options,
        contents=checks.contents_of_rows(data),
        train_rows=data.num_train_rows,
        eval_rows=data.num_eval_rows,
        rows_per_shard=rows,
        command=request.command,
    )
    of_shard = request.rows_per_shard or maker.rows_per_shard(out.rows, out.row_bytes, rows)
    if of_shard < 1 or of_shard % rows:
        raise UserError(
            f"--rows-per-shard={of_shard} is not a multiple of the {rows} rows of a forward pass. Set it to "
            f"{-(-max(of_shard, 1) // rows) * rows}."
        )
    return dataclasses.replace(out, rows_per_shard=of_shard)


def _program(config: Config, mesh: jax.sharding.Mesh, rows: int) -> dict[str, Any]:
    """What decides on the last bit of a record."""
    asked = config.moe.experts_implementation
    return {
        "rows_per_call": rows,
        "mesh": dict(mesh.shape),
        "platform": mesh.devices.flat[0].platform,
        "dtype": config.train.dtype,
        "attention": config.train.attention,
        "capacity_factor": config.moe.capacity_factor,
        "strategy": config.sharding.strategy,
        # Records from before there was this option are of `auto`.
        **({} if asked == "auto" else {"experts_implementation": asked}),
    }


def _about(request: Request, wanted: Manifest, config: Config) -> list[str]:
    mine = request.worker.shards(wanted)
    gone = set(shards.missing(request.out, wanted))
    done = sum(i not in gone for i in mine)
    lines = [*describe(wanted), f"{'disk':<15}{maker.check_room(request.out, wanted)}"]
    of = f"{request.worker.number} of {request.worker.workers}"
    lines.append(f"{'worker':<15}{of}: {plural(len(mine), 'shard')}, {done} of them there already")
    at = config.distill.temperature
    if at not in wanted.temperatures:
        every = ",".join(f"{t:g}" for t in sorted({*wanted.temperatures, at}))
        lines.append(
            f"{'note':<15}training with config.distill.temperature={at:g}, which these options have, cannot "
            f"read it: that needs --temperatures={every}"
        )
    return lines


def _end(request: Request, wanted: Manifest, made: int, seconds: float) -> str:
    gone = len(shards.missing(request.out, wanted))
    rest = (
        f"; {gone} of {wanted.shards} shards are still to come" if gone else ", which is complete"
    )
    speed = f" at {human(made / seconds)} tokens per second" if made else ""
    return f"{'wrote':<15}{human(made)} tokens{speed} to {request.out}{rest}"
