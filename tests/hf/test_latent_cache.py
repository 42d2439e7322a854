"""Caches of latents: tokens and logits are those of the cache of transformers, in fewer bytes."""

import copy
from functools import partial

import pytest
import torch
from compressed import TOKENS
from families import FAMILIES
from image_text.families import IMAGE_FAMILIES
from moe.families import MOE_FAMILIES
from transformers import AutoModelForCausalLM, DynamicCache

from orchestrator.errors import InputError, UsageError
from orchestrator.hf import latent_attention, latent_cache
from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.models.forms.pivoted import PivotedLinear

RANK = 4
NEAR = {"rtol": 0, "atol": 2e-6}
"""Tolerance of logits in float32, whose largest is about 1."""
ALL_FULL = ("llama", "mistral", "qwen2", "qwen3", "opt", "mixtral", "qwen3_moe")
"""Families whose layers have no sliding window here."""
SLIDING = {"gemma2": 2, "gemma3": 2}
"""Families with both kinds of layers, and their number of full ones."""
SHARED = partial(LowRankLinear, shares_basis=True)
PADDED = torch.tensor([[0, 0, 0, 7, 8, 9, 4, 5], [5, 6, 7, 8, 9, 3, 2, 1]])
"""Two texts, the first with padding at its left."""
MASK = (PADDED > 0).long()


def low_rank(dense, generator, form=LowRankLinear):
    """Return a linear of rank 4 in the place of one, with factors of no special kind."""
    made = form(dense.in_features, dense.out_features, RANK, bias=dense.bias is not None)
    with torch.no_grad():
        for each in made.parameters():
            each.copy_(torch.randn(each.shape, generator=generator) * each.shape[-1] ** -0.5)
        # latents of very different sizes
        made.weight[:, 0] *= 30
        made.down.weight[0] /= 30
        if form is PivotedLinear:
            made.index.copy_(torch.randperm(dense.out_features, generator=generator))
    return made


def make(family, parts=("k_proj", "v_proj"), form=LowRankLinear):
    """Return a tiny model with these linears of low rank, and scores that differ from token to
    token; a Mistral has no window."""
    generator = torch.Generator().manual_seed(0)
    model = {**FAMILIES, **MOE_FAMILIES, **IMAGE_FAMILIES}[family]()
    if family == "mistral":
        model.config.sliding_window = None
        model = type(model)(model.config)
    for attention in [each for each in model.modules() if hasattr(each, "q_proj")]:
        with torch.no_grad():
            attention.q_proj.weight.copy_(
                torch.randn(attention.q_proj.weight.shape, generator=generator)
            )
            attention.v_proj.weight *= 20
        for part in parts:
            setattr(attention, part, low_rank(getattr(attention, part), generator, form))
    return model.eval()


def decoded(model, cache, parts=(4, 1, 2, 1), tokens=PADDED, mask=MASK):
    """Return the logits of all tokens, read in parts."""
    logits, start = [], 0
    for count in parts:
        end = start + count
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
        given = {"attention_mask": mask[:, :end], "position_ids": positions}
        with torch.no_grad():
            out = model(tokens[:, start:end], past_key_values=cache, use_cache=True, **given)
        logits.append(out.logits)
        start = end
    return torch.cat(logits, dim=1)


def generated(model, cache, **options):
    with torch.no_grad():
        return model.generate(
            PADDED,
            attention_mask=MASK,
            past_key_values=cache,
            max_new_tokens=12,
            eos_token_id=None,
            **options,
        )


