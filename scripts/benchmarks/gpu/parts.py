"""The parts of the check, in the order of their worth."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """A module of this package whose `measure(bench)` gives what was found."""

    module: str
    seconds: float
    """Expected on an H200; estimates until they are measured."""


PARTS = {
    "machine": Part("machine", 25),
    "evaluate": Part("evaluate", 10),
    "attention": Part("attention", 5),
    "tests": Part("marked", 60),
    "pipeline": Part("pipeline", 110),
    "eigen": Part("eigen", 40),
    "decompositions": Part("cuts", 60),
    "grams": Part("grams", 10),
    "block": Part("block", 70),
    "training": Part("training", 50),
    "linears": Part("linears", 25),
    "published": Part("published", 60),
    "largest": Part("largest", 40),
}
"""`largest` is the last one: it may leave the device in a bad state, and is worth least."""
