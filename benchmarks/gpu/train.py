"""Training on one GPU, as gpu_bench measures it: a small model's losses, and the real step of
DeepSeek-V2-Lite with fewer layers."""

import dataclasses
import functools
import math
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.costs import costs, predicted
from benchmarks.support import shapes
from deepseek_jax.config.options import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ShardingConfig,
    TrainConfig,
)
from deepseek_jax.config.validation import validate
from deepseek_jax.errors import UserError
from deepseek_jax.model import moe
from deepseek_jax.model.attention import cudnn
from deepseek_jax.model.count import count
from deepseek_jax.model.router import route
from deepseek_jax.parallel import xla_options
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan import topology
from deepseek_jax.plan.tune.rows import packed
from deepseek_jax.train.batch import put_batch
from deepseek_jax.train.state import init_state, make_layout, to_tree
from deepseek_jax.xla import program

Row = dict[str, Any]

TOY: Row = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
BF16_TFLOPS = 989.0  # H100 and H200, dense
# Layers of V2-Lite by the bytes that JAX may use: 16 a parameter (weights, gradients, two moments) and 8.5e9
# for the rest, as the steps that were compiled for an H200 have it. An H200 holds 8, an H100 6.
LAYERS = ((85e9, 8), (66e9, 6), (47e9, 4), (36e9, 3), (28e9, 2))
# (tokens of a sequence, routing, attention, remat). The first compiles in half the time of the others, so
# that something is measured soon.
VARIANTS = (
    ("one document", "natural", "cudnn", "save:attention"),
    ("packed documents", "natural", "auto", "auto"),
    ("packed documents", "balanced", "auto", "auto"),
)


def why(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:250]}"


def training_config(
    toy: bool, layers: int | None = None, method: str = "auto", remat: str = "full"
) -> Config:
    """V2-Lite on one device: four sequences of 4,096 tokens per step."""
    model = dataclasses.replace(shapes.V2_LITE, **(TOY if toy else {}))
    model = dataclasses.replace(model, num_hidden_layers=layers or model.num_hidden_layers)
    train = TrainConfig(
        steps=1000,
        batch_size=2 if toy else 4,
        sequence_length=64 if toy else 4096,
        attention=method,
        remat=remat,
    )
    config = Config(
        model=model,
        train=train,
        mesh=MeshConfig(fsdp=1),
        sharding=ShardingConfig(strategy="no_shard"),
        optimizer=OptimizerConfig(learning_rate=4.2e-4),
    )
    validate(config)
    return config


def tiny_config(toy: bool) -> Config:
    """A small model in float32, whose losses a CPU and a GPU should share."""
    model = ModelConfig(**TOY) if toy else ModelConfig(num_hidden_layers=3, v_head_dim=32)
    return Config(
        model=model,
        mesh=MeshConfig(fsdp=1),
        train=TrainConfig(batch_size=8, sequence_length=32 if toy else 128, dtype="float32"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1),
    )


def layers_for(memory: float) -> int:
    """The layers that so many bytes hold, by LAYERS: nothing is compiled to find them."""
    for least, layers in LAYERS:
        if memory >= least:
            return layers
    raise UserError(
        f"this card lets JAX use {memory / 1e9:.1f} GB, and two layers of V2-Lite need "
        f"{LAYERS[-1][0] / 1e9:.0f} GB"
    )


def balanced_route(x_TD: jax.Array, kernel_DE: jax.Array, bias_E: jax.Array, model: Any) -> Any:
    """`route` with choices that give every expert the same load, and the router's own weights of them."""
    routing = route(x_TD, kernel_DE, bias_E, model)
    tokens, choices = routing.expert_TK.shape
    expert_TK = (
        jnp.arange(tokens)[:, None] * choices + jnp.arange(choices)
    ) % model.n_routed_experts
    expert_TK = expert_TK.astype(jnp.int32) + jnp.zeros_like(
        routing.expert_TK
    )  # varies over the mesh as the router's do
    return routing._replace(
        expert_TK=expert_TK, weight_TK=jnp.take_along_axis(routing.score_TE, expert_TK, axis=1)
    )


@dataclasses.dataclass
class Run:
    """A compiled step with its state and batch on one device."""

    config: Config
    device: Any
    rows: dict[str, np.ndarray]
    balanced: bool = False
    out: pathlib.Path | None = None

    def __post_init__(self) -> None:
        placed = topology.lay_out(self.config, [self.device])
        room = (self.device.memory_stats() or {}).get("bytes_limit")
        self.config, self.mesh, self.layout, _ = topology.settle(self.config, *placed, room)
        config, layout = self.config, self.layout
        options = xla_options.xla_options(
            config,
            self.device.platform,
            xla_options.bytes_of_a_layer(config, layout.abstract.params, self.mesh),
        )
        if xla_options.is_gpu(self.device.platform):
            options |= autotune(self.out)
        with mock.patch.object(moe, "route", balanced_route if self.balanced else route):
            self.step = topology.compile_step(config, self.mesh, layout, options)
        self.flops_per_token = count(
            config.model, layout.abstract.params, config.train.sequence_length
        ).flops_per_token
        with jax.set_mesh(self.mesh):
            self.batch = put_batch(self.rows, config.micro_batch, self.mesh)
        self.start()

    def start(self) -> None:
        """The state that training begins with."""
        self.state = None  # before there is a second one
        with jax.set_mesh(self.mesh):
            self.state = init_state(self.config, self.layout)

    def steps(self, number: int) -> tuple[list[float], list[float], Any]:
        """Seconds and loss of each, and the last one's metrics."""
        seconds, losses = [], []
        with jax.set_mesh(self.mesh):
            for _ in range(number):
                started = time.perf_counter()
                self.state, metrics = jax.block_until_ready(
                    self.step.compiled(self.state, self.batch)
                )
                seconds.append(time.perf_counter() - started)
                losses.append(float(metrics.loss))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]}")
        return seconds, losses, metrics


