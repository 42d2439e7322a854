"""Speed, products and bytes of whole models as transformers runs them, one CPU thread, float32.

Prefill of 256 tokens, then 16 decoded ones one by one. The models take turns, and the median of the
CPU time of each counts, which other programs on the machine change less than the wall time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.figures import in_turns, print_table, say
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.api import load

FIRST_TOKEN = 1000
"""Tokens are consecutive numbers from this one on, modulo the vocabulary: speed does not depend on
them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", type=Path, nargs="+", help="dense or compressed")
    parser.add_argument("--prefill", metavar="TOKENS", type=int, default=256)
    parser.add_argument("--decode", metavar="TOKENS", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    ways: dict[str, Callable[[], tuple[float, float]]] = {}
    for directory in options.models:
        name = str(directory)
        model = load(name, dtype=torch.float32)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = (FIRST_TOKEN + torch.arange(options.prefill)[None]) % vocabulary
        found[name] = {
            "bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
            "flops_per_token": flops_per_token(model),
        }
        ways[name] = lambda m=model, i=ids: seconds(m, i, options.decode)
    say(f"{options.turns} turns")
    for name, times in in_turns(ways, options.turns).items():
        prefill, decode = (statistics.median(each) for each in zip(*times, strict=True))
        found[name]["prefill_tokens_per_second"] = options.prefill / prefill
        found[name]["decode_tokens_per_second"] = options.decode / decode
    show(found)
    return {"models": found}


@torch.inference_mode()
def flops_per_token(model: torch.nn.Module) -> int:
    """Count the products of one token without others before it; a multiply-add counts two."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([[1]]), use_cache=False)
    return counter.get_total_flops()


@torch.inference_mode()
def seconds(model: torch.nn.Module, ids_BT: torch.Tensor, decoded: int) -> tuple[float, float]:
    """Return the CPU seconds of one prefill, and of this number of decoding steps after it."""
    start = time.process_time()
    cache = model(input_ids=ids_BT, use_cache=True).past_key_values
    middle = time.process_time()
    for _ in range(decoded):
        cache = model(input_ids=ids_BT[:, -1:], past_key_values=cache).past_key_values
    return middle - start, time.process_time() - middle


def show(found: dict[str, dict[str, Any]]) -> None:
    rows = [("", "file", "products per token", "prefill", "decode")]
    for name, each in found.items():
        speeds = (each[f"{part}_tokens_per_second"] for part in ("prefill", "decode"))
        size, flops = each["bytes"] / 1e6, each["flops_per_token"] / 1e6
        shown = (f"{speed:.3g} tokens/s" for speed in speeds)
        rows.append((name, f"{size:.0f} MB", f"{flops:.0f} MFLOPs", *shown))
    print_table(rows)
