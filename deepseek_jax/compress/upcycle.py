"""Make a mixture of experts of a dense model: copies of its MLPs, or pieces of them.

  python -m deepseek_jax.compress upcycle MODEL OUT --experts=8 --experts-per-token=2
      8 copies of every MLP, 2 of them for a token
  python -m deepseek_jax.compress upcycle MODEL OUT --experts=64 --experts-per-token=8 --granularity=8
      8 copies in 8 pieces each; the pieces of a copy share a router row at first and are chosen together
  ... upcycle MODEL OUT --experts=63 --experts-per-token=7 --granularity=8 --shared
      DeepSeekMoE's form: the first piece is shared, the other 7 of each of 9 copies are routed

The new model computes what the dense one does, so that its first loss is the dense model's; training makes
the experts different. With --noise they are at once, and the first loss is another. OUT is of the family that
has the model's attention: qwen3_moe, mixtral, or with a shared expert glm4_moe and deepseek_v3. Attention,
norms and embeddings are copied bit by bit.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from deepseek_jax.cli import arguments
from deepseek_jax.compress import output, source, upcycle_plan
from deepseek_jax.compress.source import Source
from deepseek_jax.compress.upcycle_plan import Wanted
from deepseek_jax.errors import UserError
from deepseek_jax.hf import provenance
from deepseek_jax.hf.compression_map import expert_rows
from deepseek_jax.hf.names import Leaf
from deepseek_jax.hf.reader import Part
from deepseek_jax.tensorfile import regions

# First numbers of the seeds of what is drawn, so that no two draws share one.
_ROUTER, _NOISE = 2, 3
_DOWN = "model.layers.0.mlp.down_proj.weight"


def add_options(p: arguments.Parser) -> None:
    p.add_argument("--experts", type=int, required=True, metavar="E", help="routed experts a layer")
    p.add_argument(
        "--experts-per-token",
        "--num-experts-per-tok",
        "--num_experts_per_tok",
        type=int,
        required=True,
        metavar="K",
        help="that a token goes to",
    )
    p.add_argument(
        "--granularity",
        type=int,
        default=1,
        metavar="G",
        help="pieces that an MLP is cut into, an expert each (default 1: whole copies)",
    )
    p.add_argument(
        "--shared",
        action="store_true",
        help="a shared expert: the first piece, or with whole copies one more, each then giving half",
    )
    p.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="STD",
        help="Gaussian noise on the routed experts' weights, its standard deviation as a share of each "
        "matrix's own (default 0: none, exact)",
    )
    p.add_argument(
        "--router-std",
        type=float,
        metavar="STD",
        help="standard deviation of the router's weights (default: the model's initializer_range)",
    )
    p.add_argument(
        "--first-k-dense-replace",
        "--first_k_dense_replace",
        type=int,
        default=0,
        metavar="N",
        help="layers that stay dense, from the first on (default %(default)s)",
    )
    p.add_argument(
        "--norm-topk-prob",
        "--norm_topk_prob",
        choices=("true", "false"),
        default="true",
        help="whether the weights of a token's experts are made to sum to 1 (default %(default)s)",
    )
    p.add_argument(
        "--scale",
        action="store_true",
        help="with --norm-topk-prob=false: multiply the experts so that the sum is right on average",
    )
    p.add_argument("--seed", type=int, default=0, help="of router and noise (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
      UserError: an option does not fit, MODEL is not dense or cannot be read, or OUT cannot be written.
    """
    if not 0 <= args.noise < 10 or args.router_std is not None and not 0 <= args.router_std < 1e3:
        raise UserError(
            f"--noise={args.noise} must be from 0 to 10, --router-std={args.router_std} 0 or more and "
            f"finite."
        )
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed} is not from 0 to {2**32 - 1}. Give one of these.")
    output.check(args.out)
    dense = source.open_source(args.model, args.step)
    wanted = Wanted(
        experts=args.experts,
        experts_per_token=args.experts_per_token,
        granularity=args.granularity,
        shared=args.shared,
        norm_topk_prob=args.norm_topk_prob == "true",
        scale=args.scale,
        dense_layers=args.first_k_dense_replace,
    )
    made = Upcycled(dense, wanted, args.noise, args.router_std, args.seed)
    print("\n".join(made.lines()))
    made.write(args.out)
    print(f"wrote          {args.out}")


