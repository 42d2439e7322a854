"""Models in vLLM, in this process, and their answers to the prompts of a reference."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.model_executor.models import ModelRegistry

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
    know_class(Path(model))
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


def know_class(model: Path) -> None:
    """Import the class of a model here; vLLM looks at it in another process, for half a minute."""
    for name in json.loads((model / "config.json").read_text())["architectures"]:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def check_answers(
    llm: LLM, reference: Mapping[str, Any], *, prompt_scores: bool = True, **options: Any
) -> None:
    """Compare greedy continuations and log-probabilities with the reference's.

    Args:
        prompt_scores: Compare the log-probabilities of the prompts too, which vLLM cannot give on a
            CPU if adapters are enabled.
    """
    parameters = SamplingParams(
        temperature=0,
        max_tokens=len(reference["continued"][0]),
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if prompt_scores else None,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in reference["prompts"]]
    outputs = llm.generate(prompts, parameters, use_tqdm=False, **options)
    assert [list(each.outputs[0].token_ids) for each in outputs] == reference["continued"]
    for number, output in enumerate(outputs):
        (answer,) = output.outputs
        check_scores(answer.logprobs, answer.token_ids, reference["chosen"][number])
        if prompt_scores:
            asked = reference["prompts"][number][1:]
            check_scores(output.prompt_logprobs[1:], asked, reference["scores"][number])
            # a model that ignores its weights would give all tokens nearly the same
            assert max(reference["scores"][number]) - min(reference["scores"][number]) > 1


def check_scores(found: Any, tokens: Sequence[int], expected: Sequence[float]) -> None:
    """Compare the log-probabilities of tokens."""
    for entry, token, score in zip(found, tokens, expected, strict=True):
        assert abs(entry[token].logprob - score) < TOLERANCE


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
