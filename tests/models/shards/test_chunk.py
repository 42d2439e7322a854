"""Packing of chunks for transfer between processes."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from orchestrator.models.shards.chunk import BlockState, Chunk
from orchestrator.models.survey.trees import map_tensors

TOKENS = torch.arange(8).reshape(2, 4)
MASK = torch.tensor([[True] * 4, [True, True, False, False]])
EVERY_16_BITS = torch.arange(-(2**15), 2**15).to(torch.int16)


def bits(tensor):
    """Bytes of a tensor, for comparisons in which NaN equals itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same(first, second):
    assert (first.index, type(first.payload)) == (second.index, type(second.payload))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.mask, second.mask)
    if first.payload is not None:
        pairs = zip(first.payload.tensors(), second.payload.tensors(), strict=True)
        for one, other in pairs:
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(bits(one), bits(other))


def shape_of(tree):
    return map_tensors(lambda tensor: tuple(tensor.shape), tree)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_bit_pattern_survives(dtype):
    """All 65536 values of a 16-bit dtype are restored bit for bit, NaN payloads included."""
    hidden_BTI = EVERY_16_BITS.view(dtype).reshape(2, 4, -1)
    chunk = Chunk(3, TOKENS, MASK, BlockState(hidden_BTI))
    assert_same(Chunk.unpack(load(save(chunk.pack()))), chunk)


@pytest.mark.parametrize(
    "payload",
    [
        None,
        BlockState(torch.ones(2, 4, 3)),
        BlockState((torch.ones(2, 4, 3), None)),
        BlockState((torch.ones(2, 4, 3, dtype=torch.bfloat16), None, (torch.zeros(2), 1.5))),
        BlockState(torch.ones(2, 4, 3), {"shared": {"full": (torch.ones(1), torch.zeros(0, 2))}}),
        BlockState(torch.ones(4, 2).T, {"shared": {0: [torch.tensor(1.0)], 1: "text"}}),
    ],
)
def test_the_structure_survives(payload):
    """Tuples, None, numbers and mappings around the tensors are restored."""
    chunk = Chunk(0, TOKENS, MASK, payload)
    back = Chunk.unpack(load(save(chunk.pack())))
    assert_same(back, chunk)
    if payload is not None:
        assert shape_of(back.payload.output) == shape_of(payload.output)
        assert shape_of(back.payload.extras) == shape_of(payload.extras)


def test_packing_does_not_copy():
    """The arrays of a packed chunk share the memory of its tensors."""
    hidden_BTI = torch.zeros(2, 4, 3, dtype=torch.bfloat16)
    arrays = Chunk(0, TOKENS, MASK, BlockState(hidden_BTI)).pack()
    addresses = {array.__array_interface__["data"][0] for array in arrays.values()}
    assert {hidden_BTI.data_ptr(), TOKENS.data_ptr(), MASK.data_ptr()} <= addresses


def test_unpacking_read_only_arrays_gives_writable_tensors():
    """A chunk unpacked from shared memory is writable, and the shared memory does not change."""
    arrays = Chunk(0, TOKENS, MASK, BlockState(torch.zeros(2, 4, 3))).pack()
    frozen = {
        name: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) for name, a in arrays.items()
    }
    chunk = Chunk.unpack(frozen)
    for tensor in [chunk.tokens, *chunk.payload.tensors()]:
        tensor += 1
    assert_same(Chunk.unpack(frozen), Chunk(0, TOKENS, MASK, BlockState(torch.zeros(2, 4, 3))))


def test_unsupported_objects_are_refused():
    """A state with an object that is not a tensor, container or JSON scalar raises TypeError."""
    with pytest.raises(TypeError, match="cannot carry a object"):
        Chunk(0, TOKENS, MASK, BlockState((torch.ones(1), object()))).pack()
