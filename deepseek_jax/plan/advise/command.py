"""Which mesh, strategy and memory levers to run a config with, decided by numbers and explained.

  python -m deepseek_jax.plan advise --config=configs/v2_lite.py --devices=64
  python -m deepseek_jax.plan advise --config=configs/v3.py --devices=2048 --hardware=h100 --top=5
  python -m deepseek_jax.plan advise --config=configs/v3.py --devices=512 \\
    --hardware=capacity=120e9,bf16=600e12,memory=3e12,link=200e9,network=50e9

Tries every valid mesh, sharding strategy, dispatch method, number of micro-batches, what is kept for backward
and what is offloaded; batch, model and optimizer stay the config's. What does not fit a device is left out.
The rest is estimated by arithmetic; the best few are compiled for the devices, which need not be here, and
predicted from their programs: a minute or so each, with JAX's GPU compiler (make advise installs it). Without
it the ranking is by arithmetic alone. --hardware=cpu measures this machine, where --rates does not say it.

Prints a ranked table, for each of the best a command line and a sentence why, and what the rules of thumb of
guides to FSDP and DeepSpeed would have chosen. Any option of train.py can follow; those that a plan
sets are replaced. Exit codes: 0; 2 a mistake in the options, or nothing fits: the line says what would.
"""

import json
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.cli import arguments
from deepseek_jax.cluster.gpus import memory_fraction
from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.plan import options, rates, skew, topology
from deepseek_jax.plan.advise import advice, candidates, hardware, search, text
from deepseek_jax.plan.advise.programs import Compiler
from deepseek_jax.plan.advise.weights import Weights
from deepseek_jax.plan.tune.changes import with_options
from deepseek_jax.run import commandline

MOST_DEVICES = 2**20  # of which a suggestion is looked for
CALIBRATION = 20.0  # seconds
CPU = topology.Hardware("CPU device", None, "")


def main(argv: list[str]) -> int:
    """Runs the command. Returns its exit code.

    Raises:
      UserError: a mistake in the options, or nothing fits.
    """
    parser = options.Parser(
        __doc__, further=lambda: commandline.help_text(commandline.define_flags())
    )
    parser.add_argument("--devices", type=int, help="Devices in all.")
    parser.add_argument("--gpus_per_host", type=int, default=8, help="Devices of one host.")
    names = ", ".join(hardware.NAMES)
    parser.add_argument(
        "--hardware", default="h200", help=f"What to plan for: {names}, or numbers (see above)."
    )
    parser.add_argument("--skew", default="zipf", help="As of plan: zipf, or a max_violation.")
    parser.add_argument("--rates", default="", help="Derated rates, NAME=NUMBER,... or a file.")
    parser.add_argument(
        "--compile", type=arguments.whole(0), default=3, help="Plans to compile; 0: none."
    )
    parser.add_argument(
        "--seconds",
        type=arguments.number(above=0),
        default=240.0,  # with the search of the largest config here, five minutes
        help="Of compiling: no plan is begun that would not be done by then, and none goes on after.",
    )
    parser.add_argument("--top", type=arguments.whole(1), default=10, help="Plans to print.")
    # On the CPU: an advisor must not take the memory of a GPU that is at work.
    jax.config.update("jax_platforms", "cpu")
    own, config = options.read(parser, argv)
    topology.check_cluster(own.devices, own.gpus_per_host)
    if own.hardware == "cpu":
        known = _this_machine(own.devices, own.rates)
    else:
        known = hardware.find(own.hardware, own.rates)
    skew.rounds_at(own.skew, config, dict.fromkeys(candidates.AXES, 1))
    _, given = parser.parse_known_args(argv)

    def flags_of(plan: search.Plan) -> list[str]:
        return candidates.flags(config, given, plan.choice)

    def command(plan: search.Plan) -> str:
        return shlex.join(["python", "train.py", *flags_of(plan)])

    result = _advise(own, config, known, flags_of)
    if own.json:
        print(json.dumps(advice.as_dict(result, command), indent=2))
    else:
        print(text.text(result, command, own.top))
    return 0


