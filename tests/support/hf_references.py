"""Every model that a reference program wrote, against its golden values.

    python -m tests.support.hf_references DIR [NAME ...]

DIR/NAME holds config.json and model.safetensors, hub_config/ (the same in the key style of the
hub), for DeepSeek-V3 hub_fp8/, and golden.npz: input_ids, logits, loss, topk_idx_N (sorted experts
of layer N) and gradnorm/TENSOR from transformers in float32. It prints one line per model and exits
with 1 if a logit differs by more than 1e-4 or by more than 1e-5 of the largest, a choice at all, a
loss by more than 1e-5 or a gradient's norm by more than 1e-3 of itself. Not a test of the suite:
compiling two dozen models takes some minutes.
"""

import os
import sys

import jax
import numpy as np

from deepseek_jax import hf
from deepseek_jax.hf import names
from deepseek_jax.model import moe
from tests.support import conversion

jax.config.update("jax_platforms", "cpu")


def check(folder: str) -> tuple[bool, str]:
    """(whether all is well, the line) of one model."""
    golden = np.load(f"{folder}/golden.npz")
    ids, seen, route = golden["input_ids"], [], moe.route
    model = hf.load(folder)

    def noting(*args):
        routing = route(*args)
        jax.debug.callback(lambda e: seen.append(np.sort(e, axis=-1)), routing.expert_TK)
        return routing

    moe.route = noting
    try:
        with jax.set_mesh(model.mesh):
            batch = {
                k: conversion.put(a.astype(np.int32)) for k, a in conversion.batch_of(ids).items()
            }
            config = conversion.config_of(conversion.smaller(model.config, aux_loss_alpha=0.0))

            @jax.jit
            def run(params, bias, batch):
                def loss_of(params):
                    net = conversion.Recorder(model.layout.merge(params, bias))
                    loss = conversion.loss_of(net, batch, config)
                    return loss, net.logits(net.out.hidden_BSD)

                return jax.value_and_grad(loss_of, has_aux=True)(params)

            (loss, logits), grads = jax.block_until_ready(run(model.params, model.bias, batch))
            jax.effects_barrier()
    finally:
        moe.route = route
    layers = sorted(int(k.rpartition("_")[2]) for k in golden if k.startswith("topk_idx_"))
    chosen = all(
        np.array_equal(seen[i], golden[f"topk_idx_{layer}"]) for i, layer in enumerate(layers)
    )
    error = float(np.abs(logits - golden["logits"]).max())
    scale = float(np.abs(golden["logits"]).max())
    norms: dict[str, float] = {}
    for leaf, a in zip(
        names.leaves(grads, model.family, model.config),
        map(np.asarray, jax.tree.leaves(grads)),
        strict=True,
    ):
        for p in names.tensor_regions(leaf, tuple(slice(0, n) for n in leaf.shape)):
            norms[p.name] = float(np.linalg.norm(names.view(a, leaf, p.at).astype(np.float64)))
    wanted = {
        k.removeprefix("gradnorm/"): float(golden[k]) for k in golden if k.startswith("gradnorm/")
    }
    same_names = {n for n in wanted if not n.endswith("e_score_correction_bias")} == set(norms)
    worst = max(
        abs(norms.get(n, np.inf) - w) / max(w, 1e-30) if w else norms.get(n, 0.0)
        for n, w in wanted.items()
        if n in norms
    )
    expected = float(golden["loss"])
    loss_error = abs(float(loss) - expected) / expected
    hub = all(
        np.array_equal(a, b)
        for a, b in zip(
            *(jax.tree.leaves(m.params) for m in (model, hf.load(f"{folder}/hub_config"))),
            strict=True,
        )
    )
    line = (
        f"logits {error:.1e} = {error / scale:.1e} of the largest, experts "
        f"{'equal' if chosen else 'DIFFER'} in {len(layers)} layers, "
        f"loss {loss_error:.1e}, gradient norms {worst:.1e} ({len(norms)} "
        f"tensors{'' if same_names else ', NAMES DIFFER'}), "
        f"hub's keys {'the same' if hub else 'DIFFER'}"
    )
    good = bool(
        error < 1e-4
        and error < 1e-5 * scale
        and chosen
        and loss_error < 1e-5
        and worst < 1e-3
        and same_names
        and hub
    )
    if os.path.exists(f"{folder}/golden_fp8.npz"):
        golden = np.load(f"{folder}/golden_fp8.npz")
        logits = np.asarray(hf.load(f"{folder}/hub_fp8")(golden["input_ids"]))
        error = float(np.abs(logits - golden["logits"]).max() / np.abs(golden["logits"]).max())
        good = bool(good and error < 1e-5)
        line = f"{line}, FP8 logits {error:.1e}"
    return good, line


def main() -> int:
    folder, *wanted = sys.argv[1:]
    bad = 0
    for name in wanted or sorted(os.listdir(folder)):
        good, line = check(os.path.join(folder, name))
        bad += not good
        print(f"{'ok ' if good else 'BAD'} {name:24s} {line}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
