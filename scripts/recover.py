"""Train a compressed model on a text and write it in the same form and size.

SVD-LLM's two steps (arXiv 2403.07378): LoRA on the outer factors of every linear with the inner
ones frozen, merged, then on the inner ones. With --all-linear one adapter on all linears found by
PEFT, for as many steps as both together. Needs `pip install 'orchestrator[recovery]'`.
"""

import argparse
import os
from pathlib import Path

# set before transformers is imported, which reads them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from orchestrator.hf import load, recovery_targets
from orchestrator.models.inputs.text import load_tokens
from orchestrator.models.inputs.tokenizer import load_tokenizer

CLIP_NORM = 1.0


def main() -> None:
    options = parse()
    tokenizer = load_tokenizer(options.model)
    tokens = load_tokens(
        options.text,
        tokenizer=tokenizer,
        samples=2 * options.steps * options.batch,
        sequence_length=options.sequence_length,
        sampling="random",
    )
    ids_NT = torch.from_numpy(tokens.ids).long()
    torch.manual_seed(0)
    model = load(options.model)
    stored_dtype = model.dtype
    # the change of a weight per step is below the resolution of bfloat16
    model.to(torch.float32)
    if options.all_linear:
        steps = [("all-linear", {"target_modules": "all-linear"}, ids_NT)]
    else:
        factors = zip(("weight", "down"), ids_NT.chunk(2), strict=True)
        steps = [(factor, recovery_targets(model, factor), part) for factor, part in factors]
    for name, targets, part_NT in steps:
        config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, **targets)
        adapted = get_peft_model(model, config)
        train(adapted, name, part_NT.split(options.batch), options.learning_rate)
        model = adapted.merge_and_unload()
    model.to(stored_dtype).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


def train(model: torch.nn.Module, name: str, batches: tuple[Tensor, ...], rate: float) -> None:
    """Train one pass with AdamW over batches of tokens [B, T]; the rate falls linearly to zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    print(f"{name}: {sum(p.numel() for p in parameters):,} values of adapters", flush=True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=len(batches))
    model.train()
    for step, ids_BT in enumerate(batches, 1):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"{name}: step {step} of {len(batches)}, loss {loss.item():.3f}", flush=True)
    model.eval()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory of the compressed model")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--text", required=True, help=".txt, .jsonl, .parquet or a directory")
    parser.add_argument("--steps", type=int, default=100, help="of each factor (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step (%(default)s)")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="(%(default)s)")
    parser.add_argument("--all-linear", action="store_true", help="what PEFT finds by itself")
    return parser.parse_args()


if __name__ == "__main__":
    main()
