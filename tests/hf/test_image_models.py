"""Models of images and text: compressed on text alone, and loaded with stock transformers."""

import json

import pytest
import torch
from image_text.families import IMAGE_FAMILIES, IMAGE_MOE_FAMILIES
from image_text.inputs import image_inputs
from image_text.processors import COMPANIONS
from moe.stored import assert_same
from transformers import AutoModelForImageTextToText

import orchestrator
from orchestrator.hf.export import export_dense
from orchestrator.hub.push import prepare


def logits(model, family):
    tokens_BT, inputs = image_inputs(family)
    with torch.no_grad():
        return model(input_ids=tokens_BT, **inputs).logits


def assert_equal(family, found, expected):
    """Assert equal bits; with experts up to the order of multiplication."""
    if family in IMAGE_MOE_FAMILIES:
        assert_same(found, expected)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", [*IMAGE_FAMILIES, *IMAGE_MOE_FAMILIES])
def test_a_compressed_model_reads_images(compressed_images, family, tmp_path):
    """Stock transformers load it, generate from an image, and save the same model again."""
    model = AutoModelForImageTextToText.from_pretrained(compressed_images(family))
    expected = logits(model, family)
    assert expected.isfinite().all()

    tokens_BT, inputs = image_inputs(family)
    made = model.generate(input_ids=tokens_BT, **inputs, max_new_tokens=2, do_sample=False)
    assert made[0, tokens_BT.shape[1]] == expected[0, -1].argmax()

    model.save_pretrained(tmp_path / "again")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert_equal(family, logits(again, family), expected)


def test_experts_without_the_plug_in_stop_the_load(compressed_images, fork, tmp_path):
    """Transformers alone refuses compressed experts of Qwen3-VL-MoE, whose tensors it converts; it
    loads them with the code of the checkpoint."""
    program = """
import torch
from transformers import AutoModelForImageTextToText
try:
    AutoModelForImageTextToText.from_pretrained(sys.argv[1])
except RuntimeError:
    model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
    print(type(model.model.language_model.layers[0].mlp.experts).__name__)
"""
    (done,) = fork("import sys\n" + program, compressed_images("qwen3_vl_moe"), directory=tmp_path)
    assert done.stdout.split()[-1] == "Experts", done.stderr


@pytest.mark.parametrize("family", ["llava", "qwen3_vl_moe"])
def test_load_and_export_know_the_class(compressed_images, family, tmp_path):
    """`load` gives the numbers of the auto class; the dense export agrees up to the order of
    multiplication."""
    model = AutoModelForImageTextToText.from_pretrained(compressed_images(family))
    expected = logits(model, family)
    assert_equal(family, logits(orchestrator.load(compressed_images(family)), family), expected)
    export_dense(compressed_images(family), tmp_path / "export")
    exported = logits(orchestrator.load(tmp_path / "export"), family)
    bound = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(exported, expected, rtol=0, atol=bound)


def test_only_linears_of_the_language_model_are_compressed(compressed_images):
    """Vision tower and projector are the dense model's to the bit."""
    out = compressed_images("llava")
    before = AutoModelForImageTextToText.from_pretrained(out.parent / "dense").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(out).state_dict()
    for name, tensor in before.items():
        is_linear = name.startswith("model.language_model.layers.") and "norm" not in name
        assert is_linear or torch.equal(after[name], tensor)
    modules = json.loads((out / "config.json").read_bytes())["quantization_config"]["modules"]
    assert len(modules) == 28
    assert all(name.startswith("model.language_model.layers.") for name in modules)


def test_the_processor_is_copied_and_pushed(compressed_images, tmp_path):
    """Files of the processor lie in the output, in its export, and among those of a push."""
    out = compressed_images("llava")
    export_dense(out, tmp_path / "export")
    pushed, _ = prepare(out, "someone/tiny", print)
    for name, content in COMPANIONS.items():
        assert (out / name).read_text() == content
        assert (tmp_path / "export" / name).read_text() == content
        assert name in pushed


def test_cards_show_the_auto_class_that_reads_images(compressed_images):
    """The card, that of a push, and the config name `AutoModelForImageTextToText`."""
    out = compressed_images("llava")
    for card in ((out / "README.md").read_text(), prepare(out, "someone/tiny", print)[1]):
        assert "\npipeline_tag: image-text-to-text\n" in card
        assert "AutoModelForImageTextToText.from_pretrained(" in card
        assert "AutoProcessor.from_pretrained(" in card
    module = "modeling_orchestrator"
    assert json.loads((out / "config.json").read_bytes())["auto_map"] == {
        "AutoConfig": f"{module}.LlavaConfig",
        "AutoModelForCausalLM": f"{module}.LlavaForConditionalGeneration",
        "AutoModelForImageTextToText": f"{module}.LlavaForConditionalGeneration",
    }
