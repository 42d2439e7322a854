"""Pictures of four shapes, and their captions, from the top left to the bottom right.

small red circle , big blue square , big white cross , small green square
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
    "orange": (245, 130, 20),
    "pink": (250, 150, 200),
    "brown": (120, 70, 30),
    "cyan": (40, 200, 220),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
SIZES = {"small": 3, "big": 6}
"""Half of the side in pixels."""
CENTRES = ((8, 8), (24, 8), (8, 24), (24, 24))
WORDS = (*SIZES, *COLOURS, *SHAPES, ",")


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape of a picture."""

    size: str
    colour: str
    shape: str

    @property
    def words(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class DrawnScene:
    """Four shapes, and a seed of the background and of the shifts."""

    things: tuple[Thing, ...]
    seed: int

    @property
    def caption(self) -> str:
        return " , ".join(thing.words for thing in self.things)

    def draw(self) -> Image.Image:
        """Draw the scene; the shapes are shifted by up to one pixel."""
        rng = random.Random(self.seed)
        image = Image.new("RGB", (SIDE, SIDE), (rng.randrange(40),) * 3)
        canvas = ImageDraw.Draw(image)
        for thing, (x, y) in zip(self.things, CENTRES, strict=True):
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
            elif thing.shape == "diamond":
                corners = [(x, y - half), (x - half, y), (x, y + half), (x + half, y)]
                canvas.polygon(corners, fill=colour)
            elif thing.shape == "ring":
                canvas.ellipse(box, outline=colour, width=max(half // 2, 1))
            else:
                canvas.line((x - half, y, x + half, y), fill=colour, width=3)
                canvas.line((x, y - half, x, y + half), fill=colour, width=3)
        return image


def scenes(seed: int, count: int) -> list[DrawnScene]:
    """Draw scenes at random."""
    rng = random.Random(seed)

    def thing() -> Thing:
        return Thing(rng.choice([*SIZES]), rng.choice([*COLOURS]), rng.choice(SHAPES))

    return [DrawnScene(tuple(thing() for _ in CENTRES), rng.randrange(2**31)) for _ in range(count)]


def write_scenes(path: Path, of: Sequence[DrawnScene], *, with_images: bool) -> str:
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
