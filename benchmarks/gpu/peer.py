"""transformers' DeepseekV2 in PyTorch on one CUDA card: the same layers, sequences and tokens as
gpu_bench trains.

  python -m benchmarks.gpu.peer LAYERS BATCH LENGTH [--toy]      prints one line of JSON

bfloat16 weights and AdamW moments (ours are float32: the peer has less to move), attention by sdpa,
experts by grouped_mm, gradient checkpointing, as with `remat=full`. Nothing of JAX is imported: the
card is the peer's alone.
"""

import json
import statistics
import sys
import time

TOY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
V2_LITE = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
}


def main(argv: list[str]) -> dict:
    layers, batch, length = map(int, argv[:3])
    toy = "--toy" in argv
    try:
        import torch
        import transformers
    except ImportError as e:
        return {"not_measured": str(e)}
    if not toy and not torch.cuda.is_available():
        return {"not_measured": f"torch {torch.__version__} sees no CUDA card"}
    device = "cpu" if toy else "cuda"
    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(
        **(TOY if toy else V2_LITE),
        q_lora_rank=None,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        max_position_embeddings=length,
        use_cache=False,
    )
    out = {"torch": torch.__version__, "transformers": transformers.__version__, "layers": layers}
    for experts in ("grouped_mm", "eager"):
        try:
            with torch.device(device):
                model = transformers.DeepseekV2ForCausalLM._from_config(
                    config,
                    dtype=torch.bfloat16,
                    attn_implementation="sdpa",
                    experts_implementation=experts,
                )
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            model.train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not toy)
            ids = torch.randint(0, config.vocab_size, (batch, length), device=device)
            seconds = []
            for _ in range(3 if toy else 7):
                started = time.perf_counter()
                optimizer.zero_grad(set_to_none=True)
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if not toy:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            median = statistics.median(seconds[2:])
            return out | {
                "experts": experts,
                "step_s": median,
                "tokens_per_s": batch * length / median,
            }
        except Exception as e:  # a PyTorch without grouped_mm still has a loop
            out[f"{experts}_failed"] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
            model = optimizer = None
            if not toy:
                torch.cuda.empty_cache()
    return out | {"not_measured": "neither way of computing experts ran"}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
