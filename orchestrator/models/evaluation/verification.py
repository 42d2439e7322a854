"""Verification of a compressed checkpoint: unchanged, complete, sound, and able to run.

Shape suffixes: O outputs, I inputs, B sequences, T tokens, V vocabulary.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm as norm
from torch.nn.functional import log_softmax
from transformers.pytorch_utils import Conv1D

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.headers import read_json
from orchestrator.models.checkpoint.weights import Weights
from orchestrator.models.checkpoint.write import REPORT_FILE
from orchestrator.models.forms.config import install_forms, read_forms
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.dense_weight import read_dense_weight
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.survey.architecture import Architecture
from orchestrator.models.survey.names import map_names
from orchestrator.plan.cut import cut_blocks
from orchestrator.store.files import digest_file

TOLERANCE = 0.02, 1e-3
"""Allowed difference of a measured error from the reported one: a fraction of it, and rounding."""
_NUMBER = re.compile(r"\.\d+\.")


def verify(
    directory: Path,
    *,
    changing: Collection[str],
    dense: Path | None = None,
    linears: int = 14,
    tokens: int = 64,
) -> dict[str, Any]:
    """Reads a compressed checkpoint again; one tensor, one linear or one block is in memory.

    1. Config, index, headers and the forms that the config names fit each other.
    2. Every file has the BLAKE2b that the report has of it.
    3. Every linear has the form, rank and number of entries that the report says.
    4. Every tensor is finite.
    5. Sampled linears, as evenly over roles as possible, are reconstructed; with the dense model,
       |W - W'|^2 / |W|^2 is the report's, unless they were trained since.
    6. Tokens pass through all blocks, and the logits are finite; with the dense model, the mean
       KL from it and the agreement on the first token are measured.

    Args:
        changing: Names of the stages after which the error of a linear is no longer that of its
            decomposition.
        dense: The dense checkpoint.
        linears: How many are reconstructed.
        tokens: Of the probe: drawn from the vocabulary, seed 0, so no text is needed, and no
            quality is measured.

    Returns:
        `problems`, empty if all is well, and what was found: `files`, `tensors`, `linears`,
        `logits`.
    """
    try:
        lazy_model = LazyModel.open(directory, dtype=torch.float32)
    except InputError as error:
        return {"problems": [str(error)]}
    if not lazy_model.is_compressed:
        return {"problems": [f"{directory}: is not compressed by orchestrator"]}
    try:
        report = read_json(directory / REPORT_FILE)
        entries = report.get("linears")
        if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
            raise InputError(f"{directory / REPORT_FILE}: says nothing of any linear")
        found = _Verification(
            directory,
            lazy_model,
            report,
            dense,
            changing=changing,
            linears=linears,
            tokens=tokens,
        )
        return found.perform()
    except InputError as error:
        return {"problems": [str(error)]}


class _Verification:
    def __init__(
        self,
        directory: Path,
        lazy_model: LazyModel,
        report: Mapping[str, Any],
        dense: Path | None,
        *,
        changing: Collection[str],
        linears: int,
        tokens: int,
    ) -> None:
        self._directory, self._lazy_model, self._report = directory, lazy_model, report
        self._dense = None if dense is None else LazyModel.open(dense, dtype=torch.float32)
        self._changing, self._linears, self._tokens = changing, linears, tokens
        self._problems: list[str] = []

    def perform(self) -> dict[str, Any]:
        looks: dict[str, Callable[[], Any]] = {
            "files": self._files,
            "tensors": self._tensors,
            "linears": self._reconstruct,
            "logits": self._probe,
        }
        found: dict[str, Any] = {}
        for name, look in looks.items():
            try:
                found[name] = look()
            except InputError as error:
                self._problems.append(str(error))
        return {**found, "problems": list(dict.fromkeys(self._problems))}

    def _complain(self, what: str) -> None:
        self._problems.append(f"{self._directory}: {what}")

    def _files(self) -> dict[str, str]:
        """State of every file of weights: `as reported`, `changed` or `not reported`."""
        reported = self._report.get("files", {})
        found = {}
        for path in sorted(self._directory.glob("*.safetensors")):
            expected = reported.get(path.name)
            found[path.name] = "not reported"
            if expected is not None:
                is_same = digest_file(path) == expected
                found[path.name] = "as reported" if is_same else "changed"
                if not is_same:
                    self._complain(f"{path.name} is not the file that was written")
        for name in reported.keys() - found.keys():
            self._complain(f"{name} is missing")
        return found

    def _tensors(self) -> int:
        """Number of tensors; those with NaN or infinite values are problems."""
        weights = self._lazy_model.weights
        for name in weights.names:
            tensor = weights.read(name)
            bad = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
            if bad:
                self._complain(f"{name} has {bad} NaN or infinite of {tensor.numel()} values")
        return len(weights.names)

    def _reconstruct(self) -> dict[str, dict[str, Any]]:
        """Sampled linears: form, size, and their error beside the dense weight."""
        architecture = Architecture.read(self._directory)
        weights = Weights.open(self._directory)
        assert architecture.forms is not None
        self._check_sizes(architecture.forms)
        model = replace(architecture, forms=None).build(torch.float32, stored=len(weights.names))
        turned = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        install_forms(model, architecture.forms)
        names = map_names(model, weights)
        found = {}
        for name in sampled(list(read_forms(architecture.forms)), self._linears):
            weight_OI = read_dense_weight(model, name, weights, names)
            entry = self._report["linears"].get(name, {})
            found[name] = {"form": entry.get("form"), "reported": entry.get("weight_error")}
            if not bool(weight_OI.isfinite().all()):
                self._complain(f"{name}: its product is not finite")
            if self._dense is not None:
                whole = self._dense.load(f"{name}.weight")
                error = _error(whole.T if name in turned else whole, weight_OI)
                found[name]["error"] = error
                self._compare(name, error, entry.get("weight_error"))
        return found

    def _check_sizes(self, forms: Mapping[str, Any]) -> None:
        """The config's forms against the report's."""
        reported = self._report["linears"]
        for name, form in read_forms(forms).items():
            entry = reported.get(name)
            if entry is None:
                self._complain(f"{name} is compressed, and the report does not know it")
                continue
            sizes = {"form": form.form, "rank": form.rank, "nonzeros": form.nonzeros}
            for size, value in sizes.items():
                if size in entry and value and entry[size] != value:
                    self._complain(f"{name}: {size} is {value}, the report says {entry[size]}")

    def _compare(self, name: str, error: float, reported: float | None) -> None:
        if reported is None or any(stage in self._report for stage in self._changing):
            return
        if name in self._sharing:
            # what is reported is the error of all that share the basis together
            return
        part, rounding = TOLERANCE
        if abs(error - reported) > part * reported + rounding:
            self._complain(
                f"{name}: |W - W'|^2 / |W|^2 is {error:.5g}, the report says {reported:.5g}"
            )

    @cached_property
    def _sharing(self) -> set[str]:
        """Linears whose basis is another's too."""
        bases = {n: each["basis"] for n, each in self._report["linears"].items() if "basis" in each}
        return {*bases, *bases.values()}

    def _probe(self) -> dict[str, Any]:
        """Logits of random tokens, and their difference from the dense model's."""
        vocabulary = self._lazy_model.config.get_text_config().vocab_size
        ids = np.random.default_rng(0).integers(0, vocabulary, (1, self._tokens))
        tokens_BT = torch.from_numpy(ids)
        chunk = Chunk(0, tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))
        logits_BTV = _logits(self._lazy_model, chunk)
        finite = bool(logits_BTV.isfinite().all())
        if not finite:
            self._complain("the logits are not finite")
        found: dict[str, Any] = {"tokens": self._tokens, "finite": finite}
        if self._dense is not None and finite:
            dense_BTV = _logits(self._dense, chunk)
            target, given = log_softmax(dense_BTV, -1), log_softmax(logits_BTV, -1)
            found["kl"] = float((target.exp() * (target - given)).sum(-1).mean())
            same = dense_BTV.argmax(-1) == logits_BTV.argmax(-1)
            found["top1_agreement"] = float(same.float().mean())
        return found


