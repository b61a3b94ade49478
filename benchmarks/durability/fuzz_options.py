"""Random options that validation accepts: every one of them must make a train step (make fuzz-options).

  python -m benchmarks fuzz_options [--count=150] [--seed=0] [--seconds=1800] [--compiled=10] [--case=N]

Draws the sections model, moe, sharding, train, optimizer, fp16, offload and mesh, on up to eight
CPU devices (random_options.py). A set that validation or the mesh refuses, by one line, is drawn
again. Of every other the train step and the step of the evaluation are traced and lowered; of every
tenth (--compiled) both are compiled and run, with a sample and, where generation serves the mesh,
two answers; the loss must be a number. Anything that raises is a failure. Prints each failure with
its seed and case, so that --case=N repeats it alone, then what was refused how often; exit code 1
if anything failed, or if there was no time for all.
"""

import collections
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.durability.random_options import DEVICES, differing, draw
from deepseek_jax import objectives
from deepseek_jax.config.options import Config
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.inference.generation import sample
from deepseek_jax.inference.generation.bound import BoundModel
from deepseek_jax.inference.generation.engine import Engine
from deepseek_jax.inference.generation.sampling import Sampling
from deepseek_jax.parallel.mesh import AXES, TOKENS, make_mesh
from deepseek_jax.plan import options
from deepseek_jax.runtime.threads import enough_threads
from deepseek_jax.train import state, step
from deepseek_jax.train.batch import abstract_batch, put_batch
from deepseek_jax.train.optimizer import sequences_at

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Result(NamedTuple):
    """What became of the sets that were drawn."""

    traced: int
    compiled: int
    refused: collections.Counter[str]  # by the option that the message begins with
    failures: list[str]


def run(
    count: int,
    seed: int,
    seconds: float,
    compiled: int,
    note: Callable[[str], None] = lambda line: None,
    first: int = 0,
) -> Result:
    """Tries `count` sets that validation accepts, or as many as `seconds` are enough for.

    Args:
      compiled: one in this many accepted sets is compiled and run as well; 0: none.
      note: called with the progress, a line each.
      first: number of the first case.
    """
    until = time.monotonic() + seconds
    traced = 0
    ran = 0
    refused: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    case = first - 1
    while traced + len(failures) < count and time.monotonic() <= until:
        case += 1
        config = draw(seed, case)
        try:
            mesh = accepted(config)
        except UserError as error:
            if "\n" in str(error):
                failures.append(f"seed {seed}, case {case}: refused in more than one line: {error}")
            refused[str(error).split("=")[0].split(" ")[0]] += 1
            continue
        try:
            whole = compiled and (traced + len(failures)) % compiled == compiled - 1
            (run_small if whole else trace)(config, mesh)
            traced, ran = traced + 1, ran + bool(whole)
        except Exception as error:
            last = [
                f for f in traceback.extract_tb(error.__traceback__) if "deepseek_jax" in f.filename
            ][-1:]
            where = "".join(f" in {f.name}, line {f.lineno} of {f.filename}" for f in last)
            failures.append(
                f"seed {seed}, case {case}{where}: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:400]}\n  {differing(config)}"
            )
        finally:
            jax.clear_caches()
        note(
            f"case {case}: {traced} traced, {ran} of them run, {sum(refused.values())} refused, "
            f"{len(failures)} failures"
        )
    return Result(traced, ran, refused, failures)


def accepted(config: Config) -> jax.sharding.Mesh:
    """The mesh of a config that validation accepts.

    Raises:
      UserError: validation or the mesh refuses it.
    """
    validate(config)
    size = int(np.prod([getattr(config.mesh, axis) for axis in AXES]))
    return make_mesh(config, jax.devices()[:size])


