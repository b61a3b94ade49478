"""The time of a step by arithmetic: FLOPs, bytes of memory and bytes of collectives at the rates of a device.

Quick enough for tens of thousands of plans and right enough to say which few are worth compiling: those are
predicted from their programs (plan/roofline.py), and by how much the parts of these differ from here corrects
the rest (search.py). Constants were read off V2-Lite's steps as compiled for H200s
(benchmarks/results/roofline_v2_lite.json).

T tokens of a device in a micro-batch, D hidden_size, K experts per token, X devices of the expert axis.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from deepseek_jax.config.options import Config
from deepseek_jax.parallel.mesh import AXES, TOKEN_AXES
from deepseek_jax.parallel.pipeline import make_schedule
from deepseek_jax.parallel.xla_options import ITEM_BYTES
from deepseek_jax.plan import exchange
from deepseek_jax.plan.advise.candidates import Choice, kept_names
from deepseek_jax.plan.advise.weights import Divided
from deepseek_jax.plan.rates import Rates
from deepseek_jax.plan.timeline import seconds_of_collective

# Parts of a step's time, as compared with a compiled one.
PARTS = (
    "attention",
    "mlp",
    "experts",
    "routing",
    "loss",
    "elementwise",
    "optimizer",
    "collectives",
)
# Bytes of memory traffic for each causal score and head, where scores are written in blocks.
SCORE_FORWARD = 32
SCORE_BACKWARD = 44
FUSED = ("mosaic", "triton", "cudnn")  # attention that writes none
# Times that the rows of experts are read or written by what brings them there and back, both passes.
ROW_PASSES = {"grouped": 11, "places": 19}
# Times that a layer's activations [T, D] are, by norms, residual sums and copies.
LAYER_PASSES = 30
WEIGHT_PASSES = 4  # times that gathered weights are copied in a micro-batch
UPDATE_BYTES = (
    20  # of AdamW for each number, its moments left out: weight, gradient, new weight, and a norm
)
UPDATE_OPERATIONS = 16  # of AdamW for each number, where operations outside products have a rate
KERNELS = 120  # of a layer in a micro-batch, all passes
# The share of a collective's time in which no kernel runs.
EXPOSED = {"weights": 0.85, "gradients": 0.85, "tokens": 0.6, "tensor": 1.0, "stages": 1.0}


class Estimate(NamedTuple):
    """One plan's step.

    Attributes:
      parts: seconds by PARTS, idle time of a pipeline among them, in every part alike.
      received: bytes that a device receives in collectives, by what they are of: the keys of EXPOSED.
      bubble: share of the time that stages idle.
    """

    parts: dict[str, float]
    received: dict[str, float]
    bubble: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.parts.values())


class Work:
    """What the step of a plan does, but for what levers change.

    Args:
      config: with the plan's mesh, strategy, micro-batches and dispatch.
      shape: of its mesh.
      divided: what mesh and strategy make of the weights.
      rounds: of the dispatch.
      gpus_per_host: that consecutive devices share.
      on_gpu: whether the devices are GPUs.
    """

    def __init__(
        self,
        config: Config,
        shape: Mapping[str, int],
        divided: Divided,
        rounds: int,
        gpus_per_host: int,
        on_gpu: bool = True,
    ) -> None:
        self.config, self.shape, self.divided = config, shape, divided
        m = config.model
        self.rounds = rounds
        self.item = ITEM_BYTES[config.train.dtype]
        self.layers = m.num_hidden_layers + m.num_nextn_predict_layers
        self.moe_layers = self.layers - m.first_k_dense_replace if m.has_experts else 0
        tokens = config.micro_batch * config.train.sequence_length
        self.tokens = tokens // math.prod(shape[a] for a in TOKEN_AXES)
        self.buffers = exchange.buffers(config, dict(shape))
        self._share = share_a_host(shape, gpus_per_host)
        self._rows = 0  # that the device's experts compute in a layer
        if self.buffers is not None:
            turns = self.rounds if self.buffers.places else 1
            if config.moe.dispatch == "ring":
                turns *= shape["expert"]  # its buffers are those of one device's tokens
            self._rows = turns * self.buffers.expert_rows
            if not on_gpu and not self.buffers.places:  # no whole blocks of 128 rows there
                self._rows = self.tokens * m.num_experts_per_tok
        stages = shape["stage"]
        self.bubble = make_schedule(config, stages).bubble_share if stages > 1 else 0.0

    def with_levers(self, choice: Choice, rates: Rates) -> Estimate:
        """At what a plan keeps for backward and offloads."""
        remat = choice.remat
        kept = frozenset(kept_names(remat))
        again = remat != "none"
        accumulation = self.config.train.accumulation / self.shape["stage"] / (1 - self.bubble)
        micro = {
            "attention": self._attention(rates, again, kept),
            "mlp": self._mlp(rates, again and "mlp_gate_up" not in kept),
            "experts": self._experts(rates, again and "experts_hidden" not in kept),
            "routing": self._routing(rates),
            "loss": self._loss(rates),
            "elementwise": self._elementwise(rates, again),
        }
        parts = {name: accumulation * seconds for name, seconds in micro.items()}
        received, seconds = self._collectives(rates, again, again and "exchange" not in kept)
        parts["optimizer"] = self._optimizer(rates)
        parts["collectives"] = seconds
        parts["optimizer"] += self._offloaded(choice.offload, rates)
        return Estimate(parts, received, self.bubble)

    def _products(self, rates: Rates) -> float:
        """FLOP/s of matrix products."""
        return rates.f32 if self.item == 4 else rates.bf16

    def _multiply(self, part: str, rates: Rates) -> float:
        """Seconds of a part's products with weights, forward."""
        return 2 * self.tokens * self.divided.used.get(part, 0) / self._products(rates)

    def _attention(self, rates: Rates, again: bool, kept: frozenset[str]) -> float:
        m, t = self.config.model, self.config.train
        latent, inner, output = (
            self._multiply(p, rates) for p in ("latent", "attention", "output")
        )
        heads = m.num_attention_heads // self.shape["tensor"]
        scores = self.tokens * t.sequence_length / 2 * heads * self.layers
        flops = 2 * scores * (m.qk_head_dim + m.value_head_dim)
        # Backward makes the scores again, and four products more.
        ahead, back = flops / self._products(rates), 2.5 * flops / self._products(rates)
        if t.attention in FUSED:
            ahead, back = flops / rates.attention_forward, 2.5 * flops / rates.attention_backward
        else:
            ahead = max(ahead, SCORE_FORWARD * scores / rates.memory)
            back = max(back, SCORE_BACKWARD * scores / rates.memory)
        seconds = 3 * (latent + inner + output) + ahead + back
        if again:
            seconds += inner + (0 if "mla_latent" in kept else latent)
            seconds += 0 if "attention" in kept else ahead
        return seconds

    def _mlp(self, rates: Rates, again: bool) -> float:
        return self._multiply("mlp", rates) * (3 + (2 / 3 if again else 0))

    def _experts(self, rates: Rates, again: bool) -> float:
        if self.buffers is None:
            return 0.0
        m, x = self.config.model, self.shape["expert"]
        width = m.moe_intermediate_size // self.shape["tensor"]
        rows = self._rows
        weights = m.n_routed_experts // x * 3 * m.hidden_size * width
        grouped = not self.buffers.places
        rate = rates.f32 if self.item == 4 else rates.grouped if grouped else rates.bf16
        # times that their weights are read
        turns = rows / self.buffers.expert_rows if self.buffers.places else 1
        flops = 6 * rows * m.hidden_size * width / rate
        moved = (
            (turns * weights + rows * (2 * m.hidden_size + 4 * width)) * self.item / rates.memory
        )
        gradients = turns * 4 * weights / rates.memory
        ahead, back = max(flops, moved), max(2 * flops, 2 * moved + gradients)
        return self.moe_layers * (ahead + back + (2 / 3 * ahead if again else 0))

    def _routing(self, rates: Rates) -> float:
        if self.buffers is None:
            return 0.0
        passes = ROW_PASSES["places" if self.buffers.places else "grouped"]
        moved = passes * self._rows * self.config.model.hidden_size * self.item / rates.memory
        return self.moe_layers * moved + 3 * self._multiply("router", rates)

    def _loss(self, rates: Rates) -> float:
        m = self.config.model
        head = (
            self.divided.used.get("head", 0) or m.vocab_size * m.hidden_size / self.shape["tensor"]
        )
        flops = 6 * self.tokens * head / self._products(rates)
        logits = 4 * self.tokens * m.vocab_size / self.shape["tensor"]
        return (1 + m.num_nextn_predict_layers) * (flops + 3 * logits / rates.memory)

    def _elementwise(self, rates: Rates, again: bool) -> float:
        passes = LAYER_PASSES + (LAYER_PASSES / 3 if again else 0)
        rows = passes * self.layers * self.tokens * self.config.model.hidden_size * self.item
        weights = WEIGHT_PASSES * sum(self.divided.gathered.values()) * self.item
        seconds = (rows + weights) / rates.memory + KERNELS * self.layers * rates.launch
        return seconds + (rows / self.item / rates.vector if rates.vector else 0.0)

    def _optimizer(self, rates: Rates) -> float:
        moments = self.divided.stored["optimizer"]
        held = self.divided.held
        summed = 12 * held if self.config.train.accumulation > 1 else 0
        cast = (
            self.divided.stored.get("parameters", 0) * (4 + self.item) / 4 if self.item == 2 else 0
        )
        moved = (UPDATE_BYTES * held + 2 * moments + summed + cast) / rates.memory
        return moved + (UPDATE_OPERATIONS * held / rates.vector if rates.vector else 0.0)

    def _offloaded(self, offload: tuple[str, ...], rates: Rates) -> float:
        """Copies between a device and its host that nothing hides."""
        stored, t = self.divided.stored, self.config.train
        moved = 0.0
        if "optimizer_state" in offload:
            moved += 2 * stored["optimizer"]  # there and back
        if "parameters" in offload:
            # Brought for the update and taken back; brought for both passes; gradients added up there.
            moved += (2 + 2 * t.accumulation) * stored["parameters"]
            moved += 2 * t.accumulation * stored["gradients"]
        return moved / rates.host_link

    def _collectives(
        self, rates: Rates, again: bool, exchange_again: bool
    ) -> tuple[dict[str, float], float]:
        """(bytes received, seconds exposed)."""
        stages = self.shape["stage"]
        micro = self.config.train.accumulation / stages / (1 - self.bubble)
        received: dict[str, float] = defaultdict(float)
        busy: dict[str, float] = defaultdict(float)

        def add(
            of: str, kind: str, axes: tuple[str, ...], size: float, times: float, calls: float
        ) -> None:
            if not size:
                return
            n = math.prod(self.shape[a] for a in axes)
            inside = math.prod(self._share[a] for a in axes)
            one = seconds_of_collective(kind, size, n, inside, rates._replace(collective=0.0))
            received[of] += times * size
            busy[of] += times * (one + calls * rates.collective)

        matrices = 6 * self.layers  # weights of layers that have a collective of their own, about
        for axes, numbers in self.divided.gathered.items():
            # Forward and backward: weights are never kept.
            add("weights", "all-gather", axes, numbers * self.item, 2 * micro, matrices)
        for axes, numbers in self.divided.gathered_once.items():
            add("weights", "all-gather", axes, numbers * self.item, micro, 2)
        for (kind, axes), numbers in self.divided.reduced.items():
            add("gradients", kind, axes, numbers * self.item, micro, matrices)
        for axes, numbers in self.divided.updated.items():
            add("weights", "all-gather", axes, 4 * numbers, 1, 1)
        self._of_tokens(add, micro, exchange_again)
        if (n := self.shape["tensor"]) > 1:
            row = self.tokens * self.config.model.hidden_size * self.item
            size = 2 * row * (n - 1) / n
            times = 2 * self.layers * (3 if again else 2)
            add("tensor", "all-reduce", ("tensor",), size, micro * times, 1)
        if stages > 1:
            moved = self.divided.stored["parameters"] * (stages - 1) / stages
            add("stages", "all-to-all", ("stage",), 2 * moved, 1, 2 * matrices)
            row = self.tokens * self.config.model.hidden_size * self.item
            ticks = 2 * self.config.train.accumulation
            add("stages", "collective-permute", ("stage",), row, ticks, 1)
        return dict(received), sum(EXPOSED[of] * seconds for of, seconds in busy.items())

    def _of_tokens(self, add, micro: float, again: bool) -> None:
        if self.buffers is None or self.shape["expert"] == 1:
            return
        x, method = self.shape["expert"], self.config.moe.dispatch
        row = self.config.model.hidden_size * self.item
        there = back = float(self.tokens * (x - 1) * row)
        if method == "all_to_all":
            there = back = self.buffers.exchanged_rows * (x - 1) / x * row * self.rounds
        elif method == "ring":
            back = self.tokens * x * row
        passes = micro * self.moe_layers
        kinds = {
            "all_to_all": ("all-to-all", "all-to-all"),
            "all_gather": ("all-gather", "reduce-scatter"),
            "ring": ("collective-permute", "collective-permute"),
        }[method]
        turns = (x if method == "ring" else 1) * self.rounds
        add("tokens", kinds[0], ("expert",), there, passes * (3 if again else 2), turns)
        add("tokens", kinds[1], ("expert",), back, passes * 2, turns)


def share_a_host(shape: Mapping[str, int], gpus_per_host: int) -> dict[str, int]:
    """Of every axis, how many consecutive devices along it share a host (topology.devices_per_host says it of
    a mesh, which is quicker for one and slower for thousands)."""
    share, stride = {}, 1
    for axis in reversed(AXES):
        size = shape[axis]
        share[axis] = max(1, math.gcd(size, max(1, gpus_per_host // stride)))
        stride *= size
    return share