def _logits(lazy_model: LazyModel, chunk: Chunk) -> Tensor:
    """Through one block after the other."""
    cut = cut_blocks(lazy_model.num_blocks, lazy_model.num_blocks)
    for blocks in cut[:-1]:
        with lazy_model.shard(blocks) as shard:
            chunk = shard.forward(chunk)
    with lazy_model.shard(cut[-1]) as shard:
        return shard.logits(chunk).float()


def _error(whole_OI: Tensor, weight_OI: Tensor) -> float:
    lost = norm(whole_OI.float() - weight_OI, dtype=torch.float64).square()
    return float(lost / norm(whole_OI, dtype=torch.float64).square())


def sampled(names: Sequence[str], count: int) -> list[str]:
    """Sample `count` names, in their order: as many of each role as of any other, or one more.

    Of each role evenly over the model; names of one role differ in blocks and experts alone.
    """
    roles: dict[str, list[str]] = {}
    for name in names:
        roles.setdefault(_NUMBER.sub(".", name), []).append(name)
    wanted = dict.fromkeys(roles, 0)
    while sum(wanted.values()) < min(count, len(names)):
        for role, there in roles.items():
            if sum(wanted.values()) < count and wanted[role] < len(there):
                wanted[role] += 1
    chosen = {
        there[place * len(there) // wanted[role]]
        for role, there in roles.items()
        for place in range(wanted[role])
    }
    return [name for name in names if name in chosen]
