"""Models in transformers, as `orchestrator.load` gives them.

Shape suffixes: B sequences, T tokens.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from benchmarks.serving.phases import CONTEXT, PROMPT, STEPS, seconds
from transformers import DynamicCache
from transformers.utils import logging

from orchestrator.api import load


class LoadedModel:
    """A model in float32."""

    def __init__(self, directory: Path) -> None:
        self.model = load(str(directory), dtype=torch.float32)

    def tokens(self, batch: int, length: int) -> torch.Tensor:
        """Return tokens [B, T]: speed does not depend on them."""
        vocabulary = self.model.config.vocab_size
        return (torch.arange(batch * length) % vocabulary).view(batch, length)

    @torch.inference_mode()
    def prefill(self) -> Callable[[], object]:
        """Return a pass of `PROMPT` tokens that gives the logits of the last one."""
        tokens_BT = self.tokens(1, PROMPT)

        def run() -> None:
            with torch.inference_mode():
                self.model(input_ids=tokens_BT, use_cache=True, logits_to_keep=1)

        return run

    @torch.inference_mode()
    def decode(self, batch: int) -> Callable[[], object]:
        """Return `STEPS` passes of one token for each sequence, the most likely one."""
        cache = DynamicCache(config=self.model.config)
        next_BT = self.tokens(batch, CONTEXT)

        def run(steps: int = STEPS) -> None:
            nonlocal next_BT
            with torch.inference_mode():
                for _ in range(steps):
                    output = self.model(
                        input_ids=next_BT, past_key_values=cache, use_cache=True, logits_to_keep=1
                    )
                    next_BT = output.logits[:, -1:].argmax(dim=-1)

        run(1)
        return run


def measure(checkpoints: Mapping[str, Path], turns: int) -> dict[str, dict[str, list[float]]]:
    """Measure checkpoints in turns; see `phases.seconds`."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    return seconds({name: LoadedModel(path) for name, path in checkpoints.items()}, turns)
