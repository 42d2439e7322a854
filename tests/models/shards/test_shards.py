"""Shards: loaded and freed tensors, hooks, and the state passed between blocks."""

import weakref

import pytest
import torch
from compressed import compress
from families import VOCABULARY, write_model
from sharded import HALVES, padded_chunk, sharded_logits, whole_logits, whole_model
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

import orchestrator.hf  # noqa: F401 # a compressed checkpoint is loaded whole
from orchestrator.errors import InputError
from orchestrator.models.evaluation.speed import DECODED_TOKENS, decode_seconds
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel


@pytest.fixture
def lazy_model(checkpoint):
    return LazyModel.open(checkpoint("llama"))


def test_a_shard_holds_its_own_tensors_and_no_others(lazy_model):
    """It loads its blocks, the front for the first block, the tail for the last; others take no
    memory."""
    for blocks in [range(0, 1), range(1, 3), range(3, 4)]:
        expected = [name for block in blocks for name in lazy_model.block_names(block)]
        expected += lazy_model.front_names if blocks.start == 0 else ()
        expected += lazy_model.tail_names if blocks.stop == 4 else ()
        with lazy_model.shard(blocks) as shard:
            assert set(shard.parameters()) == set(expected)
            parameters = dict(lazy_model._empty_model.model.named_parameters())
            in_memory = {n for n, p in parameters.items() if p.untyped_storage().nbytes() > 8}
            on_meta = {n for n, p in parameters.items() if p.is_meta}
            assert in_memory - on_meta == set(expected)


