"""Sequences of a text as they are read: their tokens, and the other inputs of their images."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np

_BY_TOKEN = "token_type_ids"
"""End of the names of inputs with one value a token; the others belong to whole images."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Tokens of one sequence."""

    ids: np.ndarray
    """int32 [tokens]."""
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Other inputs of the model, by name; empty for text."""
    images: int = 0
    image_token: int = -1
    """Token that stands for a part of an image."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_image(self) -> np.ndarray:
        """True for tokens that stand for images, bool [tokens]."""
        found: np.ndarray = self.ids == self.image_token if self.images else self.ids < 0
        return found

    def cut(self, length: int) -> Self | None:
        """Return the first tokens; None if a token of an image would be lost."""
        if self.is_image[length:].any():
            return None
        inputs = {
            name: array[:, :length] if name.endswith(_BY_TOKEN) else array
            for name, array in self.inputs.items()
        }
        return type(self)(self.ids[:length], inputs, self.images, self.image_token)

    def padded_inputs(self, length: int) -> dict[str, np.ndarray]:
        """Return the other inputs for a sequence that is padded to a length, zeros at padding."""
        added = ((0, 0), (0, length - len(self)))
        return {
            name: np.pad(array, added) if name.endswith(_BY_TOKEN) else array
            for name, array in self.inputs.items()
        }
