"""Models in vLLM, in this process, and their answers to the prompts of a reference."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

TOLERANCE = 1e-4
"""Difference of a log-probability in float32 by two implementations."""


@contextmanager
def served(model: str | Path, **options: Any) -> Iterator[LLM]:
    """Load a model, and take it down again.

    vLLM checks that every parameter is loaded, which it leaves out for quantized models by default.
    """
    small = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,
        "model_loader_extra_config": {"enable_weights_track": True},
    }
    llm = None
    try:
        llm = LLM(str(model), **(small | options))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def check_answers(llm: LLM, reference: Mapping[str, Any], **options: Any) -> None:
    """Compare greedy continuations, and log-probabilities of the prompts, with the reference's."""
    parameters = SamplingParams(
        temperature=0,
        max_tokens=len(reference["continued"][0]),
        ignore_eos=True,
        prompt_logprobs=0,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in reference["prompts"]]
    outputs = llm.generate(prompts, parameters, use_tqdm=False, **options)
    assert [list(each.outputs[0].token_ids) for each in outputs] == reference["continued"]
    for output, prompt, scores in zip(
        outputs, reference["prompts"], reference["scores"], strict=True
    ):
        found = [
            entry[token].logprob
            for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        ]
        differences = [abs(a - b) for a, b in zip(found, scores, strict=True)]
        assert max(differences) < TOLERANCE
        # a model that has learned nothing from its prompt would pass as another one
        assert max(scores) - min(scores) > 1


def changed(
    model: str | Path, directory: Path, change: Callable[[dict[str, Any]], None], *, weights: bool
) -> Path:
    """Copy a checkpoint, with another config and, if asked for, its weights."""
    directory.mkdir()
    for path in Path(model).iterdir():
        if path.suffix == ".json" or (weights and path.suffix == ".safetensors"):
            shutil.copy(path, directory)
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))
    return directory
