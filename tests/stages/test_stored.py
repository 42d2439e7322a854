"""Stored tensors: the order of the sources, and parts that no source has."""

from dataclasses import dataclass

import pytest
import torch

from orchestrator.models.checkpoint.layout import TensorSpec
from orchestrator.stages.context.worker.stored import StoredFile, StoredTensors


@dataclass(frozen=True)
class Held:
    """A source of tensors that are in memory."""

    tensors: dict

    def read(self, tensor):
        return self.tensors.get(tensor.name)


def spec(name):
    return TensorSpec(name=name, dtype="float32", shape=(1,), part="weight", source="a")


def test_the_first_source_that_has_a_tensor_gives_it():
    trained, cut = Held({"a": torch.ones(1)}), Held({"a": torch.zeros(1), "b": torch.full((1,), 2)})
    stored = StoredTensors((trained, cut))
    assert [int(stored.read(spec(name))) for name in "ab"] == [1, 2]


def test_a_tensor_without_a_source_is_an_error():
    with pytest.raises(ValueError, match=r"^c: no stage stores part 'weight' of a; "):
        StoredTensors((Held({}),)).read(spec("c"))


def test_a_prefix_is_rows_and_columns_of_the_whole(tmp_path):
    from safetensors.torch import save_file

    rows_RO = torch.arange(12.0).view(3, 4)
    save_file({"weight": rows_RO}, tmp_path / "a")
    file = StoredFile(tmp_path / "a", torch.device("cpu"))
    assert torch.equal(file.whole("weight"), rows_RO)
    assert torch.equal(file.prefix("weight", 2), rows_RO[:2])
    found = file.prefix("weight", 2, range(1, 3))
    assert torch.equal(found, rows_RO[:2, 1:3])
    assert found.is_contiguous()
