"""The metrics of a run: one table of names, units and meanings, and the rows that are made by it.

metrics.jsonl, the trackers, the terminal, the tests and reports read `METRICS`. An objective may report
further parts of its loss by names of its own.
"""

from collections.abc import Mapping
from typing import Any

from deepseek_jax.run.figures import device_peak, memory_gb, short
from deepseek_jax.run.metric import Measured, Metric, of_part, of_routing

__all__ = ["METRICS", "Measured", "Metric", "row", "terminal_text"]

_TABLE = (
    Metric("step", "steps", "finished steps", contract=True, of=lambda m: m.step),
    Metric(
        "stage",
        "",
        "number of the stage, from 1",
        present="with config.distill.stages, in rows of evaluations too",
        of=lambda m: m.stage and m.stage.number,
    ),
    Metric(
        "stage_name",
        "",
        "text: the stage as config.distill.stages names it",
        present="with config.distill.stages, in rows of evaluations too",
        of=lambda m: m.stage and m.stage.name,
    ),
    Metric(
        "loss",
        "nats per token",
        "what is minimised: all weighted parts",
        over_steps="mean",
        contract=True,
        terminal="loss {:.4f}",
        of=of_part("loss"),
    ),
    Metric(
        "lm_loss",
        "nats per token",
        "mean cross-entropy of the next token, over scored tokens",
        over_steps="mean",
        contract=True,
        of=of_part("lm_loss"),
    ),
    Metric(
        "token_accuracy",
        "",
        "share of the scored tokens that no other is likelier than (TRL: mean_token_accuracy)",
        over_steps="mean",
        present="in fine-tuning and distillation",
        terminal="accuracy {:.3f}",
        of=of_part("token_accuracy"),
    ),
    Metric(
        "entropy",
        "nats per token",
        "mean entropy of what is predicted at scored tokens",
        over_steps="mean",
        present="in fine-tuning",
        of=of_part("entropy"),
    ),
    Metric(
        "kl",
        "nats per token",
        "divergence of the student from the teacher (config.distill.beta) at the temperature of the step, "
        "over scored tokens, without its weight",
        over_steps="mean",
        present="in distillation",
        terminal="kl {:.4f}",
        of=of_part("kl"),
    ),
    Metric(
        "teacher_loss",
        "nats per token",
        "the teacher's mean cross-entropy, over scored tokens",
        over_steps="mean",
        present="in distillation from all of the teacher's logits",
        of=of_part("teacher_loss"),
    ),
    Metric(
        "hidden_loss",
        "",
        "distance between hidden states of student and teacher, without its weight",
        over_steps="mean",
        present="with config.distill.hidden_weight",
        of=of_part("hidden_loss"),
    ),
    Metric(
        "router_loss",
        "nats per token",
        "divergence of the student's routers from the teacher's, without its weight",
        over_steps="mean",
        present="with config.distill.router_weight",
        of=of_part("router_loss"),
    ),
    Metric(
        "mtp_loss",
        "nats per token",
        "mean loss of multi-token prediction (cross-entropy; in distillation with the divergence), over its "
        "depths, without its weight",
        over_steps="mean",
        present="with multi-token prediction layers",
        of=of_part("mtp_loss"),
    ),
    Metric(
        "balance_loss",
        "",
        "auxiliary loss of expert balance, without its weight",
        over_steps="mean",
        contract=True,
        of=of_part("balance_loss"),
    ),
    Metric(
        "z_loss",
        "",
        "auxiliary loss of large router logits, without its weight",
        over_steps="mean",
        of=of_part("z_loss"),
    ),
    Metric(
        "lr",
        "per step",
        "learning rate of this update",
        contract=True,
        of=lambda m: short(m.metrics.lr),
    ),
    Metric(
        "grad_norm",
        "",
        "L2 norm of all gradients, before clipping",
        over_steps="mean",
        contract=True,
        of=lambda m: short(m.metrics.grad_norm),
    ),
    Metric(
        "skipped_steps",
        "steps",
        "updates skipped so far for a non-finite loss or gradient",
        of=lambda m: int(m.metrics.skipped_steps),
    ),
    Metric(
        "loss_scale",
        "",
        "what the loss is multiplied by before gradients are taken",
        present="in float16",
        of=lambda m: None if m.metrics.loss_scale is None else short(m.metrics.loss_scale),
    ),
    Metric(
        "step_time_s",
        "s",
        "seconds per step since the row before, without evaluation, checkpoints and compilation",
        over_steps="mean",
        over_processes="first",
        contract=True,
        of=lambda m: round(m.step_time, 6),
    ),
    Metric(
        "tokens_per_sec",
        "tokens per second",
        "tokens of the global batch, padding left out, per second of training",
        over_steps="mean",
        over_processes="first",
        contract=True,
        terminal="{:,.0f} tokens/s",
        of=lambda m: round(m.tokens_per_sec, 2),
    ),
    Metric(
        "samples_per_sec",
        "sequences per second",
        "sequences of the global batch per second of training (Hugging Face: train_samples_per_second)",
        over_steps="mean",
        over_processes="first",
        of=lambda m: round(m.samples_per_sec, 4),
    ),
    Metric(
        "tokens_seen",
        "tokens",
        "tokens trained on so far, padding left out",
        contract=True,
        of=lambda m: m.tokens_seen,
    ),
    Metric(
        "model_tflops_per_device",
        "TFLOP/s",
        "floating point operations of the model, and of a teacher's forward pass; recomputation not counted",
        over_steps="mean",
        over_processes="first",
        of=lambda m: round(m.tflops_per_device, 6),
    ),
    Metric(
        "utilisation",
        "",
        "model_tflops_per_device as a share of the device's peak",
        over_steps="mean",
        over_processes="first",
        present="where the peak is known, or config.log.peak_tflops is set",
        of=lambda m: (
            round(m.tflops_per_device / peak, 4) if (peak := device_peak(m.config)) else None
        ),
    ),
    Metric(
        "memory_gb",
        "GB",
        "peak memory of the fullest local device, or of the process where devices do not say (CPU)",
        over_steps="max",
        over_processes="first",
        of=lambda m: round(memory_gb(), 4),
    ),
    Metric(
        "max_violation",
        "",
        "the fullest expert's load / the mean - 1, in the worst layer",
        over_steps="max",
        contract=True,
        terminal="max violation {:.2f}",
        of=of_routing("max_violation"),
    ),
    Metric(
        "routing_entropy",
        "",
        "1 where all experts of a layer have the same load, 0 where one has all; mean over layers",
        over_steps="mean",
        of=of_routing("routing_entropy"),
    ),
    Metric(
        "dispatch_rounds",
        "rounds",
        "the most rounds of dispatch that a device ran in a layer",
        over_steps="max",
        contract=True,
        terminal="rounds {}",
        of=of_routing("dispatch_rounds"),
    ),
    Metric(
        "left_device_share",
        "",
        "of the assignments not dropped, those whose expert is on another device than their token",
        over_steps="mean",
        of=of_routing("left_device_share"),
    ),
    Metric(
        "device_imbalance",
        "",
        "the most tokens that a device's experts received / the mean - 1, in the worst layer",
        over_steps="max",
        of=of_routing("device_imbalance"),
    ),
    Metric(
        "received_by_device",
        "tokens",
        "a list: what the experts of each device received, over all layers",
        over_steps="sum",
        of=of_routing("received_by_device"),
    ),
    Metric(
        "dropped_tokens",
        "tokens",
        "assignments of a token to an expert that were dropped, over all layers",
        over_steps="sum",
        contract=True,
        of=of_routing("dropped_tokens"),
    ),
    Metric(
        "dropped_by_device",
        "tokens",
        "a list by layer: what was dropped, by the device of its token",
        over_steps="sum",
        present="with config.moe.drop",
        of=of_routing("dropped_by_device"),
    ),
    Metric(
        "rows",
        "sequences",
        "a list: the ranges [first, last + 1) of the data order that the step read",
        present="in rows of skipped updates and of spikes",
    ),
    Metric(
        "eval_loss", "nats per token", "held-out cross-entropy", row="evaluation", contract=True
    ),
    Metric("eval_tokens", "tokens", "held-out tokens that were scored", row="evaluation"),
    Metric(
        "eval_bits_per_byte",
        "bits per byte",
        "held-out cross-entropy by the bytes of the text",
        row="evaluation",
        present="where the tokenizer knows the bytes of its tokens",
    ),
    Metric(
        "eval_token_accuracy",
        "",
        "share of the held-out scored tokens that no other is likelier than",
        row="evaluation",
        present="in fine-tuning and distillation",
    ),
    Metric(
        "eval_kl",
        "nats per token",
        "held-out KL(teacher || student) at temperature 1",
        row="evaluation",
        present="in distillation",
    ),
    Metric(
        "eval_teacher_loss",
        "nats per token",
        "held-out cross-entropy of the teacher",
        row="evaluation",
        present="in distillation from all of the teacher's logits",
    ),
    Metric("spike_loss", "nats per token", "a loss far above those before it", row="spike"),
    Metric("median_loss", "nats per token", "the median of the losses before it", row="spike"),
    Metric("deviations", "", "robust standard deviations above that median", row="spike"),
    Metric("rollback", "rollbacks", "how many there were so far", row="rollback"),
    Metric("rolled_back_from", "steps", "the step that had bad numbers", row="rollback"),
    Metric(
        "skipped_rows",
        "sequences",
        "a list: all ranges of the data order that rollbacks left out so far",
        row="rollback",
    ),
)
METRICS: Mapping[str, Metric] = {m.name: m for m in _TABLE}


def row(measured: Measured) -> dict[str, Any]:
    """The row of metrics.jsonl of a step."""
    made = {name: metric.of(measured) for name, metric in METRICS.items() if metric.of}
    # Parts of an objective that the table does not know are its own.
    others = {n: short(v) for n, v in measured.metrics.parts.items() if n not in METRICS}
    return {name: value for name, value in made.items() if value is not None} | others


def terminal_text(values: Mapping[str, Any]) -> str:
    """What the terminal shows of a step's row."""
    shown = [m for m in METRICS.values() if m.terminal and m.name in values]
    return "  ".join(m.terminal.format(values[m.name]) for m in shown)
