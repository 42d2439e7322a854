"""Features of images: computed before the first block, and passed on with the chunk.

A model's own forward calls `get_image_features` of an inner module on the pixels, and puts the
result among the embeddings of the text; some add parts of it behind later blocks too (Qwen3-VL).
The first shard records what it gives; later shards run the same forward, in which the record takes
the place of the vision tower, so they need neither its weights nor the pixels. A part of it that
only earlier blocks read becomes hollow: zeros of its shape, which the forward still handles.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.device.transport import bring
from orchestrator.errors import InputError
from orchestrator.models.shards.chunk import BlockState, Chunk, hollow
from orchestrator.models.survey.trees import map_tensors

GETTER = "get_image_features"
PIXELS = "pixel_values"
"""Input that only the vision tower reads."""
EMBEDDED = "pooler_output"
"""Part of the tower's output that replaces embeddings, so that the first block alone reads it."""
ADDED = "deepstack_features"
"""List whose entry i is added to the states behind block i."""
_INNER_STATES = frozenset({"last_hidden_state", "hidden_states", "attentions"})
"""Parts of the tower's output that no language model reads."""


class ImageFeatures:
    """Features of the images of the chunk under way.

    Args:
        load: Loads the weights outside the blocks that images need; called for every chunk whose
            features are not known.
    """

    def __init__(self, model: nn.Module, load: Callable[[], None]) -> None:
        self._model, self._load = model, load
        self._recorded: list[Any] = []

    @contextmanager
    def inputs(self, chunk: Chunk, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """Yield the inputs of a chunk's images on the device, and stand in for the vision tower.

        The tower is run without gradients: its features are constants of the language model.

        Raises:
            InputError: The model reads no images.
        """
        self._recorded = []
        if not chunk.inputs:
            yield {}
            return
        owner = _owner(self._model)
        if chunk.features is None:
            self._load()
            stand_in = self._recorder(getattr(owner, GETTER))
        else:
            features = map_tensors(lambda tensor: bring(tensor, device), chunk.features)
            stand_in = _replay(iter(features))
        vars(owner)[GETTER] = stand_in
        try:
            yield {name: bring(tensor, device) for name, tensor in chunk.inputs.items()}
        finally:
            del vars(owner)[GETTER]

    def passed(self, chunk: Chunk, state: BlockState, block: int) -> Chunk:
        """Return the chunk at the input of a block, with the features that it and later ones need.

        They are in the place of pixels.
        """
        if not chunk.inputs:
            return chunk.with_payload(state)
        if chunk.features is not None:
            left = tuple(_needed(each, block) for each in chunk.features)
            return replace(chunk, payload=state, features=left)
        # the model's forward asks for pixels without reading them
        pixels = {PIXELS: torch.empty(0)} if PIXELS in chunk.inputs else {}
        inputs = {**chunk.inputs, **pixels}
        features = tuple(_needed(each, block) for each in self._recorded)
        return replace(chunk, payload=state, inputs=inputs, features=features)

    def _recorder(self, native: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                output = native(*args, **kwargs)
            self._recorded.append(_plain(output))
            return output

        return record


def _replay(features: Iterator[Any]) -> Callable[..., Any]:
    """Stand-in that returns recorded features, call by call."""

    def replay(*args: Any, **kwargs: Any) -> Any:
        found = next(features)
        return SimpleNamespace(**found) if isinstance(found, dict) else found

    return replay


def _plain(output: Any) -> Any:
    """Convert an output of transformers to a dict; a tensor, a tuple or a list stays as it is."""
    if isinstance(output, Mapping):
        return {name: each for name, each in output.items() if name not in _INNER_STATES}
    return output


def _needed(output: Any, block: int) -> Any:
    """Features of a call with hollow tensors where no block from this one on reads the values.

    The received state replaces the outputs of blocks before it, with everything added to them.
    """
    if not isinstance(output, Mapping):
        return map_tensors(hollow, output)
    found = dict(output)
    if EMBEDDED in found:
        found[EMBEDDED] = map_tensors(hollow, found[EMBEDDED])
    if isinstance(added := found.get(ADDED), list | tuple):
        last = block - 1  # its features are added in the shard of `block`
        found[ADDED] = type(added)(
            map_tensors(hollow, each) if index < last else each for index, each in enumerate(added)
        )
    return found


def _owner(model: nn.Module) -> nn.Module:
    """Return the innermost module that computes features of images.

    Raises:
        InputError: There is none.
    """
    if not hasattr(model, GETTER):
        raise InputError(
            f"{type(model).__name__} reads no images; give records of text alone, or a model of "
            "images and text"
        )
    inner = next((child for child in model.children() if hasattr(child, GETTER)), None)
    return model if inner is None else _owner(inner)
