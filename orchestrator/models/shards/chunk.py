"""Chunk of calibration tokens, passed from shard to shard.

A chunk contains the token ids and the mask of a few sequences, the other inputs of their images,
and the state after the last block that was run: hidden states in most families, more in some. It
packs into numpy arrays that cross
processes without a copy (Ray's object store, safetensors) and are restored bit for bit.

Shape suffixes: B sequences, T tokens each, N real tokens, C channels.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from orchestrator.device.transport import Departure, bring
from orchestrator.models.survey.trees import map_tensors

SEPARATOR = ":"
"""Between the name of a chunk and that of its array, in a record of several chunks."""


@dataclass(frozen=True, slots=True)
class BlockState:
    """State at a block boundary: the output of one block, the input of the next.

    `output` is the block's unchanged return value: a tensor, or a tuple of tensors, None and
    tuples. `extras` are the contents of the mappings that blocks also write to, by the name of the
    block's argument (the shared keys and values of Gemma 4).
    """

    output: Any
    extras: dict[str, dict[Any, Any]] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in a fixed order."""
        found: list[Tensor] = []
        map_tensors(lambda tensor: found.append(tensor), [self.output, self.extras])
        return found

    def map(self, function: Any) -> "BlockState":
        """Apply `function` to every tensor, in the order of `tensors`; keeps the structure."""
        output, extras = map_tensors(function, [self.output, self.extras])
        return BlockState(output, extras)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of a few sequences, their mask, and their state at a block boundary."""

    index: int
    """Position in the calibration data, counted from 0."""
    tokens: Tensor
    """Token ids, int64 [B, T]."""
    mask: Tensor
    """True for real tokens, False for padding, bool [B, T]."""
    payload: BlockState | None = None
    """State at a block boundary; None at the model's input."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Other inputs of the model by name, as its processor gives them for images; empty for text."""
    images: Tensor | None = None
    """True for tokens that stand for images, bool [B, T]; None for text."""
    features: tuple[Any, ...] | None = None
    """Features of its images, call by call; None before they are computed, and for text."""

    def with_payload(self, payload: BlockState | None) -> "Chunk":
        return replace(self, payload=payload)

    @property
    def predicting(self) -> Tensor:
        """True for real tokens that predict text: those that no token of an image follows [B, T].

        The last one of a sequence predicts a token outside of it.
        """
        if self.images is None:
            return self.mask
        return self.mask & ~pad(self.images[:, 1:], (0, 1))

    def places(self, device: torch.device) -> Tensor | None:
        """Indices [N] of real tokens in flattened [B T], int64 on `device`; None if all are real.

        The mask is searched on the host, where it is stored, so that no pass waits for the device
        to return the number of real tokens.
        """
        if bool(self.mask.all()):
            return None
        return bring(self.mask.reshape(-1).nonzero().squeeze(1), device)

    def pack(self, departure: Departure | None = None) -> dict[str, np.ndarray]:
        """Pack the chunk into named arrays, which share memory with its CPU tensors.

        bfloat16 is packed as int16 with the same bits; `structure` is JSON in bytes.

        Args:
            departure: Copies GPU tensors to the host; the arrays may be read after its `wait`.
                If None, they are complete on return.
        """
        leaving = departure or Departure()
        arrays: dict[str, np.ndarray] = {}
        parts = [
            self.tokens,
            self.mask,
            self.payload and [self.payload.output, self.payload.extras],
            *([self.inputs, self.images, self.features] if self.inputs else []),
        ]
        structure = {
            "index": self.index,
            "parts": [_encode(part, arrays, leaving) for part in parts],
        }
        text = json.dumps(structure, separators=(",", ":"))
        arrays["structure"] = np.frombuffer(text.encode(), dtype=np.uint8)
        if departure is None:
            leaving.wait()
        return arrays

    @classmethod
    def unpack(cls, arrays: Mapping[str, np.ndarray], *, pinned: bool = False) -> "Chunk":
        """Restore a packed chunk bit for bit, in private memory.

        The arrays may be read-only views of shared memory. They are copied, because a block may
        write to its input in place, which would crash the process on such memory.

        Args:
            pinned: Use page-locked memory, for a chunk that is copied to a GPU at once.
        """
        structure = json.loads(arrays["structure"].tobytes())
        tokens, mask, payload, *images = (
            _decode(part, arrays, pinned) for part in structure["parts"]
        )
        return cls(structure["index"], tokens, mask, payload and BlockState(*payload), *images)


