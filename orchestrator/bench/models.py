"""Times of whole models, in prefill and in decoding.

Shape suffixes: B sequences, T tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from orchestrator.bench.roofline import Roofline
from orchestrator.device.timing import Times, in_turn
from orchestrator.models.forms.base import FormLinear


def model_rows(
    models: Mapping[str, Any],
    batches: Sequence[int],
    lengths: Sequence[int],
    *,
    limits: Roofline,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Measure models in turn: a row for each phase, number of sequences and length.

    Prefill is a pass of `length` tokens that gives the logits of the last one; decoding a pass of
    one token after `length` others, of which the cache has keys and values.
    """
    vocabulary = next(iter(models.values())).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        for batch in batches:
            drawn_BT = torch.randint(vocabulary, (batch, length), generator=generator)
            tokens_BT = drawn_BT.to(device)
            with torch.inference_mode():
                times = in_turn({n: _prefill(m, tokens_BT) for n, m in models.items()}, device)
                yield _row("prefill", tokens_BT, times, models, limits=limits)
                steps = {name: _decode(model, tokens_BT) for name, model in models.items()}
                yield _row("decode", tokens_BT, in_turn(steps, device), models, limits=limits)


def _prefill(model: Any, tokens_BT: Tensor) -> Callable[[], object]:
    is_cut = "logits_to_keep" in inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if is_cut else {}
    return lambda: model(input_ids=tokens_BT, use_cache=False, **last)


def _decode(model: Any, tokens_BT: Tensor) -> Callable[[], object]:
    """Return a pass of one token; each makes the cache one token longer, in all models alike."""
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens_BT, past_key_values=cache, use_cache=True)
    next_BT = tokens_BT[:, :1]
    return lambda: model(input_ids=next_BT, past_key_values=cache, use_cache=True)


def _row(
    phase: str,
    tokens_BT: Tensor,
    times: Mapping[str, Times],
    models: Mapping[str, Any],
    *,
    limits: Roofline,
) -> dict[str, Any]:
    batch, length = tokens_BT.shape
    passed = batch * (length if phase == "prefill" else 1)
    row: dict[str, Any] = {"phase": phase, "batch": batch, "length": length, "models": {}}
    for name, each in times.items():
        row["models"][name] = {
            "seconds": each.median,
            "spread": each.spread,
            "tokens_per_second": passed / each.median,
            "least_seconds": least_seconds(models[name], passed, batch, limits),
        }
    if "against" in times:
        row["speed"] = times["against"].median / times["model"].median
    return row


def least_seconds(model: Any, tokens: int, heads: int, limits: Roofline) -> float:
    """Return the sum of the least times of all linears; attention, norms and caches are left out.

    Args:
        tokens: Tokens that pass the blocks.
        heads: Tokens that pass the head: the last one of each sequence.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    total, inner = 0.0, set[nn.Module]()
    for module in model.modules():
        if isinstance(module, FormLinear):
            inner.update(each for each in module.modules() if each is not module)
        is_linear = isinstance(module, FormLinear | nn.Linear) and module.weight is not None
        if module in inner or not is_linear:
            continue
        values = sum(p.numel() for n, p in module.named_parameters() if n != "bias")
        passed = heads if module is head else tokens
        total += limits.seconds(passed, values, passed * (module.in_features + module.out_features))
    return total
