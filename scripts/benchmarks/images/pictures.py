"""Pictures of two shapes, and their captions.

a small red circle left of a big blue square
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 32
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 30),
    "violet": (150, 50, 190),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 4, "big": 7}
"""Half of the side in pixels."""
PLACES = {"left of": ((8, 16), (24, 16)), "above": ((16, 8), (16, 24))}
"""Centres of the first and the second shape."""
WORDS = ("a", *SIZES, *COLOURS, *SHAPES, "left", "of", "above")


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape of a picture."""

    size: str
    colour: str
    shape: str

    @property
    def words(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Two shapes and their places, with a seed of the noise and of the shifts."""

    first: Thing
    second: Thing
    relation: str
    seed: int

    @property
    def caption(self) -> str:
        return f"{self.first.words} {self.relation} {self.second.words}"

    def draw(self) -> Image.Image:
        """Draw the scene; the shapes are shifted by up to two pixels."""
        rng = random.Random(self.seed)
        image = Image.new("RGB", (SIDE, SIDE), (rng.randrange(40),) * 3)
        canvas = ImageDraw.Draw(image)
        for thing, (x, y) in zip((self.first, self.second), PLACES[self.relation], strict=True):
            half, colour = SIZES[thing.size], COLOURS[thing.colour]
            x, y = x + rng.randint(-1, 1), y + rng.randint(-1, 1)
            box = (x - half, y - half, x + half, y + half)
            if thing.shape == "circle":
                canvas.ellipse(box, fill=colour)
            elif thing.shape == "square":
                canvas.rectangle(box, fill=colour)
            elif thing.shape == "triangle":
                corners = [(x, y - half), (x - half, y + half), (x + half, y + half)]
                canvas.polygon(corners, fill=colour)
            else:
                canvas.line((x - half, y, x + half, y), fill=colour, width=3)
                canvas.line((x, y - half, x, y + half), fill=colour, width=3)
        return image


def scenes(seed: int, count: int) -> list[Scene]:
    """Draw scenes at random."""
    rng = random.Random(seed)

    def thing() -> Thing:
        return Thing(rng.choice([*SIZES]), rng.choice([*COLOURS]), rng.choice(SHAPES))

    return [
        Scene(thing(), thing(), rng.choice([*PLACES]), rng.randrange(2**31)) for _ in range(count)
    ]


def write_scenes(path: Path, of: Sequence[Scene], *, with_images: bool) -> str:
    """Write records with pictures and captions, or with captions alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = path.parent / path.stem
    records = []
    for number, scene in enumerate(of):
        record: dict[str, object] = {"text": f"{scene.caption} ."}
        if with_images:
            pictures.mkdir(exist_ok=True)
            scene.draw().save(pictures / f"{number}.png")
            record = {
                "text": f"<image> {scene.caption} .",
                "images": [f"{path.stem}/{number}.png"],
            }
        records.append(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)
