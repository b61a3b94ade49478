"""What the training loop costs beside the device program: data, batches to the device, metrics, logging, the start of a checkpoint.

  python -m benchmarks overhead [--config=configs/tiny.py] [--rounds=12] [--steps=4] [--json] [--config.KEY=...]

Runs the loop of train.py (train.loop.run) with the real step, a metrics row every step and a checkpoint in the middle, and the bare
compiled step with a batch that is on the device already, called back to back; in turns, `rounds` times `steps` steps each, after one
of each. Printed: the median over rounds of the seconds a step of both, and of their ratio in a round. Without a --config: configs/tiny.py
with 32 sequences a step, about a second on 2 cores. On a machine with other work rounds differ by more than the overhead: take more.
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import jax

from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.compilation import CompiledStep, use_cache
from deepseek_jax.config import Config
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.model.count import count
from deepseek_jax.parallel import prefetch
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan import options
from deepseek_jax.train import loop
from deepseek_jax.train.state import TrainState, init_state, make_layout
from deepseek_jax.train.step import make_train_step, put_batch


def main() -> int:
    parser = options.Parser()
    parser.add_argument("--rounds", type=int, default=12, help="How often each of the two is timed, after a first time.")
    parser.add_argument("--steps", type=int, default=4, help="Steps of each, a round; a checkpoint starts in the middle.")
    if {"--help", "-h"} & set(sys.argv):
        print(f"{__doc__}\nFlags:\n{parser.describe()}\n")
        return 0
    arguments = sys.argv[1:]
    if not any(a.startswith("--config=") for a in arguments):
        arguments = ["--config.train.batch_size=32", *arguments]
    own, config = options.read(parser, arguments, "configs/tiny.py")
    result = measure(config, max(own.rounds, 1), max(own.steps, 2))
    print(json.dumps(result, indent=2) if own.json else text(result))
    return 0


class Timed:
    """A step that notes when it is called, to be handed to the loop."""

    def __init__(self, step: CompiledStep):
        self._step, self.calls = step, []

    def __call__(self, state: TrainState, batch: Any) -> Any:
        self.calls.append(time.perf_counter())
        return self._step(state, batch)


def measure(config: Config, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds a step in the loop and without it, by round."""
    use_cache(config.compile.cache_dir, warn=lambda line: print(line, file=sys.stderr))
    mesh = make_mesh(config)
    loader = Loader(config, load_tokenizer(config.data.tokenizer))
    bare, in_loop = [], []
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as workdir:
        layout = make_layout(config, mesh)
        sizes = count(config.model, layout.abstract.params, config.train.sequence_length)
        xla = prefetch.xla_options(config, mesh.devices.flat[0].platform, prefetch.bytes_of_a_layer(config, layout.abstract.params, mesh))
        step = CompiledStep(make_train_step(config, layout), mesh, xla)
        state = init_state(config, layout)
        batch = put_batch(loader.train_rows(0, config.train.batch_size), config.micro_batch, mesh)
        checkpoints = Checkpointer(os.path.join(workdir, "checkpoints"), keep=1)
        for number in range(rounds + 1):
            print("compiling and a first round ..." if number == 0 else f"round {number} of {rounds} ...", file=sys.stderr)
            state, seconds = _bare(step, state, batch, steps)
            state, seconds_in_loop = _loop(config, workdir, mesh, state, step, loader, checkpoints, sizes, steps)
            if number:
                bare.append(seconds)
                in_loop.append(seconds_in_loop)
        checkpoints.close()
    return {"step_s": statistics.median(bare), "loop_step_s": statistics.median(in_loop),
            "overhead": statistics.median(b / a for a, b in zip(bare, in_loop)) - 1,
            "rounds": [{"step_s": a, "loop_step_s": b} for a, b in zip(bare, in_loop)], "steps": steps,
            "tokens": config.train.batch_size * config.train.sequence_length, "device": jax.devices()[0].device_kind}


def _bare(step: CompiledStep, state: TrainState, batch: Any, steps: int) -> tuple[TrainState, float]:
    state, _ = jax.block_until_ready(step(state, batch))
    started = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return state, (time.perf_counter() - started) / steps


def _loop(config: Config, workdir: str, mesh: jax.sharding.Mesh, state: TrainState, step: CompiledStep, loader: Loader,
          checkpoints: Checkpointer, sizes: Any, steps: int) -> tuple[TrainState, float]:
    """`steps` steps of the loop, after a first one; from one call of the step to the next."""
    first, timed = int(state.step), Timed(step)
    # The loop is told where to stop; the compiled step has its own copy of the options.
    until = dataclasses.replace(config.train, steps=first + steps + 2)
    checkpoint = dataclasses.replace(config.checkpoint, every_steps=first + steps // 2 + 1)
    config = dataclasses.replace(config, train=until, checkpoint=checkpoint, eval=dataclasses.replace(config.eval, every_steps=0),
                                 log=dataclasses.replace(config.log, every_steps=1))
    with open(os.devnull, "w") as quiet:
        before, sys.stdout = sys.stdout, quiet
        try:
            result = loop.run(config, workdir, mesh, state, timed, lambda state, _: {}, loader, checkpoints, sizes)
        finally:
            sys.stdout = before
    # The first call fills the pipeline, and the last step waits for its checkpoint.
    return result.state, (timed.calls[-1] - timed.calls[1]) / steps


def text(result: dict[str, Any]) -> str:
    rows = [f"  {r['step_s'] * 1e3:9.1f} ms bare   {r['loop_step_s'] * 1e3:9.1f} ms in the loop   {r['loop_step_s'] / r['step_s'] - 1:+.1%}"
            for r in result["rounds"]]
    return (f"a step of {result['tokens']} tokens on {result['device']}, {result['steps']} steps a round\n" + "\n".join(rows) +
            f"\nmedian {result['step_s'] * 1e3:.1f} ms bare, {result['loop_step_s'] * 1e3:.1f} ms in the loop: overhead {result['overhead']:+.1%}")
