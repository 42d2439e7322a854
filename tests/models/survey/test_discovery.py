"""Trace of a model's structure."""

import pytest

from orchestrator.models.shards import lazy_model
from orchestrator.models.shards.lazy_model import LazyModel


@pytest.fixture
def without_traces(monkeypatch):
    """Every opening traces the model anew, as a process of its own would."""
    monkeypatch.setattr(lazy_model, "KEPT_TRACES", 1)
    traces = {}
    monkeypatch.setattr(lazy_model, "_traces", traces)
    return traces


def test_every_trace_of_a_model_finds_the_same_tensors(checkpoint, without_traces):
    """Placeholders that were freed during a trace are not mistaken for tensors made later, in
    whatever memory those lie: files of a checkpoint follow from the model alone."""
    found = set()
    for _ in range(20):
        without_traces.clear()
        model = LazyModel.open(checkpoint("llava"))
        found.add((model.tensors(), model.front_names, model.tail_names))
    ((_, _, tail),) = found
    assert tail == ("model.language_model.norm.weight", "lm_head.weight")
