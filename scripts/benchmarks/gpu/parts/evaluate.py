"""`evaluate` of a model alone and against itself, compared with transformers on the CPU."""

import math
from pathlib import Path

import pipeline as helpers
import torch
from benchmarks.gpu.bench import Bench, Check, PartResult
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.api import evaluate
from orchestrator.models.inputs.text import load_tokens

TEXT = {"samples": 3, "sequence_length": 48}


def measure(bench: Bench) -> PartResult:
    directory = bench.work / "evaluate"
    model = helpers.write_llama(directory / "model", blocks=3, hidden=32)
    text = str(helpers.write_text(directory / "text.txt"))
    given = {"text": text, "executor": "local", **TEXT}
    alone = evaluate(model, run_dir=directory / "alone", **given)
    beside = evaluate(model, against=model, run_dir=directory / "beside", **given)
    ours = alone["models"]["model"]["perplexity"]
    expected = reference(model, text)
    figures = {"perplexity": ours, "reference": expected, "alone": alone, "against": beside}
    checks = (
        Check("perplexity apart from transformers on the CPU", abs(ours / expected - 1), 1e-4),
        Check("same perplexity against itself", beside["models"]["against"]["perplexity"] == ours),
        Check("KL divergence from itself", abs(beside["kl"]), 1e-6),
        Check("top-1 agreement with itself", beside["top1_agreement"] == 1),
    )
    return PartResult(f"perplexity {ours:.4f}, by transformers {expected:.4f}", figures, checks)


@torch.no_grad()
def reference(model: Path, text: str) -> float:
    """exp of the mean over windows of the mean loss, by the plain model on the CPU."""
    windows = load_tokens(text, tokenizer=AutoTokenizer.from_pretrained(model), **TEXT)
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    losses = []
    for ids_T in torch.from_numpy(windows.ids).long():
        losses.append(float(plain(ids_T[None], labels=ids_T[None]).loss))
    return math.exp(sum(losses) / len(losses))
