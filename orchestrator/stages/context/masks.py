"""Masks over what is stored of a linear by CAP: drawn from probabilities, or what was chosen.

A unit holds one number for each candidate: a keep-probability, or how many draws were kept. So a
mask of 70B is some 30 MB, and the masks of single entries exist in the workers alone.

Shape suffixes: O outputs, I inputs, R directions, B buckets, N entries.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from orchestrator.device.transport import CPU, upload
from orchestrator.linalg.ranked import sketched_energy
from orchestrator.plan.linear import Linear
from orchestrator.store.run import RunDirectory
from orchestrator.store.units import unit_key

_FILE = "candidates.safetensors"
MASK_VERSION = 1
"""Raised when the same numbers mean another mask."""

Parts = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""By linear's name, a number for each of its directions and one for each of its buckets."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Which directions and which entries stay, bool [R] and [N], in the order they are stored."""

    directions_R: Tensor
    entries_N: Tensor

    def drawn(self, counts_B: Tensor) -> tuple[list[int], list[int]]:
        """How many draws of each direction and of each bucket were kept."""
        parts = torch.split(self.entries_N, counts_B.tolist())
        return self.directions_R.int().tolist(), [int(part.sum()) for part in parts]


def commit_candidates(run: RunDirectory, values: Parts, counts: Parts) -> str:
    """Stores the numbers of the linears in `values` with the draws of their candidates.

    Linears that are not named stay dense. The key is that of the content; nothing is written
    where it is there undamaged.
    """
    arrays = {}
    for name, (directions_R, buckets_B) in values.items():
        arrays[f"{name}.directions"] = np.asarray(directions_R, dtype=np.float64)
        arrays[f"{name}.buckets"] = np.asarray(buckets_B, dtype=np.float64)
        arrays[f"{name}.counts"] = np.asarray(counts[name][1], dtype=np.int64)
    content = save(arrays)
    digest = hashlib.blake2b(content, digest_size=32).hexdigest()
    key = unit_key("candidates", MASK_VERSION, [], content=digest)
    if not run.units.verify(key):
        unit = run.units.begin(key)
        with unit.file(_FILE) as path:
            path.write_bytes(content)
        unit.commit(environment={}, facts={})
    return key


@dataclass(frozen=True, slots=True)
class CandidateValues:
    """What a unit of `commit_candidates` says of one linear."""

    directions_R: Tensor
    """float64, like the buckets'."""
    buckets_B: Tensor
    counts_B: Tensor
    """Entries of each bucket, int64."""

    def chosen(self) -> Mask:
        """The numbers as how many are kept: of a bucket those entries that stand first."""
        starts_B = self.counts_B.cumsum(0) - self.counts_B
        place_N = torch.arange(int(self.counts_B.sum())) - self._entries(starts_B)
        return Mask(self.directions_R > 0, place_N < self._entries(self.buckets_B))

    def draw(self, *seed: int | str) -> Mask:
        """The numbers as probabilities: every direction and every entry draws on its own.

        From the seed alone, on the CPU: the same bits in every process.
        """
        digest = hashlib.blake2b(json.dumps(seed).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        chance_R = torch.rand(len(self.directions_R), generator=generator)
        chance_N = torch.rand(int(self.counts_B.sum()), generator=generator)
        return Mask(chance_R < self.directions_R, chance_N < self._entries(self.buckets_B))

    def _entries(self, value_B: Tensor) -> Tensor:
        return value_B.repeat_interleave(self.counts_B)


def read_candidates(run: RunDirectory, key: str, linear: Linear) -> CandidateValues | None:
    """What the unit says of a linear; nothing if that stays dense."""
    with safe_open(run.units.file(key, _FILE), framework="pt") as file:
        if f"{linear.name}.directions" not in file.keys():  # noqa: SIM118
            return None
        directions_R, buckets_B, counts_B = (
            file.get_tensor(f"{linear.name}.{each}") for each in ("directions", "buckets", "counts")
        )
    return CandidateValues(directions_R, buckets_B, counts_B)


def read_masked(path: Path, mask: Mask, device: torch.device = CPU) -> dict[str, Tensor]:
    """What a mask leaves of a linear's stored parts, in their order: `weight` and `down` with
    ranks as rows, `values` and `positions`; selected on `device`, where they lie."""
    kept = {"weight": mask.directions_R, "down": mask.directions_R}
    kept |= {"values": mask.entries_N, "positions": mask.entries_N}
    with safe_open(path, framework="pt") as file:
        return {
            name: upload(file.get_tensor(name), device)[rows.to(device)]
            for name, rows in kept.items()
        }


def masked_errors(path: Path, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """What a mask loses of the weight and, by the sketch of its inputs, of its outputs.

    As fractions of what all stored parts together have, which is the weight but for the residual
    of the robust PCA. `parts` is the result of `read_masked`; the computation is on its device.
    """
    device = parts["weight"].device
    with safe_open(path, framework="pt") as file:
        whole = {name: upload(file.get_tensor(name), device) for name in parts}
        sketch = [upload(file.get_tensor(name), device) for name in ("sketch", "ridge")]
    whole_OI = masked_weight(whole)
    lost_OI = whole_OI - masked_weight(parts)
    energies = {
        "weight_error": [float(each.double().square().sum()) for each in (lost_OI, whole_OI)],
        "activation_error": [sketched_energy(each, *sketch) for each in (lost_OI, whole_OI)],
    }
    return {name: lost / total if total else 0.0 for name, (lost, total) in energies.items()}


def masked_weight(parts: Mapping[str, Tensor]) -> Tensor:
    """Dense product of the result of `read_masked`, float32 [O, I], on its device.

    R O I multiply-adds, R the directions that are left.
    """
    weight_RO, down_RI, values_N = (
        parts[name].to(torch.float32) for name in ("weight", "down", "values")
    )
    product_OI = weight_RO.T @ down_RI
    # every position stands once, so the order of the sums is no question
    product_OI.view(-1)[parts["positions"].long()] += values_N
    return product_OI
