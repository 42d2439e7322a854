"""The parts of the check, the most important first."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """A module of this folder with a function `measure(bench) -> PartResult`."""

    module: str
    seconds: float
    """Expected time on an H200; an estimate until it is measured."""


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
"""`largest` comes last: it may leave the device unusable, and is the least important."""
