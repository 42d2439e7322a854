"""Trace of a model's structure."""

import pytest
from families import _llama, write_model
from transformers import MllamaConfig, MllamaForConditionalGeneration

from orchestrator.errors import InputError
from orchestrator.models.shards import traces
from orchestrator.models.shards.lazy_model import LazyModel


@pytest.fixture
def without_traces(monkeypatch):
    """Every opening traces the model anew, as a process of its own would."""
    kept = {}
    monkeypatch.setattr(traces, "KEPT_TRACES", 1)
    monkeypatch.setattr(traces, "_traces", kept)
    return kept


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


def test_a_model_that_skips_blocks_without_an_image_is_refused(tmp_path):
    """Mllama runs its blocks of cross-attention for images alone; one line says which."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, 1]],
        "intermediate_layers_indices": [0],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = _llama(cross_attention_layers=[1], rope_parameters=rope)
    config = MllamaConfig(vision_config=vision, text_config=text)
    write_model(lambda: MllamaForConditionalGeneration(config), tmp_path)
    with pytest.raises(InputError, match="skips block 1 of 4 where there is no image; only"):
        LazyModel.open(tmp_path)
