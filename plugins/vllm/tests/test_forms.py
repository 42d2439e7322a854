"""Tokens and log-probabilities of every form and family are those of transformers."""

import pytest
from serving import check_answers, served

CASES = [
    "dense",
    "low-rank",
    "low-rank-and-dense",
    "pivoted",
    "pivoted-and-dense",
    "mixed",
    "sparse",
    "low-rank-and-sparse",
    "every-form",
    "shared-bases",
    "biases",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
]


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_transformers(name, reference):
    """Greedy tokens are equal; log-probabilities differ by less than 1e-4."""
    expected = reference(name)
    with served(expected["model"]) as llm:
        check_answers(llm, expected)


@pytest.mark.parametrize("name", ["mixed", "low-rank-and-sparse"])
def test_an_adapter_of_the_dense_model_comes_on_top(name, reference):
    """The wrapper of a layer adds its term to what the compressed linears give."""
    from vllm.lora.request import LoRARequest

    expected = reference(f"{name}-adapted")
    with served(expected["model"], enable_lora=True, max_lora_rank=8, max_loras=1) as llm:
        request = LoRARequest("adapter", 1, expected["adapter"])
        check_answers(llm, expected, prompt_scores=False, lora_request=request)
        check_answers(llm, reference(name), prompt_scores=False)
