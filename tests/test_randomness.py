"""Generators of a seed: results of earlier versions depend on these numbers."""

import torch

from orchestrator.randomness import LARGEST_PRIME, Randomness, generator


def test_generators_are_those_of_earlier_versions():
    """Units are named by the seed alone, so a change of a generator needs new versions of units."""
    source = Randomness(7)
    assert source.calibration().integers(0, 1000, 4).tolist() == [944, 625, 684, 897]
    seeds = [
        source.block_order(2, 3).initial_seed(),
        source.model_order(3).initial_seed(),
        generator(*source.mask(1, 4), "a.b").initial_seed(),
    ]
    known = [7978850547231873970, 14783762240534724509, 3149720856070144323]
    assert [seed % 2**64 for seed in seeds] == known


def test_labels_of_large_seeds_differ():
    """A seed of 60 bits is not cut, and every chunk has a generator of its own."""
    device = torch.device("cpu")
    found = {
        Randomness(seed).labels(chunk, device).initial_seed()
        for seed in (0, 2**39, 2**40, 2**60)
        for chunk in range(3)
    }
    assert len(found) == 12
    assert Randomness(2**60).labels(5, device).initial_seed() == (2**84 + 5) % LARGEST_PRIME
