"""Random numbers of a run: a generator for each purpose, from one seed.

The numbers of a generator depend on the seed and the purpose alone, never on the worker or on
earlier draws, so that results do not depend on the schedule. torch is imported by the first draw.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

LARGEST_PRIME = 2**63 - 25
"""Below 2^63: torch takes no larger seed, and modulo a power of two many would be one."""


@dataclass(frozen=True, slots=True)
class Randomness:
    """Source of all random numbers of a run; equal seeds give equal numbers."""

    seed: int

    def calibration(self) -> np.random.Generator:
        """Return the generator that chooses calibration sequences."""
        return np.random.default_rng(self.seed)

    def labels(self, chunk: int, device: "torch.device") -> "torch.Generator":
        """Return the generator of the labels of one chunk of a backward pass, on a device."""
        import torch

        return torch.Generator(device).manual_seed((self.seed * 2**24 + chunk) % LARGEST_PRIME)

    def mask(self, iteration: int, sample: int) -> tuple[int, ...]:
        """Return the words of a mask, for `generator`; each linear adds its name."""
        return (self.seed, iteration, sample)

    def points(self, batch: int) -> int:
        """Return the seed, of 32 bits, of the points that a search tries in one batch."""
        digest = hashlib.blake2b(f"points {self.seed} {batch}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little")

    def mixed(self, step: int, linear: str) -> float:
        """Return a number in [0, 1) for a linear in a step of a mixed training."""
        words = json.dumps(("mixed", self.seed, step, linear))
        digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
        # 53 bits, which a float64 has: more could be rounded to 1
        return (int.from_bytes(digest, "little") >> 11) / 2**53

    def adapter(self, linear: str) -> "torch.Generator":
        """Return the generator of the first values of the adapter of a linear."""
        return generator("adapter", self.seed, linear)

    def block_order(self, block: int, epoch: int) -> "torch.Generator":
        """Return the generator of the order of chunks in the training of one block."""
        return generator(self.seed, block, epoch)

    def model_order(self, epoch: int) -> "torch.Generator":
        """Return the generator of the order of sequences in the training of the whole model."""
        return generator("train", self.seed, epoch)


def generator(*words: int | str) -> "torch.Generator":
    """Make a generator on the CPU from these words: the same bits in every process."""
    import torch

    digest = hashlib.blake2b(json.dumps(words).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