def lowered(config: Config, mesh: jax.sharding.Mesh, layout: state.Layout) -> tuple[Any, Any]:
    """The train step and the step of the evaluation, traced and lowered."""
    batch, abstract = (
        abstract_batch(objectives.make(config).fields, config, mesh, config.train.batch_ramp_steps),
        layout.abstract_sharded(),
    )
    of_step = jax.jit(
        step.make_train_step(config, layout, objectives.make(config)), donate_argnums=0
    ).lower(abstract, batch)
    one = jax.NamedSharding(mesh, TOKENS)
    micro = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype, sharding=one), batch)
    return of_step, jax.jit(step.make_eval_step(layout, objectives.make(config))).lower(
        abstract.params, abstract.bias, micro
    )


def trace(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises what tracing raises."""
    with jax.set_mesh(mesh):
        lowered(config, mesh, state.make_layout(config, mesh))


def run_small(config: Config, mesh: jax.sharding.Mesh) -> None:
    """A step, an evaluation, a sample and two answers.

    Raises what any of them raises, and FloatingPointError for a loss that is no number.
    """
    t, m = config.train, config.model
    with jax.set_mesh(mesh):
        layout = state.make_layout(config, mesh)
        train_step, eval_step = (program.compile() for program in lowered(config, mesh, layout))
        rng = np.random.default_rng(0)
        rows = sequences_at(config, t.batch_ramp_steps)
        text = rng.integers(0, m.vocab_size, (rows, t.sequence_length + 1), np.int32)
        place = np.broadcast_to(
            np.arange(t.sequence_length, dtype=np.int32), (rows, t.sequence_length)
        )
        batch = {
            "tokens": text[:, :-1],
            "targets": text[:, 1:],
            "segment_ids": np.ones_like(place),
            "positions": place,
            "next_tokens": text[:, 1:],
        }
        held, metrics = train_step(
            state.init_state(config, layout), put_batch(batch, config.micro_batch, mesh)
        )
        one = jax.NamedSharding(mesh, TOKENS)
        micro = {name: jax.device_put(a[: config.micro_batch], one) for name, a in batch.items()}
        found = float(metrics.loss), float(eval_step(*held.weights(), micro)["nll"])
        if not np.isfinite(found).all():
            raise FloatingPointError(f"losses {found}")
        prompt = text[0, :1].tolist()
        weights = held.weights()
        placed = BoundModel(layout.model, weights.params, weights.bias, mesh)
        list(sample.tokens(placed, prompt, 2, Sampling(), m.vocab_size, ()))
    if mesh.shape["stage"] == 1 and not config.offload.parameters:
        drafts = min(1, m.num_nextn_predict_layers)
        Engine(placed).generate([prompt, text[-1].tolist()], 2, draft_tokens=drafts)


def main() -> int:
    parser = options.Parser(__doc__, json=False)
    parser.add_argument("--count", type=int, default=150, help="Sets that validation accepts.")
    parser.add_argument("--seed", type=int, default=0, help="Of the sets.")
    parser.add_argument(
        "--seconds", type=float, default=1800.0, help="Ends after so long, however many there were."
    )
    parser.add_argument(
        "--compiled",
        type=int,
        default=10,
        help="Of so many sets one is compiled and run as well; 0: none.",
    )
    parser.add_argument("--case", type=int, default=None, help="One case alone, compiled and run.")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    enough_threads(DEVICES)
    # Compiling is most of the work: LLVM optimises less. XLA's passes and the partitioning are as ever.
    os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()

    def note(line):
        return print(line, file=sys.stderr, flush=True)

    if args.case is not None:
        config = draw(args.seed, args.case)
        print(differing(config))
        run_small(config, accepted(config))
        return 0
    result = run(args.count, args.seed, args.seconds, args.compiled, note)
    refused = [f"  {n:5} {option}" for option, n in result.refused.most_common()]
    print(
        "\n".join(
            [
                *result.failures,
                "refused by",
                *refused,
                f"{result.traced} traced, {result.compiled} of them compiled and run, "
                f"{sum(result.refused.values())} refused, {len(result.failures)} failures",
            ]
        )
    )
    return int(bool(result.failures) or result.traced < args.count)
