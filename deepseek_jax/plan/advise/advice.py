"""What an advisor found: the ranked plans, the config as it was given beside them, and the guides' rules."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from deepseek_jax.config.options import Config
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import AXES, check_model, shape_of
from deepseek_jax.plan import topology
from deepseek_jax.plan.advise import candidates, guides, search
from deepseek_jax.plan.advise.candidates import Choice
from deepseek_jax.plan.advise.hardware import Known
from deepseek_jax.plan.advise.weights import Weights


@dataclasses.dataclass(frozen=True)
class Advice:
    """Attributes:
    config: as it was given.
    known: the hardware. machine: how many of it.
    flops_per_token: of the model, forward and backward. parameters: of it.
    skew: as given.
    tried: plans that were estimated.
    every: plans that fit, in no order. ranked: the same in order, with what was compiled.
    baseline: the config as it was given; a text where it does not run on so many devices.
    missing: why nothing was compiled; "".
    """

    config: Config
    known: Known
    machine: search.Machine
    flops_per_token: float
    parameters: int
    skew: str
    tried: int
    every: list[search.Plan]
    ranked: search.Ranked
    baseline: search.Plan | str
    missing: str

    @property
    def best(self) -> search.Plan:
        """The first choice."""
        return self.ranked.plans[0]

    def seconds(self, plan: search.Plan) -> float:
        """Of a step."""
        return self.ranked.corrections.seconds(plan)

    def size(self, plan: search.Plan) -> int:
        """Bytes of a device."""
        return self.ranked.corrections.size(plan)

    def parts(self, plan: search.Plan) -> dict[str, float]:
        """Seconds of a step by estimate.PARTS."""
        if plan.compiled is not None:
            return plan.compiled.parts
        factors = self.ranked.corrections.factors
        return {part: factors[part] * s for part, s in plan.estimate.parts.items()}

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.train.batch_size * self.config.train.sequence_length

    def mfu(self, plan: search.Plan) -> float:
        """Share of the devices' peak."""
        flops = self.flops_per_token * self.tokens / self.machine.devices
        peak = self.known.speed.ideal
        rate = peak.f32 if self.config.train.dtype == "float32" else peak.bf16
        return flops / self.seconds(plan) / rate

    def rules(self) -> list[tuple[guides.Rule, search.Plan | None]]:
        """The guides' rules, and the quickest plan that follows each; None: none fits."""
        hosts = topology.hosts_of(self.machine.devices, self.machine.gpus_per_host)
        no_offload = [p for p in self.every if not p.choice.offload]
        whole = any(p.choice.strategy in ("shard_grad_op", "no_shard") for p in no_offload)
        divided = any(p.choice.strategy == "full_shard" for p in no_offload)
        found = guides.rules(self.parameters, hosts, whole, divided)
        return [(rule, self._quickest(rule.allows)) for rule in found]

    def _quickest(self, allows: Callable[[Choice], bool]) -> search.Plan | None:
        return next((p for p in self.ranked.plans if allows(p.choice)), None)


def baseline(
    config: Config, weights: Weights, machine: search.Machine, skew: str
) -> search.Plan | str:
    """The plan that a config is, with train.remat=auto as the quickest that fits; a text where its mesh does
    not fit so many devices."""
    try:
        shape = shape_of(config, machine.devices)
        check_model(config, shape)
    except UserError as e:
        return str(e)
    offload = [n for n in ("optimizer_state", "parameters") if getattr(config.offload, n)]
    choice = Choice(
        tuple(shape[axis] for axis in AXES),
        config.sharding.canonical,
        config.train.accumulation,
        config.moe.dispatch,
        config.train.remat,
        tuple(offload),
    )
    tried = [choice]
    if config.train.remat == "auto":
        tried = [c for c in candidates.levers(config, choice) if c.offload == choice.offload]
    plans = [
        search.one_plan(candidates.configured(config, c), c, weights, machine, skew) for c in tried
    ]
    room = machine.room or math.inf
    fitting = [p for p in plans if p.bytes <= room] or [min(plans, key=lambda p: p.bytes)]
    return min(fitting, key=lambda p: p.estimate.seconds)


def as_dict(advice: Advice, command: Callable[[search.Plan], str]) -> dict[str, Any]:
    """All of it, for --json."""

    def plan(p: search.Plan) -> dict[str, Any]:
        out: dict[str, Any] = {
            "options": p.choice.options(),
            "command": command(p),
            "compiled": p.compiled is not None,
            "step_s": advice.seconds(p),
            "tokens_per_s": advice.tokens / advice.seconds(p),
            "mfu": advice.mfu(p),
            "bytes": advice.size(p),
            "state_bytes": p.state,
            "rounds": p.rounds,
            "bubble_share": p.estimate.bubble,
            "parts": advice.parts(p),
            "estimated": {
                "parts": p.estimate.parts,
                "received": p.estimate.received,
                "bytes": p.bytes,
            },
        }
        if p.compiled is not None:
            out["plan"] = p.compiled.details
            out["compile_s"] = p.compiled.seconds
        return out

    hardware = advice.known.hardware
    return {
        "devices": advice.machine.devices,
        "hardware": hardware.name,
        "stands_in": advice.known.stands_in,
        "memory": hardware.memory,
        "room": advice.machine.room,
        "skew": advice.skew,
        "rates": advice.known.speed.derated._asdict(),
        "reasons": advice.known.speed.reasons,
        "tried": advice.tried,
        "fit": len(advice.every),
        "corrections": advice.ranked.corrections.factors,
        "missing": advice.missing,
        "plans": [plan(p) for p in advice.ranked.plans],
        "refused": [
            {"options": p.choice.options(), "why": why} for p, why in advice.ranked.refused
        ],
        "baseline": advice.baseline if isinstance(advice.baseline, str) else plan(advice.baseline),
        "guides": [
            {"asks": r.asks, "says": r.says, "plan": None if p is None else p.choice.options()}
            for r, p in advice.rules()
        ],
    }


def differences(
    advice: Advice, plan: search.Plan, other: search.Plan
) -> Iterable[tuple[str, float]]:
    """Seconds by which the parts of a plan's step are longer than another's, the largest first."""
    mine, theirs = advice.parts(plan), advice.parts(other)
    found = ((part, mine[part] - theirs[part]) for part in mine)
    return sorted(found, key=lambda item: -abs(item[1]))
