"""Units of candidate values: probabilities of masks, or the choice that an allocation has made.

A unit holds one number for each candidate of the linears; see `methods.kinds.ranked`.

Shape suffixes: R directions, B buckets.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from orchestrator.methods.kinds.ranked import CandidateValues
from orchestrator.plan.linear import Linear
from orchestrator.store.run import RunDirectory
from orchestrator.store.units import unit_key

_FILE = "candidates.safetensors"
MASK_VERSION = 1
"""Raised when the same numbers give another mask."""

Parts = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Numbers of the directions and of the buckets, by linear."""


def commit_candidates(run: RunDirectory, values: Parts, counts: Parts) -> str:
    """Store the numbers of the linears in `values` with the draws of their candidates.

    Linears that are not named stay dense. The key follows from the content; an intact unit is not
    written again.
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


def read_candidates(run: RunDirectory, key: str, linear: Linear) -> CandidateValues | None:
    """Return the numbers of a linear; None if it stays dense."""
    with safe_open(run.units.file(key, _FILE), framework="pt") as file:
        if f"{linear.name}.directions" not in file.keys():  # noqa: SIM118
            return None
        directions_R, buckets_B, counts_B = (
            file.get_tensor(f"{linear.name}.{each}") for each in ("directions", "buckets", "counts")
        )
    return CandidateValues(directions_R, buckets_B, counts_B)