@pytest.mark.parametrize("keys", [False, True], ids=["values", "keys and values"])
@pytest.mark.parametrize("family", ALL_FULL)
def test_logits_and_tokens_are_those_of_the_full_cache(family, keys):
    """In parts, with padding at the left; bytes are those of the formula, which the tensors have;
    greedy and beam search give the same tokens, and the positions matter."""
    model = make(family)
    full = DynamicCache(config=model.config)
    expected = decoded(model, full)
    every = sum(each.keys.nbytes + each.values.nbytes for each in full.layers)
    if keys:
        assert latent_attention(latent_attention(model)) is model
    cache = latent_cache(model)
    torch.testing.assert_close(decoded(model, cache), expected, **NEAR)
    tokens, blocks = PADDED.numel(), len(cache.layers)
    assert cache.dense_bytes_a_token * tokens == every
    position = 0 if family == "opt" else 4
    latents = 4 * RANK * 2 + position if keys else 4 * RANK + every // (2 * tokens * blocks)
    assert cache.bytes_a_token == blocks * latents
    assert cache.stored_bytes == tokens * cache.bytes_a_token < every
    for options in ({}, {"num_beams": 3}):
        found = generated(model, latent_cache(model), do_sample=False, **options)
        assert torch.equal(found, generated(model, None, do_sample=False, **options))
    if position:
        shifted = PADDED.roll(1, 1)
        moved = decoded(model, DynamicCache(config=model.config), tokens=shifted)
        assert (moved[:, 1:] - expected[:, :-1]).abs().max() > 100 * NEAR["atol"]


@pytest.mark.parametrize(
    "form", [LowRankLinear, PivotedLinear, SHARED], ids=["low", "pivoted", "shared"]
)
@pytest.mark.parametrize("parts", [("k_proj",), ("v_proj",), ("k_proj", "v_proj")])
def test_either_may_be_dense_and_factors_pivoted(form, parts):
    """A dense linear's outputs are stored whole, and its cache is exact as well; so is that of
    a basis that linears share."""
    model = make("qwen2", parts, form)
    expected = decoded(model, DynamicCache(config=model.config))
    if "v_proj" in parts:
        torch.testing.assert_close(decoded(model, latent_cache(model)), expected, **NEAR)
    cache = latent_cache(latent_attention(model))
    torch.testing.assert_close(decoded(model, cache), expected, **NEAR)
    assert cache.bytes_a_token == 4 * 4 * (RANK * len(parts) + 16 * (2 - len(parts))) + (
        16 if "k_proj" in parts else 0
    )


def test_the_language_model_of_llava_has_one():
    """The attention of its vision tower is left alone; tokens are the same."""
    model = make("llava")
    full, cache = DynamicCache(config=model.config), latent_cache(latent_attention(model))
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}
    found = model.generate(TOKENS, past_key_values=cache, **options)
    assert torch.equal(found, model.generate(TOKENS, past_key_values=full, **options))
    assert cache.bytes_a_token == len(cache.layers) * (4 * 2 * RANK + 4)


@pytest.mark.parametrize("family", SLIDING)
def test_layers_with_a_window_are_left_alone(family):
    """The others are latent, and nothing changes beyond the window."""
    model = make(family)
    cache = latent_cache(model if family == "gemma3" else latent_attention(model))
    expected = decoded(model, DynamicCache(config=model.config))
    torch.testing.assert_close(decoded(model, cache), expected, **NEAR)
    assert sum(type(each).__name__ == "LatentLayer" for each in cache.layers) == SLIDING[family]
    assert cache.stored_bytes <= PADDED.numel() * cache.bytes_a_token


@pytest.mark.parametrize("keys", [False, True], ids=["values", "keys and values"])
def test_how_a_text_is_cut_changes_nothing(keys):
    """A prefill in two parts is one prefill, and so is one whose last tokens were taken back; a
    copy, a reset cache, repeated and chosen sequences go on as new ones would."""
    model = make("llama")
    if keys:
        latent_attention(model)
    expected = decoded(model, latent_cache(model), parts=(8,))
    for parts in ((5, 3), (1,) * 8):
        torch.testing.assert_close(decoded(model, latent_cache(model), parts), expected, **NEAR)
    cache = latent_cache(model)
    decoded(model, cache, parts=(4, 2))
    twin = copy.deepcopy(cache)
    assert twin.layers[0].parts[1] is cache.layers[0].parts[1]
    cache.crop(-4)
    rest = {"attention_mask": MASK, "past_key_values": cache}
    rest["position_ids"] = (MASK.cumsum(1) - 1)[:, 2:].clamp(min=0)
    with torch.no_grad():
        torch.testing.assert_close(model(PADDED[:, 2:], **rest).logits, expected[:, 2:], **NEAR)
    twin.batch_repeat_interleave(2)
    twin.batch_select_indices(torch.tensor([3, 0]))
    rest |= {"attention_mask": MASK[[1, 0]], "past_key_values": twin}
    rest["position_ids"] = (MASK.cumsum(1) - 1)[[1, 0], 6:]
    with torch.no_grad():
        found = model(PADDED[[1, 0], 6:], **rest).logits
    torch.testing.assert_close(found, expected[[1, 0], 6:], **NEAR)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(decoded(model, cache, (4, 4)), expected, **NEAR)