def test_decoding_is_measured_in_turn(checkpoint):
    """After both prompts each token passes one model, then the other, whose turn is first next; a
    text that is too short is not measured."""
    models = {name: LazyModel.open(checkpoint("llama")) for name in "ab"}
    shards = {name: model.shard(range(model.num_blocks)) for name, model in models.items()}
    passed = []
    for name, shard in shards.items():
        shard.on_output = lambda _, name=name: passed.append(name)
    chunk = Chunk(0, torch.arange(24)[None] % VOCABULARY, torch.ones(1, 24, dtype=torch.bool))
    found = decode_seconds(shards, dict.fromkeys(shards, chunk), torch.device("cpu"))
    assert passed == [*"ab", *"abba" * (DECODED_TOKENS // 2)]
    assert all(seconds > 0 for seconds in found.values())
    short = Chunk(0, chunk.tokens[:, :8], chunk.mask[:, :8])
    none = decode_seconds(shards, dict.fromkeys(shards, short), torch.device("cpu"))
    assert none == {"a": None, "b": None}
    for shard in shards.values():
        shard.close()


def test_closing_a_shard_frees_its_weights(lazy_model):
    """After closing, no object of the package refers to a parameter of the shard."""
    with lazy_model.shard(range(1, 3)) as shard:
        held = [weakref.ref(parameter) for parameter in shard.parameters().values()]
        assert all(reference() is not None for reference in held)
    assert all(reference() is None for reference in held)


def test_shards_are_opened_one_at_a_time(lazy_model):
    """A second open shard, a closed one, and invalid ranges of blocks are errors of the caller."""
    with lazy_model.shard(range(1, 3)) as shard:
        with pytest.raises(ValueError, match="still open"):
            lazy_model.shard(range(3, 4))
        with pytest.raises(ValueError, match="no state"):
            shard.forward(padded_chunk("none"))
        with pytest.raises(ValueError, match="logits need the last block"):
            shard.logits(padded_chunk("none"))
    with pytest.raises(ValueError, match="is closed"):
        shard.forward(padded_chunk("none"))
    for blocks in [range(2, 2), range(3, 5), range(0, 4, 2)]:
        with pytest.raises(ValueError, match="not a contiguous range of 4 blocks"):
            lazy_model.shard(blocks)


def test_forward_does_not_change_its_chunk(lazy_model):
    """The same chunk gives the same bits a second time."""
    with lazy_model.shard(HALVES[0]) as shard:
        chunk = shard.forward(padded_chunk("left"))
    before = chunk.payload.output.clone()
    with lazy_model.shard(HALVES[1]) as shard:
        first, second = shard.forward(chunk), shard.forward(chunk)
    assert torch.equal(chunk.payload.output, before)
    assert torch.equal(first.payload.output, second.payload.output)
    assert not second.payload.output.requires_grad


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hooks_on_linears_see_what_the_whole_model_feeds_them(checkpoint, family):
    """Pre-hooks on a shard's modules fire once per chunk, with the whole model's bits."""
    chunk, lazy_model = padded_chunk("right"), LazyModel.open(checkpoint(family))
    with lazy_model.shard(HALVES[0]) as shard:
        middle = shard.forward(chunk)
    expected, seen = {}, {}

    def monitor(module, name, into):
        hook = lambda module, args: into.setdefault(name, []).append(args[0])  # noqa: E731
        return module.register_forward_pre_hook(hook)

    model = whole_model(checkpoint(family), torch.float32)
    with lazy_model.shard(HALVES[1]) as shard:
        assert shard.linears == tuple(x for x in lazy_model.survey().linears if x.block >= 2)
        for linear in shard.linears:
            monitor(model.get_submodule(linear.name), linear.name, expected)
            monitor(shard.module(linear.name), linear.name, seen)
        shard.forward(middle)
        with pytest.raises(ValueError, match="is not in blocks"):
            shard.module(lazy_model.survey().linears[0].name)
    whole_logits(model, chunk)
    assert list(seen) == [linear.name for linear in shard.linears]
    for name, inputs in seen.items():
        assert len(inputs) == 1
        assert torch.equal(inputs[0], expected[name][0])
    for linear in shard.linears:
        assert torch.equal(seen[linear.name][0], seen[linear.site][0])


def test_state_besides_the_hidden_states_is_passed_on(tmp_path):
    """Gemma 4 shares keys and values between blocks and embeds tokens in each: same bits."""
    config = Gemma4TextConfig(
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=6,
        pad_token_id=0,
    )
    write_model(lambda: Gemma4ForCausalLM(config), tmp_path)
    lazy_model, chunk = LazyModel.open(tmp_path), padded_chunk("left")
    expected_BTV = whole_logits(whole_model(tmp_path, torch.float32), chunk)
    assert torch.equal(sharded_logits(lazy_model, chunk, HALVES), expected_BTV)
    with lazy_model.shard(HALVES[0]) as shard:
        assert set(shard.forward(chunk).payload.extras) == {"shared_kv_states"}
    with lazy_model.shard(HALVES[1]) as shard:
        assert set(lazy_model.front_names) <= set(shard.parameters())


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compressed_checkpoint_runs_shard_by_shard(checkpoint, tmp_path, family, dtype):
    """Shards give the bits of the compressed checkpoint loaded whole; it has no survey."""
    directory = compress(checkpoint(family), tmp_path / "out").directory
    lazy_model, chunk = LazyModel.open(directory, dtype=dtype), padded_chunk("left")
    expected_BTV = whole_logits(whole_model(directory, dtype), chunk)
    assert torch.equal(sharded_logits(lazy_model, chunk, HALVES), expected_BTV)
    assert lazy_model.is_compressed
    with pytest.raises(InputError, match="already compressed by orchestrator"):
        lazy_model.survey()


def test_the_default_dtype_is_that_of_the_config(checkpoint):
    """Weights are cast to the dtype of the computation from any stored dtype."""
    for dtype in [None, torch.bfloat16, torch.float16]:
        lazy_model = LazyModel.open(checkpoint("qwen3"), dtype=dtype)
        assert lazy_model.dtype == (dtype or torch.float32)
        with lazy_model.shard(range(1, 2)) as shard:
            assert {p.dtype for p in shard.parameters().values()} == {lazy_model.dtype}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_shards_on_a_gpu_give_the_bits_of_the_whole_model(checkpoint):
    """Every family in bfloat16 agrees bit for bit with the whole model on the same device."""
    device = torch.device("cuda")
    for family in ["llama", "gemma2", "gemma3", "gpt2", "opt", "falcon"]:
        model = whole_model(checkpoint(family), torch.bfloat16).to(device)
        lazy_model = LazyModel.open(checkpoint(family), dtype=torch.bfloat16, device=device)
        for padding in ["none", "right", "left"]:
            chunk = padded_chunk(padding)
            moved = Chunk(chunk.index, chunk.tokens.to(device), chunk.mask.to(device))
            expected_BTV = whole_logits(model, moved)
            assert torch.equal(sharded_logits(lazy_model, chunk, HALVES), expected_BTV)
