"""The token sequences of a pass: a unit of the run directory, named by its content."""

from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from orchestrator.models.inputs.text import Tokens
from orchestrator.models.shards.chunk import Chunk
from orchestrator.store.files import digest_json
from orchestrator.store.run import RunDirectory
from orchestrator.store.units import unit_key

_FILE = "tokens.safetensors"


class TokenArrays(NamedTuple):
    """Sequences of one length: ids int32 [N, T], mask bool [N, T]."""

    ids: np.ndarray
    mask: np.ndarray


def commit_tokens(run: RunDirectory, tokens: Tokens) -> str:
    """Store the sequences, unless an intact unit has them; gives the key of the unit."""
    content = digest_json([tokens.ids.tolist(), tokens.mask.tolist()])
    key = unit_key("tokens", 1, [], content=content)
    if not run.units.verify(key):
        unit = run.units.begin(key)
        with unit.file(_FILE) as path:
            save_file({"ids": tokens.ids, "mask": tokens.mask}, path)
        unit.commit(environment={}, facts=tokens.report)
    return key


def read_tokens(run: RunDirectory, key: str) -> TokenArrays:
    arrays = load_file(run.units.file(key, _FILE))
    return TokenArrays(arrays["ids"], arrays["mask"])


def first_chunk(tokens: TokenArrays, index: int) -> Chunk:
    """Sequence `index` at the model's input; every chunk is one sequence."""
    ids_BT = torch.from_numpy(tokens.ids[index : index + 1].astype(np.int64))
    mask_BT = torch.from_numpy(tokens.mask[index : index + 1].copy())
    return Chunk(index, ids_BT, mask_BT)
