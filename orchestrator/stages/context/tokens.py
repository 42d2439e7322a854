"""The token sequences of a pass: a unit of the run directory, named by its content."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from orchestrator.models.inputs.text import Tokens
from orchestrator.models.shards.chunk import Chunk
from orchestrator.store.files import digest_json
from orchestrator.store.run import RunDirectory
from orchestrator.store.units import unit_key

_FILE = "tokens.safetensors"
_INPUTS_FILE = "images.safetensors"
"""Inputs of images, `SEQUENCE.NAME`; absent if there are none."""


@dataclass(frozen=True, slots=True)
class TokenArrays:
    """Sequences of one length: ids int32 [N, T], mask bool [N, T]."""

    ids: np.ndarray
    mask: np.ndarray
    is_image: np.ndarray | None = None
    """Tokens that stand for images, bool [N, T]; None if there are none."""
    inputs_file: Path | None = None
    """File with the other inputs of sequences with images."""

    def inputs(self, index: int) -> dict[str, Tensor]:
        """Read the inputs of a sequence's images, by name; empty if it has none."""
        if self.inputs_file is None:
            return {}
        start = f"{index}."
        with safe_open(self.inputs_file, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
            return {name.removeprefix(start): file.get_tensor(name) for name in names}


def commit_tokens(run: RunDirectory, tokens: Tokens) -> str:
    """Store the sequences, unless an intact unit has them; gives the key of the unit."""
    arrays = {"ids": tokens.ids, "mask": tokens.mask}
    if tokens.is_image is not None:
        arrays["is_image"] = tokens.is_image
    inputs = {
        f"{index}.{name}": np.ascontiguousarray(array)
        for index, given in tokens.inputs.items()
        for name, array in given.items()
    }
    content = digest_json([*(array.tolist() for array in arrays.values()), *_digests(inputs)])
    key = unit_key("tokens", 1, [], content=content)
    if not run.units.verify(key):
        unit = run.units.begin(key)
        with unit.file(_FILE) as path:
            save_file(arrays, path)
        if inputs:
            with unit.file(_INPUTS_FILE) as path:
                save_file(inputs, path)
        unit.commit(environment={}, facts=tokens.report)
    return key


def _digests(arrays: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Name, dtype and BLAKE2b of each array."""
    return [
        [name, str(array.dtype), str(array.shape), hashlib.blake2b(array.data).hexdigest()]
        for name, array in arrays.items()
    ]


def read_tokens(run: RunDirectory, key: str) -> TokenArrays:
    arrays = load_file(run.units.file(key, _FILE))
    is_image = arrays.get("is_image")
    has_inputs = is_image is not None and is_image.any()
    inputs = run.units.file(key, _INPUTS_FILE) if has_inputs else None
    return TokenArrays(arrays["ids"], arrays["mask"], is_image, inputs)


def first_chunk(tokens: TokenArrays, index: int) -> Chunk:
    """Sequence `index` at the model's input; every chunk is one sequence."""
    ids_BT = torch.from_numpy(tokens.ids[index : index + 1].astype(np.int64))
    mask_BT = torch.from_numpy(tokens.mask[index : index + 1].copy())
    inputs = tokens.inputs(index)
    if not inputs:
        return Chunk(index, ids_BT, mask_BT)
    assert tokens.is_image is not None
    images_BT = torch.from_numpy(tokens.is_image[index : index + 1].copy())
    return Chunk(index, ids_BT, mask_BT, images=images_BT, inputs=inputs)
