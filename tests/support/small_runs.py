"""One compiled step of a small model, and runs of it, for tests that compare options.

t = trainer(config_of(OptimizerConfig("muon"), MeshConfig(fsdp=2, expert=4)))
s, metrics = t.run(t.start(), 5)
"""

import functools
from typing import Any

import jax
import numpy as np

from deepseek_jax import objectives
from deepseek_jax.checkpoint.checkpoint import Checkpointer
from deepseek_jax.config.options import (
    Config,
    Fp16Config,
    MeshConfig,
    ModelConfig,
    OffloadConfig,
    OptimizerConfig,
    ShardingConfig,
    TrainConfig,
)
from deepseek_jax.config.validation import validate
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.train import state, step
from deepseek_jax.train.batch import put_batch
from tests.support import invariance

TINY = ModelConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    first_k_dense_replace=0,
    num_attention_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    initializer_range=0.1,
)
ADAMW = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
ONE_DEVICE = MeshConfig(fsdp=1)
ALL_DIVIDED = ShardingConfig(min_weight_size=0)  # small weights too
DEFAULTS = Config()


def config_of(
    optimizer: OptimizerConfig = ADAMW,
    mesh: MeshConfig = ONE_DEVICE,
    fp16: Fp16Config = DEFAULTS.fp16,
    sharding: ShardingConfig = ALL_DIVIDED,
    offload: OffloadConfig = DEFAULTS.offload,
    **train: Any,
) -> Config:
    small: dict[str, Any] = {
        "steps": 40,
        "batch_size": invariance.SEQUENCES,
        "sequence_length": invariance.LENGTH,
        "dtype": "float32",
        "remat": "none",
    }
    config = Config(
        model=TINY,
        mesh=mesh,
        train=TrainConfig(**small | train),
        optimizer=optimizer,
        sharding=sharding,
        fp16=fp16,
        offload=offload,
    )
    validate(config)
    return config


class Trainer:
    """A compiled step of one config, and its state from the weights that all of these tests begin with."""

    def __init__(
        self,
        config: Config,
        objective: objectives.Objective | None = None,
    ):
        self.config = config
        self.mesh = make_mesh(config, jax.devices()[: invariance.devices_of(config)])
        self.objective = objective or objectives.make(config)
        with jax.set_mesh(self.mesh):
            self.layout = state.make_layout(config, self.mesh)

    @functools.cached_property
    def lowered(self) -> Any:
        with jax.set_mesh(self.mesh):
            train_step = step.make_train_step(self.config, self.layout, self.objective)
            return jax.jit(train_step).lower(self.layout.abstract_sharded(), self.batch(0))

    @functools.cached_property
    def compiled(self) -> Any:
        with jax.set_mesh(self.mesh):
            return self.lowered.compile()

    def batch(self, i: int):
        return put_batch(invariance.rows(i), self.config.micro_batch, self.mesh)

    def start(self) -> state.TrainState:
        with jax.set_mesh(self.mesh):
            same = invariance.initial_state(TINY)._replace(opt_state=self.layout.abstract.opt_state)

            def zeros(tree):
                return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), tree)

            opt_state, residual = (
                zeros(self.layout.abstract.opt_state),
                zeros(self.layout.abstract.residual),
            )  # of all three optimizers
            scale = self.layout.abstract.loss_scale and state.init_loss_scale(self.config)
            whole = jax.device_put(same.params, self.layout.model.shardings.params)
            params, frozen = self.layout.begin(whole)
            esft = dict(self.layout.multipliers.experts) or None
            return jax.device_put(
                same._replace(
                    params=params,
                    frozen=frozen,
                    esft=esft,
                    opt_state=opt_state,
                    residual=residual,
                    loss_scale=scale,
                ),
                self.layout.shardings,
            )

    def run(
        self, s: state.TrainState, steps: int, first: int = 0
    ) -> tuple[state.TrainState, list[step.StepMetrics]]:
        out = []
        with jax.set_mesh(self.mesh):
            for i in range(first, first + steps):
                # The program refuses a state that is laid out otherwise than it was.
                s, metrics = self.compiled(s, self.batch(i % 4))
                out.append(metrics)
        return s, out


@functools.cache
def trainer(config: Config) -> Trainer:
    return Trainer(config)


def losses_of(metrics: list[step.StepMetrics]) -> np.ndarray:
    return np.asarray([float(m.loss) for m in metrics])


def same(a, b) -> bool:
    return all(
        np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def restored(t: Trainer, s: state.TrainState, folder) -> state.TrainState:
    """Through a checkpoint on disk."""
    with jax.set_mesh(t.mesh):
        checkpointer = Checkpointer(str(folder))
        checkpointer.save(5, state.to_tree(s), {})
        tree, _ = checkpointer.restore(state.to_tree(t.layout.abstract_sharded()))
        checkpointer.close()
        return state.from_tree(tree, t.layout.abstract)