def autotune(out: pathlib.Path | None) -> Row:
    """Options that write what XLA's autotuner found to FOLDER/autotune.txt, and take it from there where no
    program is kept any more."""
    if out is None:
        return {}
    file, kept = out / "autotune.txt", out / "cache"
    options = {"xla_gpu_dump_autotune_results_to": str(file)}
    return options | (
        {"xla_gpu_load_autotune_results_from": str(file)}
        if file.exists() and not any(kept.glob("*-cache"))
        else {}
    )


def tiny(toy: bool, out: pathlib.Path | None) -> Iterator[Row]:
    """Five steps of a small model, on this device and, where that is none, on the CPU: the losses should
    agree. And once more from the start: weights and moments should be the same, bit for bit, else no run
    resumes exactly."""
    config = tiny_config(toy)
    rows = packed(config.train.batch_size, config.train.sequence_length, config.model.vocab_size)
    here, found = jax.devices()[0], {}
    for device in [here] if here.platform == "cpu" else [here, None]:
        try:
            device = device or jax.devices("cpu")[0]
            run = Run(config, device, rows, out=out)
            seconds, losses, _ = run.steps(5)
            found[device.platform] = losses
            row = {
                "platform": device.platform,
                "losses": losses,
                "step_s": statistics.median(seconds[1:]),
                "compile_s": run.step.compile_seconds,
                "differs_again": differs_again(run, 5),
            }
            if len(found) == 2:
                row["largest_difference"] = max(
                    abs(a - b) for a, b in zip(*found.values(), strict=True)
                )
            yield row
        except Exception as e:
            yield {"failed": why(e)}


def differs_again(run: Run, steps: int) -> list[str]:
    """The arrays of the state that have other bits when the same steps are made again from the start."""

    def leaves() -> dict[str, np.ndarray]:
        found = jax.tree_util.tree_leaves_with_path(to_tree(run.state))
        return {jax.tree_util.keystr(path): np.asarray(a) for path, a in found}

    first = leaves()
    run.start()
    run.steps(steps)
    return [name for name, a in leaves().items() if a.tobytes() != first[name].tobytes()]


def train(toy: bool, out: pathlib.Path | None) -> Iterator[Row]:
    """Tokens per second of the real step, and where the time of the first goes."""
    device = jax.devices()[0]
    whole = training_config(toy)
    layers = (
        whole.model.num_hidden_layers
        if toy
        else layers_for((device.memory_stats() or {}).get("bytes_limit", 0))
    )
    mesh = make_mesh(whole, [device])
    flops = count(
        whole.model, make_layout(whole, mesh).abstract.params, whole.train.sequence_length
    ).flops_per_token
    profiled = False
    for tokens, routing, method, remat in VARIANTS:
        if method == "cudnn" and device.platform == "cpu":
            continue
        row = {
            "toy": toy,
            "tokens": tokens,
            "routing": routing,
            "attention": method,
            "remat": remat,
            "layers": layers,
            "layers_of_the_model": whole.model.num_hidden_layers,
        }
        try:
            if method == "cudnn" and (reason := cudnn.missing(192, 128)):
                raise UserError(reason)
            config = training_config(toy, layers, method, remat)
            t = config.train
            batch = packed(
                t.batch_size,
                t.sequence_length,
                config.model.vocab_size,
                documents=tokens == "packed documents",
            )
            run = Run(config, device, batch, routing == "balanced", out)
            seconds, losses, metrics = run.steps(4 if toy else 10)
            a_step = statistics.median(seconds[2:])
            rate = t.batch_size * t.sequence_length / a_step
            rounds = int(jnp.max(metrics.load.rounds))
            assignments = t.batch_size * t.sequence_length * config.model.num_experts_per_tok
            text = run.step.compiled.as_text()
            shape = dict(run.mesh.shape)
            yield row | {
                **predicted(text, shape, device.device_kind, assignments, rounds),
                "remat": run.config.train.remat,
                "batch_size": t.batch_size,
                "sequence_length": t.sequence_length,
                "tokens_per_s": rate,
                "step_s": a_step,
                "compile_s": run.step.compile_seconds,
                "bytes": program.memory(run.step.compiled).total,
                "loss": losses[-1],
                "dispatch_rounds": rounds,
                "tflops": rate * run.flops_per_token / 1e12,
                "share_of_peak": rate * run.flops_per_token / 1e12 / BF16_TFLOPS,
                "tokens_per_s_of_the_whole_model": rate * run.flops_per_token / flops,
            }
            if not profiled:
                profiled = True
                yield {
                    "what": "profile",
                    "largest_costs": costs(functools.partial(run.steps, 1), text),
                }
        except Exception as e:  # what this GPU or cuDNN refuses must not hide what the others reach
            yield row | {"failed": why(e)}
