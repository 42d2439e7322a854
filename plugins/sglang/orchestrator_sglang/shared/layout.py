# Copy of plugins/vllm/orchestrator_vllm/layout.py, by scripts/vendor_forms.py; change that file.
"""Rows and columns that a rank of tensor parallelism has of a linear, from sizes alone.

A column-parallel layer divides outputs, a row-parallel one inputs. A linear of two factors has
inner values between them, R of them. If only one factor were divided, a rank would read all of the
other, and from four ranks on more than of the dense linear. So the inner values are divided too:

- outputs divided: a rank computes its part of the inner values, all ranks gather them, and the rank
  computes its outputs from all of them;
- inputs divided: a rank computes its summand of all inner values, the sum is scattered over the
  ranks, and the rank computes its summand of all outputs from its part.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ALIGNMENT = 16
"""Multiple to which parts of the inner values are padded, with zeros; odd sizes make slow GEMMs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Division of a layer over ranks, and the rank that this is."""

    axis: Literal["outputs", "inputs", "none"] = "none"
    rank: int = 0
    ranks: int = 1
    inner: bool = True
    """True: the inner values are divided too."""

    @property
    def parts(self) -> int:
        """Number of parts of the inner values."""
        return self.ranks if self.inner and self.axis != "none" else 1

    def padded(self, inner: int) -> int:
        """Number of inner values with padding, so that all parts are equal."""
        if self.parts == 1:
            return inner
        multiple = ALIGNMENT * self.parts
        return -(-inner // multiple) * multiple

    def computed(self, inner: int) -> range:
        """Inner values that the first product of this rank gives: rows of `down`."""
        return self._part(inner) if self.axis == "outputs" else range(self.padded(inner))

    def used(self, inner: int) -> range:
        """Inner values that the second product of this rank takes: columns of `weight`."""
        return self._part(inner) if self.axis == "inputs" else range(self.padded(inner))

    def _part(self, inner: int) -> range:
        length = self.padded(inner) // self.parts
        first = self.rank * length if self.parts > 1 else 0
        return range(first, first + length)

    def columns(self, inputs: int) -> range:
        """Inputs that a rank has, of a number that the ranks divide."""
        if self.axis != "inputs":
            return range(inputs)
        length = inputs // self.ranks
        return range(self.rank * length, (self.rank + 1) * length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Outputs and inputs of one linear that a rank has."""

    rows: tuple[range, ...]
    columns: range
    out_features: int
    """Outputs of the whole linear."""
    in_features: int

    @property
    def outputs(self) -> int:
        """Number of outputs that the rank has."""
        return sum(map(len, self.rows))

    def take_rows(self, tensor: Tensor) -> Tensor:
        """The rank's rows of a tensor whose first dimension is the outputs'."""
        pieces = [tensor[rows.start : rows.stop] for rows in self.rows]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def take_columns(self, tensor: Tensor) -> Tensor:
        """The rank's columns of a matrix whose second dimension is the inputs'."""
        return tensor[:, self.columns.start : self.columns.stop]


def parts_of(
    division: Division, sizes: list[int], in_features: int, *, linears: int, replicas: int = 1
) -> list[Part]:
    """Return the part of every linear of the checkpoint in a layer.

    Args:
        sizes: Outputs of this rank, for each projection in the layer.
        in_features: Inputs of the whole layer.
        linears: Number of linears in the checkpoint: one for each projection, or one for all of
            them, whose rows are those of the projections in turn.
        replicas: Number of ranks that have the same rows of every projection but the first: ranks
            that share heads of keys and values.

    Raises:
        ValueError: The number of linears is another.
    """
    columns, rows, totals = division.columns(in_features), [], []
    for number, size in enumerate(sizes):
        if division.axis == "outputs":
            shared = replicas if number else 1
            rank, ranks = division.rank // shared, division.ranks // shared
        else:
            rank, ranks = 0, 1
        rows.append(range(rank * size, (rank + 1) * size))
        totals.append(ranks * size)
    if linears == 1:
        starts = [sum(totals[:number]) for number in range(len(sizes))]
        moved = tuple(range(r.start + at, r.stop + at) for r, at in zip(rows, starts, strict=True))
        given = [(moved, sum(totals))]
    elif linears == len(sizes):
        given = [((each,), total) for each, total in zip(rows, totals, strict=True)]
    else:
        raise ValueError(f"{linears} linears of the checkpoint for {len(sizes)} projections")
    return [
        Part(rows=taken, columns=columns, out_features=total, in_features=in_features)
        for taken, total in given
    ]


def pivoted_places(
    index_O: Tensor, inner: int, used: range, *, every_row: bool
) -> tuple[Tensor, Tensor]:
    """Return the combinations that a rank computes of a pivoted linear, and places of its outputs.

    Args:
        index_O: Place of each of the rank's outputs among R pivots and the others, int64.
        inner: Number of pivots, R.
        used: Pivots that the rank has, after the ranks have exchanged them.
        every_row: True: the rank computes a summand of all combinations; outputs that are pivots of
            other ranks get zero, which stands behind the combinations.

    Returns:
        Rows of `weight`, and for every output its place in [pivots of `used`, combinations, zero].
    """
    is_other = index_O >= inner
    others = index_O[is_other] - inner
    if every_row:
        rows = torch.arange(len(others), device=index_O.device)
        place_of_others = others
    else:
        rows = others
        place_of_others = torch.arange(len(others), device=index_O.device)
    places = index_O - used.start
    elsewhere = ~is_other & ((places < 0) | (places >= len(used)))
    places[is_other] = len(used) + place_of_others
    places[elsewhere] = len(used) + len(rows)
    return rows, places