class Upcycled:
    """A dense model as a mixture of experts.

    Args:
      dense: the model.
      wanted: of the new one.
      noise: standard deviation of the noise, as a share of each matrix's own.
      router_std: of the router's weights; None: the model's initializer_range.
      seed: of both.

    Attributes:
      plan: how.

    Raises:
      UserError: as upcycle_plan.make.
    """

    def __init__(
        self,
        dense: Source,
        wanted: Wanted,
        noise: float = 0.0,
        router_std: float | None = None,
        seed: int = 0,
    ):
        self._dense = dense
        self._noise = noise
        self._seed = seed
        self._down = np.dtype(np.float32)
        if dense.notes is not None:
            self._down = provenance.dtype_of(_DOWN, dense.notes.dtypes, "float32")
        self.plan = upcycle_plan.make(dense.model, wanted, self._down.itemsize < 4)
        self._std = self.plan.model.initializer_range if router_std is None else router_std
        self._operation: dict[str, Any] = {
            "kind": "upcycle",
            **wanted._asdict(),
            "noise": noise,
            "router_std": self._std,
            "seed": seed,
            "exact": self.plan.is_exact and not noise,
        }
        m = self.plan.model
        self._scales: dict[int, float] = {}
        self._deviation = 0.0
        if not self.plan.is_exact:
            for layer in expert_rows(m):
                self._scales[layer], deviation = self._average(layer)
                self._deviation = max(self._deviation, deviation)
            self._operation |= {"scales": list(self._scales.values()), "deviation": self._deviation}

    def _average(self, layer: int) -> tuple[float, float]:
        """(what makes a layer's output right on average, the standard deviation of what it then is).

        The norm before the router gives vectors of squared length sum w^2, whose directions are taken to be
        random.
        """
        w_D = self._dense.layer(layer, "post_attention_layernorm/weight").astype(np.float64)
        mean, std = upcycle_plan.sums(
            self.plan, self._std * float(np.sqrt(np.sum(w_D**2))), self._seed
        )
        return 1 / mean, std / mean

    def lines(self) -> list[str]:
        """What is made, for people."""
        p, m = self.plan, self.plan.model
        pieces = f", each in {p.shards} pieces" if p.pieces > 1 else ""
        shared = {0: "", 1: f", beside a shared one of width {m.moe_intermediate_size}"}
        out = [
            f"model          {self._dense.family}, {m.num_hidden_layers} layers, intermediate_size="
            f"{m.intermediate_size} -> {p.family}",
            f"experts        {m.n_routed_experts} of width {m.moe_intermediate_size} in "
            f"{len(expert_rows(m))} layers: {p.copies} copies{pieces}{shared[m.n_shared_experts]}",
            f"chosen         {m.num_experts_per_tok} experts for a token: {p.chosen} of the copies",
        ]
        if not p.is_exact:
            out.append(
                f"first loss     not the dense model's: weights sum to what the router says; scaled to be "
                f"right on average, off by {self._deviation:.1%} from token to token"
            )
        elif self._noise:
            out.append("first loss     not the dense model's: --noise changes the experts")
        else:
            scale = f"; down projections times {p.down_scale:g}" if p.down_scale != 1 else ""
            factor = m.routed_scaling_factor
            scale += f"; routed_scaling_factor={factor:g}" if factor != 1 else ""
            out.append(f"first loss     the dense model's: weights sum to 1{scale}")
        return out

    def write(self, out: str) -> None:
        """Writes it as a Hugging Face folder.

        Raises:
          UserError: as output.write.
        """
        dense, model = self._dense, self.plan.model
        if dense.notes is not None:
            dtypes = dense.notes.dtypes | self._dtypes()
            dense.notes = dataclasses.replace(dense.notes, dtypes=dtypes)
        # No expert stands for one of the dense model, which has none.
        row: tuple[tuple[int, ...], ...] = ((),) * model.n_routed_experts
        mapped = dense.document.map._replace(expert_map=(row,) * len(expert_rows(model)))
        made = output.Compressed(model, self.parts, mapped, self._operation, self.plan.family)
        output.write(out, dense, made)

    def _dtypes(self) -> dict[str, str]:
        """What the new tensors are stored as: the dense MLP's dtype."""
        leaves = source.leaves_of(self.plan.model, self.plan.family)
        out = {}
        for leaf in leaves:
            if leaf.path.startswith("layers/mlp/") and "bias" not in leaf.path:
                for alternative in leaf.names[0]:
                    name = f"model.layers.0.{alternative}".format(e=0)
                    out[provenance.pattern(name)] = self._down.name
        return out

    def parts(self, leaf: Leaf) -> Iterator[Part]:
        """An array of the new model, a layer and an expert at a time."""
        here, rest = source.layers_of(self.plan.model, leaf)
        if not here or not leaf.path.startswith("layers/mlp/"):
            every = range(self.plan.model.num_hidden_layers)
            yield from source.copied(self._dense, self.plan.model, leaf, every)
            return
        whole = regions.whole(leaf.shape)
        for i, layer in enumerate(here):
            at = slice(i, i + 1)
            if rest == "mlp/experts/gate_up_proj" or rest == "mlp/experts/down_proj":
                for e, values in enumerate(self._experts(layer, rest)):
                    yield values[None, None], (at, slice(e, e + 1), *whole[2:])
            else:
                yield self._other(layer, rest)[None], (at, *whole[1:])

    def _experts(self, layer: int, rest: str) -> Iterator[np.ndarray]:
        """float32 [D, 2, F] or [F, D] of each routed expert of a layer."""
        p = self.plan
        is_down = rest.endswith("down_proj")
        if is_down:
            scale = p.down_scale * self._scales.get(layer, 1.0)
            dense_FD = self._mlp(layer, "down_proj") * np.float32(scale)
        else:
            gate_DF, up_DF = self._mlp(layer, "gate_proj"), self._mlp(layer, "up_proj")
        for e in range(p.model.n_routed_experts):
            piece = self._piece(p.pieces - p.shards + e % p.shards)
            if is_down:
                values = dense_FD[piece]
            else:
                values = np.stack([gate_DF[:, piece], up_DF[:, piece]], axis=1)
            yield self._with_noise(values, layer, e, is_down)

    def _with_noise(self, values: np.ndarray, layer: int, e: int, is_down: bool) -> np.ndarray:
        if not self._noise:
            return values
        rng = np.random.default_rng([self._seed, _NOISE, layer, e, int(is_down)])
        # of a matrix: gate and up each, or down
        std = values.std(axis=None if is_down else (0, 2), keepdims=True, dtype=np.float64)
        noise = rng.standard_normal(values.shape, np.float32) * (self._noise * std)
        return (values + noise).astype(np.float32)

    def _other(self, layer: int, rest: str) -> np.ndarray:
        """The router of a layer, and its shared expert."""
        p = self.plan
        if rest == "mlp/gate/kernel":
            rng = np.random.default_rng([self._seed, _ROUTER, layer])
            rows_DC = rng.standard_normal((p.model.hidden_size, p.copies)) * self._std
            return np.repeat(rows_DC.astype(np.float32), p.shards, axis=1)
        if rest == "mlp/gate/e_score_correction_bias":
            return np.zeros(p.model.n_routed_experts, np.float32)
        name = rest.split("/")[2]
        if name == "down_proj":
            return self._mlp(layer, name)[self._piece(0)] * np.float32(p.shared_scale)
        return self._mlp(layer, name)[:, self._piece(0)]

    def _mlp(self, layer: int, name: str) -> np.ndarray:
        """float32 [D, F], or of down_proj [F, D]."""
        return self._dense.layer(layer, f"mlp/{name}/kernel").astype(np.float32)

    def _piece(self, number: int) -> slice:
        width = self.plan.model.moe_intermediate_size
        return slice(number * width, (number + 1) * width)
