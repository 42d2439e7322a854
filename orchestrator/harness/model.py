"""A loaded model as lm-evaluation-harness calls it."""

from collections.abc import Callable
from typing import Any

from lm_eval.models.huggingface import HFLM

CPU_BATCH = 8
"""Sequences of a forward pass on a CPU; on a GPU the harness looks for the largest number."""


class HarnessModel(HFLM):  # type: ignore[misc] # the harness has no types
    """Model of the harness that reports its passes.

    `on_pass` is called after every forward pass or generation with the number of requests so far
    and of all of them; requests that share a pass count once.
    """

    on_pass: Callable[[int, int], None]

    def __init__(self, model: Any, tokenizer: Any) -> None:
        batch = CPU_BATCH if model.device.type == "cpu" else "auto"
        # stands in front of documents without a context; the harness needs one
        has_prefix = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
        prefix = None if has_prefix else 0
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch, prefix_token_id=prefix
        )
        self._done = self._total = 0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._done, self._total = 0, len(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._done, self._total = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_call(self, inps: Any, *arguments: Any, **named: Any) -> Any:
        logits = super()._model_call(inps, *arguments, **named)
        self._report(len(inps))
        return logits

    def _model_generate(self, context: Any, *arguments: Any, **named: Any) -> Any:
        generated = super()._model_generate(context, *arguments, **named)
        self._report(len(context))
        return generated

    def _report(self, requests: int) -> None:
        self._done += requests
        self.on_pass(min(self._done, self._total), self._total)
