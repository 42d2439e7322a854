"""The linears of a report, as rows to draw and to list.

A role is a linear's name within its block; experts of one block go together, `experts.*.up_proj`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.pages.figures import Cell, Line
from orchestrator.pages.tables import significant

_BLOCK = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")


@dataclass(frozen=True, slots=True)
class LinearRow:
    """One linear; what its report does not say is None."""

    name: str
    block: int | None
    role: str
    form: str
    shape: tuple[int, int] | None
    values: int | None
    """Stored."""
    facts: Mapping[str, Any]
    """All that the report says."""

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
    """Every targeted linear, in the order of blocks and, within one, of the report."""
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
    """Block and role of a linear, from its name."""
    match = _BLOCK.match(name)
    if match is None:
        return None, name
    return int(match[1]), re.sub(r"\.\d+(?=\.)", ".*", match[2])


def by_role(found: Sequence[LinearRow]) -> dict[str, list[LinearRow]]:
    """The linears of each role, roles in the order of their first block."""
    roles: dict[str, list[LinearRow]] = {}
    for entry in found:
        roles.setdefault(entry.role, []).append(entry)
    return roles


def total(numbers: Sequence[int | None]) -> int | None:
    """Their sum, or nothing where one is not known."""
    known = [each for each in numbers if each is not None]
    return sum(known) if known and len(known) == len(numbers) else None


def kept_of(found: Sequence[LinearRow]) -> float | None:
    """Stored values of several linears over their dense values."""
    stored = total([entry.values for entry in found])
    dense = total([entry.dense_values for entry in found])
    return None if stored is None or not dense else stored / dense


def heat_cells(found: Sequence[LinearRow]) -> dict[tuple[str, int], Cell]:
    """A cell for each role and block whose kept fraction is known."""
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
    """For each role the share of energy that is held, a line a block.

    Args:
        shares: By linear, of the leading 1, 2, ... ranks, or at equally spaced densities up to 1.
            Of experts in one block the mean is drawn, and no choice.
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
    """The rank or the density that a linear got."""
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
    """The least rank or density on the curve that holds this share of the energy."""
    at = int(np.searchsorted(line.shares, share))
    return float(line.sizes[at]) if at < len(line.sizes) else None
