"""Runs for the pages."""

import pytest
from pipeline import run, with_tokenizer, write_text

from orchestrator import api

NAME = '<b>&"model'
"""Name of the model, to be escaped in a page."""


@pytest.fixture(scope="package")
def runs(checkpoint, tmp_path_factory):
    """Two compressions from one run directory, the first of them evaluated."""
    root = tmp_path_factory.mktemp("pages")
    model = with_tokenizer(checkpoint("llama"), root / NAME)
    text = write_text(root / "text.txt")
    first = run(model, root / "first", text, keep=0.6, method="mgaa", run_dir=str(root / "run"))
    api.evaluate(
        first.out,
        against=model,
        text=str(text),
        samples=3,
        sequence_length=48,
        executor="local",
    )
    second = run(model, root / "second", text, keep=0.5, samples=4, run_dir=str(root / "run"))
    return first, second
