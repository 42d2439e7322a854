"""Accuracy on ARC-Easy and LAMBADA without examples, by log-likelihood, in this process.

Shape suffixes: B choices, T tokens, V vocabulary.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARC_FILE = "arc/arc_easy_test.jsonl"
LAMBADA_FILE = "lambada/lambada_openai_test.jsonl"


def sample(path: Path, count: int) -> list[dict[str, Any]]:
    """Read evenly spaced lines of a .jsonl file, starting with the first."""
    with path.open(encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    stride = max(1, len(items) // count)
    return items[::stride][:count]


def arc_easy(model: Any, tokenizer: Any, items: Sequence[dict[str, Any]]) -> float:
    """Return the fraction of questions whose right choice has the largest log-likelihood."""
    right = 0
    for item in items:
        question = f"Question: {item['question']}\nAnswer:"
        choices = [f" {choice}" for choice in item["choices"]]
        scores, _ = continuations(model, tokenizer, question, choices)
        right += scores.index(max(scores)) == item["gold"]
    return right / len(items)


def lambada(model: Any, tokenizer: Any, items: Sequence[dict[str, Any]]) -> float:
    """Return the fraction of passages whose last word is the model's greedy choice."""
    right = 0
    for item in items:
        _, greedy = continuations(
            model, tokenizer, item["context"], [" " + item["continuation"].strip()]
        )
        right += greedy[0]
    return right / len(items)


@torch.no_grad()
def continuations(
    model: Any, tokenizer: Any, context: str, texts: Sequence[str]
) -> tuple[list[float], list[bool]]:
    """Return, for each text after the context, its log-likelihood, and True if it is the greedy
    choice."""
    start = len(tokenizer(context)["input_ids"])
    rows = [tokenizer(context + text)["input_ids"] for text in texts]
    longest = max(len(row) for row in rows)
    # padding after a row is never attended to by earlier tokens
    tokens_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    logits_BTV: Tensor = model(input_ids=tokens_BT).logits.float()
    scores, greedy = [], []
    for row, logits_TV in zip(rows, logits_BTV, strict=True):
        wanted = torch.tensor(row[start:])
        before_TV = logits_TV[start - 1 : len(row) - 1]
        likelihoods_TV = before_TV.log_softmax(-1)
        scores.append(float(likelihoods_TV.gather(1, wanted[:, None]).sum()))
        greedy.append(bool((before_TV.argmax(-1) == wanted).all()))
    return scores, greedy
