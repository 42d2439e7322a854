"""Checkpoints and requests that are refused, each with a sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import vllm
from safetensors.torch import load_file, save_file
from serving import changed, served
from vllm.model_executor.layers.quantization import register_quantization_config

import orchestrator_vllm

FORMS = "quantization_config"
UP = "model.layers.1.mlp.up_proj"


def test_a_tensor_that_is_not_stored(reference, tmp_path):
    """What memory held would be multiplied with otherwise."""
    copy = changed(reference("low-rank")["model"], tmp_path / "copy", lambda _: None, weights=True)
    tensors = load_file(copy / "model.safetensors")
    del tensors[f"{UP}.down.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=f"{UP}: down.weight is not stored"), served(copy):
        pass


def test_a_linear_that_the_model_lacks(reference, tmp_path):
    """The config is another model's."""

    def change(config):
        config[FORMS]["modules"]["model.layers.9.mlp.up_proj"] = {"form": "low_rank", "rank": 2}

    copy = changed(reference("low-rank")["model"], tmp_path / "copy", change, weights=True)
    sentence = r"layers.9.mlp.up_proj: vLLM's model has no such"
    with pytest.raises(Exception, match=sentence), served(copy):
        pass


CHANGES = {
    "format": (
        lambda config: config[FORMS].update(format_version=4),
        "format_version: found 4, this program reads 1 to 3",
    ),
    "form": (
        lambda config: config[FORMS]["modules"].update({UP: {"form": "folded"}}),
        "found .*folded.*, need a form: low_rank",
    ),
    "basis": (
        lambda config: config[FORMS]["modules"].update(
            {UP: {"form": "low_rank", "rank": 3, "basis": "elsewhere"}}
        ),
        "found basis 'elsewhere', need a low_rank linear",
    ),
    "head": (
        lambda config: config[FORMS]["modules"].update(lm_head={"form": "low_rank", "rank": 3}),
        "lm_head: a ParallelLMHead cannot be compressed",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_configs_are_refused_before_weights_are_read(name, reference, tmp_path):
    """The directories have no weights."""
    change, sentence = CHANGES[name]
    copy = changed(reference("low-rank")["model"], tmp_path / "copy", change, weights=False)
    with pytest.raises(Exception, match=sentence), served(copy):
        pass


@pytest.mark.parametrize("name", ["experts", "bloom"])
def test_models_whose_layers_are_not_served(name, checkpoints):
    """Experts in one tensor, and projections that the loader of a model puts in another order."""
    sentence = {"experts": "compressed experts are not served", "bloom": "in another order"}
    with pytest.raises(Exception, match=sentence[name]), served(checkpoints / "configs" / name):
        pass


def test_a_loader_that_puts_rows_in_order(reference):
    """It would leave the rows of factors as they are, and heads would be mixed."""
    sentence = r"query_key_value\S+: vLLM's loader of this model puts rows in another order"
    with pytest.raises(Exception, match=sentence), served(reference("falcon")["model"]):
        pass


def test_weights_are_loaded_once(reference):
    """What the checkpoint's names led to is gone."""
    again = pytest.raises(Exception, match="compressed weights are loaded once")
    with served(reference("mixed")["model"]) as llm, again:
        llm.collective_rpc("reload_weights")


def test_another_release_of_vllm(reference, monkeypatch):
    """Under another minor release the method refuses, and other models are served."""
    from orchestrator_vllm.config import METHOD, ServedConfig

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    try:
        orchestrator_vllm.register()
        model, sentence = reference("mixed")["model"], "found vLLM 0.33.0, this version serves with"
        with pytest.raises(Exception, match=sentence), served(model):
            pass
    finally:
        register_quantization_config(METHOD)(ServedConfig)


def test_without_the_package(reference, tmp_path):
    """vLLM refuses the method before a weight is read: the directory has none."""
    copy = changed(reference("mixed")["model"], tmp_path / "copy", lambda _: None, weights=False)
    code = f"from serving import served\nwith served({str(copy)!r}): pass"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLLM_PLUGINS": "none"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "Unknown quantization method: orchestrator" in done.stderr + done.stdout
