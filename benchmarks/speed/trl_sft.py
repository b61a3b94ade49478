"""TRL's SFTTrainer on the same model, chats and number of chats per update as `python -m benchmarks
sft` trains: its peer there.

  python benchmarks/speed/trl_sft.py --data=chats.jsonl --model_config=config.json --length=256 --batch=8
                                     --accumulation=4 --steps=4 --warmup=2 --threads=1 [--dtype=bf16]

Prints one line of JSON. TRL as it comes (padding to the longest chat of a micro-batch, its own fused
head, AdamW) but for what would slow it down here: gradient checkpointing is off, as attention is
PyTorch's sdpa and experts are computed by grouped_mm. Random weights. It needs trl and torch.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="JSONL with input_ids and labels")
    parser.add_argument("--model_config", required=True, help="a config.json")
    for name in ("length", "batch", "accumulation", "steps", "warmup", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    own = parser.parse_args()

    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(own.threads)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    with open(own.data, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    with open(own.model_config, encoding="utf-8") as f:
        keys = json.load(f)
    config = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model,
            args=trl.SFTConfig(
                output_dir=folder,
                max_length=own.length,
                per_device_train_batch_size=own.batch,
                gradient_accumulation_steps=own.accumulation,
                max_steps=own.steps + own.warmup,
                learning_rate=3e-4,
                lr_scheduler_type="constant",
                gradient_checkpointing=False,
                bf16=own.dtype == "bf16",
                use_cpu=True,
                dataloader_pin_memory=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
            callbacks=[callback(clock)],
        )
        trainer.data_collator = clock.counting(trainer.data_collator)
        done = trainer.train()
    first, a = own.warmup, own.accumulation
    counts = clock.counts[first * a : (first + own.steps) * a]
    return {
        "peer": f"TRL {trl.__version__} SFTTrainer",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": own.threads,
        "seconds": steps_of(clock.seconds, first),
        "cpu_seconds": steps_of(clock.cpu, first),
        "scored": sum(scored for scored, _ in counts),
        "computed": sum(computed for _, computed in counts),
        "loss": done.training_loss,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def steps_of(clock: list[float], first: int) -> list[float]:
    """What each step took, from the end of the one before it to its own, without the first few."""
    return [b - a for a, b in zip(clock[first:], clock[first + 1 :], strict=False)]


class Clock:
    """Wall and CPU seconds at the start and after each step; (scored, computed) tokens of each
    micro-batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.counts: list[tuple[int, int]] = []

    def read(self) -> None:
        self.seconds.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def counting(self, collate: Any) -> Any:
        """A collator that counts: position i is predicted from those before it, the first by none."""

        def counted(examples: list[dict]) -> dict:
            batch = collate(examples)
            labels = batch["labels"]
            self.counts.append((int((labels[:, 1:] != -100).sum()), labels.numel()))
            return batch

        return counted


def callback(clock: Clock) -> Any:
    import transformers

    class Callback(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.read()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.read()

    return Callback()


def tokenizer() -> Any:
    """TRL wants one, for the padding token alone: the rows are ids already."""
    import tokenizers
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(
            tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
        ),
        pad_token="<pad>",
        eos_token="<eos>",
    )


if __name__ == "__main__":
    result = main()
    sys.stdout.flush()
    print(json.dumps(result), flush=True)
