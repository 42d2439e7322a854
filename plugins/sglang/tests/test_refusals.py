"""Checkpoints and requests that are refused by SGLang's own loader, each with a sentence."""

import pytest
from safetensors.torch import load_file, save_file

FORMS = "quantization_config"
UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("name", ["down.weight", "weight"])
def test_a_tensor_that_is_not_stored(name, load, reference, tmp_path):
    """SGLang does not miss it: what memory held would be multiplied with."""
    from loading import changed

    copy = changed(reference("low-rank")["model"], tmp_path / "copy", lambda _: None)
    tensors = load_file(copy / "model.safetensors")
    del tensors[f"{UP}.{name}"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=f"{UP}: {name} is not stored"):
        load(copy)


def test_all_tensors_of_a_linear_under_a_name_that_sglang_drops(load, reference, tmp_path):
    """SGLang drops names that it does not know without an error; the check finds what lacks."""
    from loading import changed

    copy = changed(reference("low-rank")["model"], tmp_path / "copy", lambda _: None)
    tensors = load_file(copy / "model.safetensors")
    renamed = {
        name.replace("layers.1.mlp.up_", "layers.1.mlp.upper_"): tensors[name] for name in tensors
    }
    save_file(renamed, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=f"{UP}: .*weight is not stored"):
        load(copy)


CHANGES = {
    "format": (
        lambda forms: forms.update(format_version=4),
        "format_version: found 4, this program reads 1 to 3",
    ),
    "form": (
        lambda forms: forms["modules"].update({UP: {"form": "folded"}}),
        "found .*folded.*, need a form: low_rank",
    ),
    "basis": (
        lambda forms: forms["modules"].update(
            {UP: {"form": "low_rank", "rank": 3, "basis": "elsewhere"}}
        ),
        "found basis 'elsewhere', need a low_rank linear",
    ),
    "head": (
        lambda forms: forms["modules"].update(lm_head={"form": "low_rank", "rank": 3}),
        "lm_head: a ParallelLMHead cannot be compressed",
    ),
    "other": (
        lambda forms: forms["modules"].update(
            {"model.layers.9.mlp.up_proj": {"form": "low_rank", "rank": 2}}
        ),
        "layers.9.mlp.up_proj: SGLang's model has no such linear",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_configs_of_something_else(name, load, reference, tmp_path):
    """A newer format, an unknown form, linears that are not compressed or not there."""
    from loading import changed

    change, sentence = CHANGES[name]
    model = reference("low-rank")["model"]
    copy = changed(model, tmp_path / "copy", lambda config: change(config[FORMS]))
    with pytest.raises(Exception, match=sentence):
        load(copy)


def test_weights_are_loaded_once(load, reference):
    """SGLang would replace the dense weights and keep the compressed ones."""
    path = reference("mixed")["model"]
    model = load(path)
    tensors = load_file(f"{path}/model.safetensors")
    with pytest.raises(Exception, match="compressed weights are loaded once"):
        model.load_weights(tensors.items())
    method = model.model.layers[0].self_attn.qkv_proj.quant_method
    with pytest.raises(Exception, match="compressed weights are loaded once"):
        method.restore_weights_before_loading(model)


def test_several_ranks(load):
    """A part of a layer for each rank is not tried yet."""
    from sglang.srt.layers.linear import LinearBase, _LogicalGroup

    from orchestrator_sglang.config import ServedConfig
    from orchestrator_sglang.shared.forms.base import StoredForm

    config = ServedConfig({"o_proj": StoredForm(form="low_rank", rank=2)}, {})
    layer = LinearBase(32, 32, quant_config=config, prefix="o_proj")
    layer.tp_group = _LogicalGroup(rank_in_group=0, world_size=2)
    with pytest.raises(Exception, match="o_proj: compressed linears are not divided over ranks"):
        layer.quant_method.create_weights(layer, 16, [32], 32, 32, layer.params_dtype)


def test_another_release_of_sglang(load, reference, monkeypatch):
    """The method is known and refuses, before weights are read."""
    import sglang

    import orchestrator_sglang

    monkeypatch.setattr(sglang, "__version__", "0.5.24")
    sentence = "found SGLang 0.5.24, this version serves with SGLang 0.5.23"
    try:
        orchestrator_sglang.register()
        with pytest.raises(Exception, match=sentence):
            load(reference("mixed")["model"])
    finally:
        monkeypatch.undo()
        orchestrator_sglang.register()


def test_without_the_package(load, reference, monkeypatch):
    """SGLang refuses the method before it reads weights."""
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS

    monkeypatch.delitem(QUANTIZATION_METHODS, "orchestrator")
    with pytest.raises(ValueError, match="Unknown quantization method: orchestrator"):
        load(reference("mixed")["model"])
