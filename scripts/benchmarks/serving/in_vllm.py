"""Models in vLLM: python in_vllm.py JOB, in an environment with vLLM and orchestrator-vllm.

The job is a JSON with the directories of `checkpoints`, `turns`, and the file `out` for what
`phases.seconds` returns. All engines are in this process, eager, as vLLM's scheduler calls them.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.serving.phases import CONTEXT, PROMPT, STEPS, decoded, seconds

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # small helpers of the sampler are compiled otherwise, for a minute
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_AOT_COMPILE": "0",
}


class ServedModel:
    """A model in an engine, whose steps are called one by one."""

    def __init__(self, directory: str, turns: int) -> None:
        from vllm import LLM

        self.most = max(PROMPT + 1, CONTEXT + decoded(turns) + 2)
        self.engine = LLM(
            directory,
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=self.most,
            max_num_batched_tokens=max(2048, self.most),
            kv_cache_memory_bytes=256 << 20,
            enable_prefix_caching=False,
            # a step ends when its tokens are there
            async_scheduling=False,
        ).llm_engine
        self.requests = 0

    def ask(self, length: int, tokens: int) -> str:
        """Add a request of a number of tokens after a prompt; returns its identifier."""
        from vllm import SamplingParams

        self.requests += 1
        name = str(self.requests)
        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        prompt = {"prompt_token_ids": [number % 27 for number in range(length)]}
        self.engine.add_request(name, prompt, parameters)
        return name

    def prefill(self) -> Callable[[], object]:
        """Return a request of one token after `PROMPT` others."""

        def run() -> None:
            self.ask(PROMPT, 1)
            while self.engine.has_unfinished_requests():
                self.engine.step()

        return run

    def decode(self, batch: int) -> Callable[[], object]:
        """Return `STEPS` steps with requests that have their first token; earlier ones end."""
        self.engine.abort_request([str(number) for number in range(1, self.requests + 1)])
        for _ in range(batch):
            self.ask(CONTEXT, self.most - CONTEXT)
        self.engine.step()

        def run() -> None:
            for _ in range(STEPS):
                outputs = self.engine.step()
                assert len(outputs) == batch, f"{len(outputs)} of {batch} sequences in a step"

        return run


def main() -> None:
    import torch

    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    turns = job["turns"]
    models = {name: ServedModel(path, turns) for name, path in job["checkpoints"].items()}
    Path(job["out"]).write_text(json.dumps(seconds(models, turns)))


if __name__ == "__main__":
    main()
