"""Units of expert groups on a worker: the content that a pass leaves for those after it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from orchestrator.device.transport import download, upload
from orchestrator.errors import OrchestratorError
from orchestrator.models.statistics.routed import PoolSum
from orchestrator.plan.linear import Linear
from orchestrator.runtime.worker import Worker
from orchestrator.stages.context.expert_group import ExpertGroup
from orchestrator.store.units import UnitWriter

POOLS_FILE = "pools.safetensors"
"""File with the sums over the experts of this group and those before it."""
_TOKENS = " tokens"


def statistics_file(linear: Linear) -> str:
    """Return the name of the file with the statistics of a linear that is not decomposed yet."""
    return f"{linear.name}.statistics.safetensors"


def save_sums(sums: Mapping[str, PoolSum], unit: UnitWriter, name: str) -> None:
    """Write sums and their numbers of tokens to a file of a unit."""
    tensors = {kind: download(total) for kind, (total, _) in sums.items()}
    counts = {f"{kind}{_TOKENS}": torch.tensor(tokens) for kind, (_, tokens) in sums.items()}
    with unit.file(name) as path:
        save_file(tensors | counts, path)


def read_sums(path: Path, device: torch.device) -> dict[str, PoolSum]:
    """Read what `save_sums` has written; sums are copied to the device."""
    found = load_file(path)
    return {
        kind: (upload(total, device), int(found[f"{kind}{_TOKENS}"]))
        for kind, total in found.items()
        if not kind.endswith(_TOKENS)
    }


class EarlierGroups:
    """Units that the passes of earlier groups have committed for a block.

    Args:
        linears: Linears of the block.

    Raises:
        OrchestratorError: One is missing.
    """

    def __init__(
        self, worker: Worker, block_key: str, group: ExpertGroup, linears: Sequence[Linear]
    ) -> None:
        self._worker, self._is_grouped = worker, group.count > 1 and group.has_experts(linears)
        places = range(group.place) if self._is_grouped else range(0)
        self._keys = [group.key(block_key, place) for place in places]
        self._finished: dict[str, tuple[str, dict[str, Any]]] = {}
        self._deferred: dict[str, str] = {}
        self.expert_tokens: dict[str, int] = {}
        """Tokens of their experts, by the name of the expert's module."""
        for key in self._keys:
            manifest = worker.run.units.manifest(key)
            if manifest is None:
                raise OrchestratorError(
                    f"unit {key}: the statistics of an earlier expert group are missing or "
                    "damaged; repeat the command, which gathers them again"
                )
            facts = manifest["facts"]
            self._finished |= {each["curve"]["name"]: (key, each) for each in facts["linears"]}
            self._deferred |= dict.fromkeys(facts["deferred"], key)
            self.expert_tokens |= facts["expert_tokens"]

    def pools(self) -> dict[str, PoolSum] | None:
        """Return the sums over all experts before this group; None if there is one group."""
        if not self._keys:
            return {} if self._is_grouped else None
        return self._read(self._keys[-1], POOLS_FILE)

    def result(self, linear: Linear, name: str) -> tuple[dict[str, Any], Path] | None:
        """Return the facts of a decomposition and its file, or None if no earlier group made it.

        Args:
            name: Name of the file.
        """
        if linear.name not in self._finished:
            return None
        key, facts = self._finished[linear.name]
        return facts, self._worker.run.units.file(key, name)

    def statistics(self, linear: Linear) -> dict[str, PoolSum] | None:
        """Return the sums of a linear that an earlier group has left to the last, or None."""
        key = self._deferred.get(linear.name)
        return None if key is None else self._read(key, statistics_file(linear))

    def _read(self, key: str, name: str) -> dict[str, PoolSum]:
        return read_sums(self._worker.run.units.file(key, name), self._worker.device)
