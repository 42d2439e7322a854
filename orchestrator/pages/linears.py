"""Linears of a report, as rows for figures and tables.

A role is the name of a linear within its block; the experts of a block share one,
`experts.*.up_proj`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.pages.figures import Cell, Line
from orchestrator.pages.tables import significant

_BLOCK = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")
_TOWER = re.compile(r"(?:^|\.)(\w*vis(?:ion|ual)\w*)\.")


@dataclass(frozen=True, slots=True)
class LinearRow:
    """One linear; fields absent from its report are None."""

    name: str
    block: int | None
    role: str
    form: str
    shape: tuple[int, int] | None
    values: int | None
    """Stored values."""
    facts: Mapping[str, Any]
    """All fields of the report."""

    @property
    def dense_values(self) -> int | None:
        return self.shape[0] * self.shape[1] if self.shape else None

    @property
    def kept(self) -> float | None:
        if self.values is None or not self.dense_values:
            return None
        return self.values / self.dense_values

    @property
    def break_even(self) -> int | None:
        return self.shape[0] * self.shape[1] // sum(self.shape) if self.shape else None


def entries(report: Mapping[str, Any]) -> list[LinearRow]:
    """Return every targeted linear, ordered by block and, within a block, as in the report."""
    found = []
    for name, facts in report.get("linears", {}).items():
        block, role = place(name)
        shape = facts.get("shape")
        found.append(
            LinearRow(
                name=name,
                block=block,
                role=role,
                form=facts.get("form", "unknown"),
                shape=tuple(shape) if shape else None,
                values=facts.get("values"),
                facts=facts,
            )
        )
    return sorted(found, key=lambda entry: -1 if entry.block is None else entry.block)


def place(name: str) -> tuple[int | None, str]:
    """Split the name of a linear into block and role, with the name of its vision tower first."""
    match = _BLOCK.match(name)
    if match is None:
        return None, name
    role, tower = re.sub(r"\.\d+(?=\.)", ".*", match[2]), _TOWER.search(name)
    return int(match[1]), f"{tower[1]}.{role}" if tower else role


def by_role(found: Sequence[LinearRow]) -> dict[str, list[LinearRow]]:
    """Group the linears by role, roles in the order of their first block."""
    roles: dict[str, list[LinearRow]] = {}
    for entry in found:
        roles.setdefault(entry.role, []).append(entry)
    return roles


def total(numbers: Sequence[int | None]) -> int | None:
    """Return the sum, or None if one number is unknown."""
    known = [each for each in numbers if each is not None]
    return sum(known) if known and len(known) == len(numbers) else None


def kept_of(found: Sequence[LinearRow]) -> float | None:
    """Return the stored values of several linears over their dense values."""
    stored = total([entry.values for entry in found])
    dense = total([entry.dense_values for entry in found])
    return None if stored is None or not dense else stored / dense


def heat_cells(found: Sequence[LinearRow]) -> dict[tuple[str, int], Cell]:
    """Make a cell for each role and block with a known kept fraction."""
    together: dict[tuple[str, int], list[LinearRow]] = {}
    for entry in found:
        if entry.block is not None:
            together.setdefault((entry.role, entry.block), []).append(entry)
    return {
        key: Cell(kept, all(entry.form == "dense" for entry in same), _says(same, kept))
        for key, same in together.items()
        if (kept := kept_of(same)) is not None
    }


def _says(same: Sequence[LinearRow], kept: float) -> str:
    if len(same) > 1:
        return f"{same[0].role}, block {same[0].block}: kept {kept:.4f} of {len(same)} linears"
    (entry,) = same
    says = [f"{entry.name}: kept {kept:.4f}", entry.form.replace("_", " ")]
    says += [
        f"{word} {entry.facts[word]:,}" for word in ("rank", "nonzeros") if word in entry.facts
    ]
    return ", ".join(says)


def energy_lines_of(
    shares: Mapping[str, np.ndarray], found: Sequence[LinearRow], *, is_sparse: bool = False
) -> dict[str, list[Line]]:
    """Make lines of the captured energy fraction for each role, one line per block.

    Args:
        shares: By linear, for the leading 1, 2, ... ranks, or at equally spaced densities up to 1.
            For the experts of a block the mean is drawn, without the chosen sizes.
    """
    entry_of = {entry.name: entry for entry in found}
    roles: dict[str, dict[int, list[str]]] = {entry.role: {} for entry in found}
    for name in shares:
        block, role = place(name)
        if block is not None:
            roles.setdefault(role, {}).setdefault(block, []).append(name)
    lines: dict[str, list[Line]] = {}
    for role, blocks in roles.items():
        for block, names in sorted(blocks.items()):
            shortest = min(len(shares[name]) for name in names)
            mean = np.mean([shares[name][:shortest] for name in names], axis=0)
            sizes = np.arange(1, shortest + 1) / (shortest if is_sparse else 1)
            chosen = _chosen(entry_of.get(names[0]), is_sparse) if len(names) == 1 else None
            lines.setdefault(role, []).append(_line(block, sizes, mean, chosen))
    return lines


def _chosen(entry: LinearRow | None, is_sparse: bool) -> float | None:
    """Return the rank or the density of a linear."""
    if entry is None:
        return None
    if not is_sparse:
        return entry.facts.get("rank") or None
    nonzeros = entry.facts.get("nonzeros")
    return nonzeros / entry.dense_values if nonzeros and entry.dense_values else None


def _line(block: int, sizes: np.ndarray, shares: np.ndarray, chosen: float | None) -> Line:
    if chosen is None or chosen > sizes[-1]:
        return Line(block, sizes, shares, None, f"block {block}")
    lost = 1 - float(np.interp(chosen, sizes, shares))
    says = f"block {block}: {chosen:.4g} holds all but {significant(lost)}"
    return Line(block, sizes, shares, chosen, says)


def size_at(line: Line, share: float) -> float | None:
    """Return the smallest rank or density on the curve with this fraction of the energy."""
    at = int(np.searchsorted(line.shares, share))
    return float(line.sizes[at]) if at < len(line.sizes) else None
