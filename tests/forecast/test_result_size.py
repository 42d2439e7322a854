"""Forecast of the result's values and bytes, against what is written."""

import pytest
from pipeline import run, write_llama, write_text
from safetensors.torch import load_file

from orchestrator.api import plan
from orchestrator.recipe.recipe import Recipe


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama4") / "dense", blocks=4)


def test_the_values_of_the_result_are_those_that_are_written(llama_dir, tmp_path):
    """The budget is met from below, so a run writes no more values than its forecast."""
    text = write_text(tmp_path / "text.txt")
    result = run(llama_dir, tmp_path / "out", text, keep=0.6)
    given = {"method": "svd-llm", "keep": 0.6, "samples": 6, "sequence_length": 48}
    expected = plan(Recipe(model=str(llama_dir), out="o", **given)).final["values"]
    written = result.report["values"]["model_after"]
    assert expected - result.report["values"]["slack"] == written


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("wanda", {"keep": 0.6}),
        ("wanda", {"keep_bytes": 0.6}),
        ("svd-llm", {"keep": 0.6, "storage": "pivoted"}),
    ],
)
def test_the_bytes_of_the_result_are_those_on_disk(method, fields, llama_dir, tmp_path):
    """Indices included; the budget is met from below, here up to 2 %."""
    asked = {"method": method, "keep": None, **fields}
    text = write_text(tmp_path / "text.txt")
    result = run(llama_dir, tmp_path / "out", text, **asked)
    asked |= {"samples": 6, "sequence_length": 48}
    expected = plan(Recipe(model=str(llama_dir), out="o", **asked)).result_bytes
    stored = load_file(result.out / "model.safetensors").values()
    written = sum(tensor.nbytes for tensor in stored)
    assert 0.98 * expected < written <= expected
