"""transformers' DeepseekV3 in PyTorch on the same model, tokens and optimizer as `python -m benchmarks
step` trains: its peer there.

  python benchmarks/speed/hf_torch.py --model_config=config.json --tokens=tokens.npy --warmup=2 --threads=2
                                      [--dtype=bf16] [--checkpointing]

Prints one line of JSON. PyTorch at its best on a CPU: attention by sdpa, experts by grouped_mm, AdamW
by foreach, gradients clipped as ours are, nothing recomputed unless asked; bf16 is autocast over float32
weights. Random weights. It needs torch and transformers.
"""

import argparse
import json
import os
import resource
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_config", required=True, help="a config.json")
    parser.add_argument("--tokens", required=True, help="integers [steps, sequences, tokens], .npy")
    parser.add_argument("--warmup", type=int, required=True, help="steps that do not count")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--checkpointing", action="store_true")
    own = parser.parse_args()

    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(own.threads)
    torch.manual_seed(0)
    with open(own.model_config, encoding="utf-8") as f:
        keys = json.load(f)
    config = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    model = transformers.AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    model.train()
    if own.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=3e-4,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        foreach=True,
    )
    seconds, cpu, losses = [], [], []
    for rows in np.load(own.tokens, allow_pickle=False):
        ids = torch.from_numpy(rows.astype(np.int64))
        at, cpu_at = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=own.dtype == "bf16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
        seconds.append(time.perf_counter() - at)
        cpu.append(time.process_time() - cpu_at)
    return {
        "peer": f"transformers {transformers.__version__}, PyTorch {torch.__version__}",
        "threads": own.threads,
        "seconds": seconds[own.warmup :],
        "cpu_seconds": cpu[own.warmup :],
        "losses": losses,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    result = main()
    sys.stdout.flush()
    print(json.dumps(result), flush=True)
