"""`orchestrator bench`: speed of a model, alone or beside the dense one."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from orchestrator.bench.linears import linear_rows
from orchestrator.bench.models import model_rows
from orchestrator.bench.roofline import Roofline
from orchestrator.device.timing import MOST_ROUNDS, Stopwatch
from orchestrator.errors import InputError, UsageError
from orchestrator.hf import load
from orchestrator.models.checkpoint.weights import parse_dtype

FORMAT_VERSION = 1
DECODED = MOST_ROUNDS + 1
"""Tokens that are decoded after a sequence."""
MOST_TOKENS = 4096
"""Tokens of a measured linear, at most: from there on a product's speed does not change."""


def benchmark(
    models: Mapping[str, Path],
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    dtype: str,
    threads: int,
) -> dict[str, Any]:
    """Measure whole models and the linears of `model`, on a GPU if there is one.

    Args:
        models: `model`, and `against` for the dense one.
        batches: Numbers of sequences.
        lengths: Tokens of each sequence in prefill, and before the token that is decoded.
        dtype: Name of the dtype of both models; `auto` is that of each checkpoint.
        threads: Threads of a CPU.

    Raises:
        UsageError: A number is below 1.
        InputError: A model cannot be loaded, has not that many positions, or memory is too small.
    """
    for name, numbers in (("batch", batches), ("length", lengths), ("threads", [threads])):
        if not numbers or min(numbers) < 1:
            raise UsageError(f"{name} is {list(numbers)}; every number must be 1 or above")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _benchmark(models, batches, lengths, dtype)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"memory is too small for both models at {max(batches)} sequences of {max(lengths)} "
            "tokens; give a smaller --batch or --length, or leave --against out"
        ) from error
    finally:
        torch.set_num_threads(before)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar of the weights that it loads."""
    is_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_enabled:
            logging.enable_progress_bar()


def _benchmark(
    models: Mapping[str, Path], batches: Sequence[int], lengths: Sequence[int], dtype: str
) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = parse_dtype(dtype)
    with _without_bars():
        loaded = {
            name: load(path, dtype="auto" if asked is None else asked).to(device).eval()
            for name, path in models.items()
        }
    for name, model in loaded.items():
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and max(lengths) + DECODED > positions:
            raise InputError(
                f"{models[name]}: has {positions} positions, of which {DECODED} are decoded; "
                f"--length is {max(lengths)}, and {positions - DECODED} at most"
            )
    model = loaded["model"]
    limits = Roofline.measure(model.dtype, device)
    passed = {*batches, *(min(b * n, MOST_TOKENS) for b in batches for n in lengths)}
    linears = list(linear_rows(model, sorted(passed), limits, device))
    whole = list(model_rows(loaded, batches, lengths, limits=limits, device=device))
    is_gpu = device.type == "cuda"
    return {
        "format_version": FORMAT_VERSION,
        "models": {
            name: {
                "path": str(models[name]),
                "parameters": sum(p.numel() for p in each.parameters()),
                "dtype": str(each.dtype).removeprefix("torch."),
            }
            for name, each in loaded.items()
        },
        "device": torch.cuda.get_device_name() if is_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "clock": "processor" if Stopwatch(device).is_processor else "wall",
        "torch": torch.__version__,
        "limits": limits.to_json(),
        "whole": [with_reasons(row, linears) for row in whole],
        "linears": linears,
    }


def with_reasons(row: Mapping[str, Any], linears: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add to a row of whole models why the compressed one is slower, where it is.

    The reasons are those of its linears at as many tokens, by kind, with their number.
    """
    if row.get("speed", 1) >= 1:
        return {**row, "why": []}
    passed = row["batch"] * (row["length"] if row["phase"] == "prefill" else 1)
    same = [each for each in linears if each["tokens"] == min(passed, MOST_TOKENS)]
    kinds: Counter[str] = Counter()
    for each in same:
        kinds.update({reason.partition(":")[0]: each["count"] for reason in each["why"]})
    total = sum(each["count"] for each in same)
    why = [f"{kind} ({count} of {total} linears)" for kind, count in kinds.most_common()]
    return {**row, "why": why or ["its linears are not slower: what is around them, or noise"]}
