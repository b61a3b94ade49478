"""Figures of a step that are made from its metrics, or asked of the machine."""

import math
import resource
from typing import Any

import jax
import numpy as np

from deepseek_jax.config.options import Config
from deepseek_jax.model.moe_statistics import Load

# Dense bfloat16 and float16 peak of one device in TFLOP/s, from the vendors' data sheets; the first
# name found in device_kind wins.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}


def device_peak(config: Config) -> float | None:
    """Peak TFLOP/s of one device: config.log.peak_tflops, or known from its name, or None."""
    if config.log.peak_tflops:
        return config.log.peak_tflops
    if config.train.dtype not in ("bfloat16", "float16"):
        return None
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in kind), None)


def memory_gb() -> float:
    """Peak GB: of the fullest local device, or of this process where devices do not say (CPU)."""
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices()]
    return (max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9


def short(x: Any) -> float:
    """A float32 as the float of its shortest text: equal text, equal number."""
    return float(str(np.float32(x)))


def routing(load: Load, drop: bool) -> dict[str, Any]:
    """Where tokens went. What each figure means: metrics.METRICS.

    Args:
      load: leaves [L, ...], L = 0 without MoE layers.
      drop: `config.moe.drop`.
    """
    load = jax.tree.map(lambda a: np.asarray(a, np.int64), load)
    out = {
        "max_violation": 0.0,
        "routing_entropy": 0.0,
        "dispatch_rounds": 0,
        "left_device_share": 0.0,
        "device_imbalance": 0.0,
        "received_by_device": load.received.sum(axis=0).tolist(),
        "dropped_tokens": int(load.dropped_counts.sum()),
    }
    if load.expert_counts.any():
        share = load.expert_counts / np.maximum(load.expert_counts.sum(axis=1, keepdims=True), 1)
        experts = share.shape[1]
        nats = -(share * np.log(np.maximum(share, 1e-30))).sum(axis=1)
        entropy = nats / math.log(max(experts, 2))
        received = load.received / np.maximum(load.received.mean(axis=1, keepdims=True), 1e-30)
        out["max_violation"] = round(float((share.max(axis=1) * experts - 1).max()), 6)
        out["routing_entropy"] = round(float(entropy.mean()), 6)
        out["dispatch_rounds"] = int(load.rounds.max())
        out["left_device_share"] = round(float(load.left.sum() / max(load.received.sum(), 1)), 6)
        out["device_imbalance"] = round(float(received.max() - 1), 6)
    if drop:
        out["dropped_by_device"] = load.dropped_from.tolist()
    return out