def _advise(
    own: Any,
    config: Config,
    known: hardware.Known,
    flags_of: Callable[[search.Plan], list[str]],
) -> advice.Advice:
    room = known.hardware.memory
    room = room and int(room * memory_fraction(own.devices > 1))
    machine = search.Machine(
        own.devices, own.gpus_per_host, room, known.speed.derated, known.key != "cpu"
    )
    one = alone(config)
    _, layout = topology.lay_out(one, topology.cpu_devices(1))
    weights = Weights(one, layout)
    print(f"trying the plans of {own.devices} devices ...", file=sys.stderr)
    try:
        found = search.enumerate_plans(config, weights, machine, own.skew)
    except candidates.Refused as e:
        raise UserError(f"no mesh of {own.devices} devices is valid for this config: {e}") from None
    if not found.plans:
        raise UserError(_nothing_fits(own, config, weights, machine, found.smallest))
    missing = ""
    most = own.compile
    if most and own.hardware != "cpu" and not topology.has_gpu_compiler():
        most = 0
        missing = f"JAX's GPU compiler is missing: make advise, or {topology.INSTALL}"
    compiler = Compiler(known, machine, own.skew, flags_of, own.seconds)

    late = False

    def compiled(plan: search.Plan) -> search.Compiled | str | None:
        nonlocal late
        print(f"compiling {text.named(plan.choice)} ...", file=sys.stderr)
        result = compiler(plan)
        late = result is None
        return result

    ranked = search.rank(found.plans, machine, compiled, most, own.seconds)
    if late:
        missing = (
            f"A plan was not compiled within --seconds={own.seconds:.0f}: set more to wait for it"
        )
    if not ranked.plans:
        raise UserError(
            f"what fits by arithmetic does not as compiled: {ranked.refused[-1][1]} "
            "Set --compile=0 to see the estimates, or more --devices."
        )
    baseline = advice.baseline(config, weights, machine, own.skew)
    return advice.Advice(
        config=config,
        known=known,
        machine=machine,
        flops_per_token=topology.count_of(config, layout).flops_per_token,
        parameters=topology.count_of(config, layout).total,
        skew=own.skew,
        tried=found.tried,
        every=found.plans,
        ranked=ranked,
        baseline=baseline,
        missing=missing,
    )


def alone(config: Config) -> Config:
    """The config on one device, for shapes."""
    changes: dict[str, Any] = {f"mesh.{axis}": 1 for axis in candidates.AXES}
    changes |= {"sharding.strategy": "no_shard", "sharding.gradient_compression": "none"}
    return with_options(config, changes | {"sharding.virtual_stages": 0})


def _nothing_fits(
    own: Any,
    config: Config,
    weights: Weights,
    machine: search.Machine,
    smallest: search.Plan,
) -> str:
    """What is said where nothing fits, with the fewest devices that would do."""
    said = text.does_not_fit(own.devices, machine, smallest)
    devices = own.devices
    while devices < MOST_DEVICES:
        devices *= 2
        try:
            more = search.enumerate_plans(
                config, weights, machine._replace(devices=devices), own.skew
            )
        except candidates.Refused:
            continue
        if more.plans:
            fits = min(more.plans, key=lambda p: p.bytes)
            return f"{said} With --devices={devices} it would: {text.sized(fits)}."
        if more.smallest.bytes > 0.95 * smallest.bytes:
            break  # more devices do not make it smaller
        smallest = more.smallest
    return f"{said} More devices do not help: set a shorter train.sequence_length or a larger --hardware."


def _this_machine(devices: int, given: str) -> hardware.Known:
    """CPU devices of this process, measured where no rates are given."""
    if given:
        return hardware.Known("cpu", CPU, rates.speed_of("cpu", given, devices), "")
    # here: what measures imports what makes programs
    from deepseek_jax.plan.calibrate.measure import measure

    here = topology.cpu_devices(devices)
    print(f"measuring this machine, for about {CALIBRATION:.0f} s ...", file=sys.stderr)
    return hardware.Known("cpu", CPU, measure(here, CALIBRATION), "")
