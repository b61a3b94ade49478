"""MoE_Factorize_Compress's student in plain torch, by its format alone: a Qwen3-MoE whose experts share a
core for each projection, W = (I + U_out V_out^T) C (I + U_in V_in^T). Its state_dict has the names of that
program's `checkpoint-0`.

    student = build(theirs, rank=3, seed=0)     # from a transformers model, with random factors
    write(student, folder, torch.float16)       # model.safetensors, config.json with compression_config
"""

import json

import safetensors.torch
import torch
from torch import nn


class Wrapper(nn.Module):
    def __init__(self, width, rank):
        super().__init__()
        self.U = nn.Parameter(torch.randn(width, rank) * 0.2)
        self.V = nn.Parameter(torch.randn(width, rank) / rank**0.5)

    def matrix(self):
        return torch.eye(len(self.U), dtype=self.U.dtype) + self.U @ self.V.T


class Expert(nn.Module):
    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.input_wrapper = Wrapper(inputs, rank)
        self.output_wrapper = Wrapper(outputs, rank)


class Projection(nn.Module):
    def __init__(self, experts, inputs, outputs, rank):
        super().__init__()
        self.core = nn.Parameter(torch.randn(outputs, inputs) * 0.3)
        self.experts = nn.ModuleList([Expert(inputs, outputs, rank) for _ in range(experts)])

    def weight(self, e):
        one = self.experts[e]
        return one.output_wrapper.matrix() @ self.core @ one.input_wrapper.matrix()


class Experts(nn.Module):
    def __init__(self, config, rank):
        super().__init__()
        e, d, f = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.count = e
        self.gate_shared_core = Projection(e, d, f, rank)
        self.up_shared_core = Projection(e, d, f, rank)
        self.down_shared_core = Projection(e, f, d, rank)

    def forward(self, x, chosen, weight):
        out = torch.zeros_like(x)
        for e in range(self.count):
            share = torch.where(chosen == e, weight, 0).sum(-1, keepdim=True)
            gate, up, down = (
                getattr(self, f"{name}_shared_core").weight(e) for name in ("gate", "up", "down")
            )
            out = out + share * ((nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
        return out


def build(theirs, rank, seed):
    """The student: what is no expert is that of `theirs`, which it is made in."""
    torch.manual_seed(seed)
    for layer in theirs.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = Experts(theirs.config, rank)
    theirs.compression_config = {
        "model_name": "Qwen/Qwen3-30B-A3B",
        "rank": rank,
        "num_steps": 1000,
        "lr": 1e-3,
        "output_dir": "./models/compressed/checkpoint-0",
        "config_dir": "./models/compressed/config",
        "temp_dir": "./models/temp",
    }
    return theirs.eval()


def write(student, folder, dtype=torch.float32):
    """Writes its weights, and adds compression_config to the config.json that is there."""
    tensors = {n: t.to(dtype).contiguous() for n, t in student.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = student.compression_config
    (folder / "config.json").write_text(json.dumps(config))