def test_sixteen_bits_lose_no_more_than_the_full_cache():
    """In bfloat16, with positions above 256, which it cannot count: errors against float32 are at
    most twice those of the full cache in bfloat16."""
    model = make("llama")
    mask = torch.ones(1, 9, dtype=torch.long)
    tokens = PADDED[1:].repeat(1, 2)[:, :9]

    def logits(cache):
        found = []
        for start, end in ((0, 5), (5, 9)):
            positions = torch.arange(300 + start, 300 + end)[None]
            given = {"attention_mask": mask[:, :end], "position_ids": positions}
            with torch.no_grad():
                out = model(tokens[:, start:end], past_key_values=cache, use_cache=True, **given)
            found.append(out.logits.float())
        return torch.cat(found, dim=1)

    exact = logits(DynamicCache(config=model.config))
    model.to(torch.bfloat16)
    allowed = 2 * (logits(DynamicCache(config=model.config)) - exact).abs().max()
    assert (logits(latent_cache(model)) - exact).abs().max() < allowed
    assert (logits(latent_cache(latent_attention(model))) - exact).abs().max() < allowed


def test_a_compressed_checkpoint_generates_with_it(halved):
    """Loaded by stock transformers, with and without: the same tokens, and fewer bytes."""
    for family in ("llama", "qwen3", "opt"):
        model = AutoModelForCausalLM.from_pretrained(halved(family).directory)
        cache = latent_cache(latent_attention(model))
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        found = model.generate(TOKENS, past_key_values=cache, **options)
        assert torch.equal(found, model.generate(TOKENS, **options))
        assert cache.bytes_a_token < 0.45 * cache.dense_bytes_a_token
        assert cache.stored_bytes == cache.bytes_a_token * (found.shape[1] - 1)


def test_what_saves_nothing_or_is_unknown_is_refused():
    """Dense linears, sliding windows alone, latents that are as large with their positions, other
    attentions and rotations, factors on a disk, positions that are not told, another model."""
    with pytest.raises(UsageError, match="takes 512 bytes with latents and positions, and 512"):
        latent_cache(FAMILIES["llama"]())
    with pytest.raises(UsageError, match="takes 512 bytes with latents"):
        latent_cache(latent_attention(FAMILIES["mistral"]()))
    wide = make("llama", ("k_proj",))
    for block in wide.model.layers:
        block.self_attn.k_proj = LowRankLinear(32, 16, 15, bias=False)
    with pytest.raises(UsageError, match="takes 512 bytes with latents and positions, and 512"):
        latent_cache(latent_attention(wide))
    for refused in (latent_cache, latent_attention):
        with pytest.raises(UsageError, match=r"has no attention of Gemma2, .*Llama, Mistral"):
            refused(FAMILIES["phi3"]())
    model = make("llama")
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(UsageError, match="is 'dynamic', which changes with the length"):
        latent_attention(model)
    cache = latent_cache(latent_attention(make("llama")))
    with pytest.raises(InputError, match="no hook has told the inputs"):
        make("llama")(PADDED, past_key_values=cache)
    told = make("qwen3")
    with pytest.raises(
        InputError, match="latent cache: made for keys and values of 16 and 16 numbers"
    ):
        latent_attention(told)(PADDED, past_key_values=latent_cache(latent_attention(model_of())))
    elsewhere = make("llama")
    elsewhere.model.layers[1].self_attn.v_proj.to("meta")
    with pytest.raises(InputError, match="are offloaded"):
        latent_cache(elsewhere)


def model_of():
    """Return a Llama whose keys are stored whole."""
    return make("llama", ("v_proj",))