def pack_many(chunks: Mapping[str, Chunk], departure: Departure) -> dict[str, np.ndarray]:
    """Pack several chunks into one record; their arrays are complete after `departure.wait`."""
    return {
        f"{name}{SEPARATOR}{key}": array
        for name, chunk in chunks.items()
        for key, array in chunk.pack(departure).items()
    }


def split_record(
    record: Mapping[str, np.ndarray], names: Iterable[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Split a record of `pack_many` into the records of its chunks, by their names."""
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    for name, array in record.items():
        chunk, _, key = name.partition(SEPARATOR)
        parts[chunk][key] = array
    return parts


def rows_at(states: Tensor, places_N: Tensor | None) -> Tensor:
    """Select rows [N, C] at `Chunk.places` of states [B, T, C] or [B T, C]; a view if None."""
    rows = states.reshape(-1, states.shape[-1])
    return rows if places_N is None else rows.index_select(0, places_N)


def hollow(like: Tensor) -> Tensor:
    """Return zeros of the same shape, dtype and device, of which one value is in memory."""
    return like.new_zeros(()).expand(like.shape)


def is_hollow(tensor: Tensor) -> bool:
    """Test if a tensor of several values has one in memory."""
    return tensor.numel() > 1 and not any(tensor.stride())


def _encode(tree: Any, arrays: dict[str, np.ndarray], departure: Departure) -> Any:
    """Encode `tree` as JSON and add its tensors to `arrays`, named by number.

    Raises:
        TypeError: The tree contains a value that is not a tensor, a container or a JSON scalar.
    """
    if isinstance(tree, Tensor):
        name = f"tensor{len(arrays)}"
        if is_hollow(tree):
            (held,) = _encode(tree.flatten()[:1], arrays, departure).items()
            return {"hollow": [*held, list(tree.shape)]}
        tensor = departure.host(tree.detach().contiguous())
        is_bfloat16 = tensor.dtype == torch.bfloat16
        arrays[name] = (tensor.view(torch.int16) if is_bfloat16 else tensor).numpy()
        return {"bfloat16" if is_bfloat16 else "tensor": name}
    if isinstance(tree, tuple):
        return {"tuple": [_encode(item, arrays, departure) for item in tree]}
    if isinstance(tree, list):
        return {"list": [_encode(item, arrays, departure) for item in tree]}
    if isinstance(tree, Mapping):
        pairs = [[_encode(each, arrays, departure) for each in pair] for pair in tree.items()]
        return {"dict": pairs}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise TypeError(f"a chunk cannot carry a {type(tree).__name__}")


def _decode(node: Any, arrays: Mapping[str, np.ndarray], pinned: bool) -> Any:
    ((kind, content),) = node.items()
    if kind in {"tensor", "bfloat16"}:
        return _copy(arrays[content], is_bfloat16=kind == "bfloat16", pinned=pinned)
    if kind == "hollow":
        held, name, shape = content
        return _decode({held: name}, arrays, pinned).expand(shape)
    if kind == "tuple":
        return tuple(_decode(item, arrays, pinned) for item in content)
    if kind == "list":
        return [_decode(item, arrays, pinned) for item in content]
    if kind == "dict":
        return dict([_decode(each, arrays, pinned) for each in pair] for pair in content)
    return content


def _copy(array: np.ndarray, *, is_bfloat16: bool, pinned: bool) -> Tensor:
    # Into memory aligned by torch: matrix products may round differently on other memory.
    dtype = getattr(torch, array.dtype.name)
    tensor = torch.empty(array.shape, dtype=dtype, pin_memory=pinned)
    tensor.numpy()[...] = array
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor
