"""Shards of models of images and text give the bits of the whole model, images included."""

from functools import cache

import pytest
import torch
from image_text.families import IMAGE_FAMILIES
from image_text.inputs import image_chunk
from sharded import HALVES, padded_chunk, sharded_logits, whole_logits
from transformers import AutoModelForImageTextToText

from orchestrator.errors import InputError
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.calibration import Calibration

THIRDS = (range(0, 1), range(1, 3), range(3, 4))


@pytest.fixture(scope="module")
def whole(checkpoint):
    """A family's whole model; not to be changed."""
    return cache(
        lambda family: AutoModelForImageTextToText.from_pretrained(checkpoint(family)).eval()
    )


def image_logits(model, chunk):
    with torch.no_grad():
        mask_BT = chunk.mask.long()
        return model(input_ids=chunk.tokens, attention_mask=mask_BT, **chunk.inputs).logits


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_shards_give_the_bits_of_the_whole_model(checkpoint, whole, family):
    """With an image and padding, packed and unpacked at every boundary; and text alone."""
    lazy_model, chunk = LazyModel.open(checkpoint(family)), image_chunk(family)
    expected_BTV = image_logits(whole(family), chunk)
    other_BTV = image_logits(whole(family), image_chunk(family, image=1))
    assert not torch.equal(expected_BTV[:, -5], other_BTV[:, -5])
    for cuts in (HALVES, THIRDS):
        assert torch.equal(sharded_logits(lazy_model, chunk, cuts), expected_BTV)
    text = padded_chunk("right")
    assert torch.equal(sharded_logits(lazy_model, text, HALVES), whole_logits(whole(family), text))


def test_shards_with_experts_agree_with_the_whole_model(checkpoint, whole):
    """Qwen3-VL-MoE with an image in two and three shards, up to the order of multiplication; the
    experts of every block count the tokens of text and image, each as often as it is routed."""
    family, chunk = "qwen3_vl_moe", image_chunk("qwen3_vl_moe")
    lazy_model = LazyModel.open(checkpoint(family))
    expected_BTV = image_logits(whole(family), chunk)
    bound = 2e-6 * float(expected_BTV.abs().max())
    for cuts in (HALVES, THIRDS):
        found_BTV = sharded_logits(lazy_model, chunk, cuts)
        torch.testing.assert_close(found_BTV, expected_BTV, rtol=0, atol=bound)
    with lazy_model.shard(HALVES[0]) as shard:
        calibration = Calibration(shard, shard.linears, lambda linear, beside: "input")
        calibration.forward(chunk)
        for block in shard.blocks:
            linears = [each for each in shard.linears if each.block == block]
            counts = calibration.expert_tokens(linears)
            assert len(counts) == 4
            assert sum(counts.values()) == 2 * int(chunk.mask.sum())
        calibration.close()


def test_bfloat16_gives_the_bits_of_the_whole_model(checkpoint):
    """Features travel in the model's dtype; pixels are cast by the tower itself."""
    family, chunk = "qwen3_vl", image_chunk("qwen3_vl")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(family), dtype=torch.bfloat16)
    lazy_model = LazyModel.open(checkpoint(family), dtype=torch.bfloat16)
    assert torch.equal(sharded_logits(lazy_model, chunk, THIRDS), image_logits(model, chunk))


def test_the_vision_tower_runs_in_the_first_shard_alone(checkpoint):
    """Only the first shard loads the tower, at the first image; pixels do not travel further."""
    lazy_model, chunk = LazyModel.open(checkpoint("llava")), image_chunk("llava")
    tower = "model.vision_tower.embeddings.patch_embedding.weight"
    with lazy_model.shard(THIRDS[0]) as shard:
        shard.forward(padded_chunk("none"))
        assert tower not in shard.parameters()
        passed = shard.forward(chunk)
        assert not shard.parameters()[tower].requires_grad
        shard.free_ends()
        assert tower not in shard.parameters()
        again = shard.forward(chunk)
    assert torch.equal(again.payload.output, passed.payload.output)
    assert chunk.inputs["pixel_values"].numel()
    assert passed.inputs["pixel_values"].numel() == 0
    packed = passed.pack()
    assert sum(array.nbytes for array in packed.values()) < chunk.inputs["pixel_values"].nbytes
    with lazy_model.shard(THIRDS[1]) as shard:
        shard.forward(Chunk.unpack(packed))
        assert tower not in shard.parameters()


def test_features_are_dropped_behind_the_last_block_that_reads_them(checkpoint):
    """Qwen3-VL adds features behind blocks 0, 1 and 2: a packed chunk of 24 patches loses its
    embedded ones behind block 0, and one of the others behind each later block."""
    lazy_model, chunk = LazyModel.open(checkpoint("qwen3_vl")), image_chunk("qwen3_vl")
    one = 6 * 32 * 4  # tokens of the image, channels, bytes
    sizes = []
    with lazy_model.shard(range(0, 4)) as shard:
        for block in range(3):
            chunk = shard.forward(chunk, part=range(block, block + 1))
            arrays = chunk.pack()
            sizes.append(sum(array.nbytes for n, array in arrays.items() if n != "structure"))
            chunk = Chunk.unpack(arrays)
    # a tensor that is dropped leaves one value
    assert [sizes[0] - each for each in sizes] == [0, one - 4, 2 * (one - 4)]
    (features,) = chunk.features
    assert not features["pooler_output"][0].any()
    assert [bool(each[0].any()) for each in features["deepstack_features"]] == [False, False, True]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3_vl"])
def test_gradients_are_those_of_the_whole_model(checkpoint, family):
    """Backward through two shards, features taken as constants, gives the language model's
    gradients to the bit; none reaches the tower."""
    chunk = image_chunk(family)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(family))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name or "lm_head" in name)
    logits_BTV = model(
        input_ids=chunk.tokens, attention_mask=chunk.mask.long(), **chunk.inputs
    ).logits
    grad_BTV = torch.randn(logits_BTV.shape, generator=torch.Generator().manual_seed(2))
    logits_BTV.backward(grad_BTV)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    lazy_model = LazyModel.open(checkpoint(family))
    with lazy_model.shard(HALVES[0]) as first:
        middle = Chunk.unpack(first.forward(chunk).pack())
    with lazy_model.shard(HALVES[1]) as last:
        grads = last.backward(middle, [grad_BTV])
        found = {name: p.grad for name, p in last.parameters().items()}
    with lazy_model.shard(HALVES[0]) as first:
        assert first.backward(chunk, grads) == []
        given = {name: p.grad for name, p in first.parameters().items() if p.grad is not None}
    tied = lazy_model.names.tied
    found |= {name: grad for name, grad in given.items() if name not in tied.values()}
    for name, grad in expected.items():
        if name not in tied.values():
            assert torch.equal(found[name], grad), name
    assert given.keys() <= expected.keys()


def test_a_model_of_text_refuses_images(checkpoint):
    """One line says what was given to what."""
    inputs = image_chunk("llava").inputs
    chunk = Chunk(0, torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool))
    with (
        LazyModel.open(checkpoint("llama")).shard(HALVES[0]) as shard,
        pytest.raises(InputError, match="LlamaForCausalLM reads no images; give"),
    ):
        shard.forward(Chunk(0, chunk.tokens, chunk.mask, inputs=inputs))
