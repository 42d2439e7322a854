"""Verification of a compressed checkpoint: files, tensors, reconstructed linears and logits.

Shape suffixes: O outputs, I inputs, B sequences, T tokens, V vocabulary.
"""

import re
from collections.abc import Callable, Mapping, Sequence
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
from orchestrator.models.evaluation.stored_files import check_files
from orchestrator.models.forms import FORMS
from orchestrator.models.forms.config import read_forms
from orchestrator.models.forms.install import install_forms
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.dense_weight import (
    check_index,
    check_stored_guards,
    read_dense_weight,
)
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.survey.architecture import Architecture
from orchestrator.models.survey.expert_weights import view_experts
from orchestrator.models.survey.names import map_names
from orchestrator.plan.cut import cut_blocks
from orchestrator.plan.result import REPORT_FILE
from orchestrator.readable import counted

TOLERANCE = 0.02, 1e-3
"""Tolerance of measured against reported errors: a fraction of the error, plus rounding."""
_NUMBER = re.compile(r"\.\d+\.")


def verify(
    directory: Path,
    *,
    changes_errors: Callable[[Mapping[str, Any]], bool],
    dense: Path | None = None,
    linears: int = 14,
    tokens: int = 64,
) -> dict[str, Any]:
    """Verify a compressed checkpoint, with one tensor, one linear or one block in memory.

    1. Config, index, headers and the forms in the config are consistent.
    2. Every file has the BLAKE2b digest that the report records, and the report the one in the
       config (`stored_files`).
    3. Every linear has the form, rank and number of entries that the report states.
    4. Every tensor is finite, and every index and every guard of experts valid.
    5. Sampled linears, evenly over the roles, are reconstructed; given the dense model,
       |W - W'|^2 / |W|^2 matches the report, unless they were trained since.
    6. Tokens pass through all blocks, and the logits are finite; given the dense model, the mean
       KL from it and the top-1 agreement are returned.

    A dense model with another fingerprint than that of the compressed one is a problem, and nothing
    is compared with it, unless all tensors that were kept are equal, as in a copy whose tensors are
    in other files; a note says so.

    Args:
        changes_errors: Function of a report: True if it has a stage after which the errors of
            linears are no longer those of their decompositions, or if it has estimates of them.
        dense: Directory of the dense checkpoint.
        linears: Number of linears to reconstruct.
        tokens: Number of probe tokens, drawn from the vocabulary with seed 0; no text is needed,
            and quality is not measured.

    Returns:
        `problems`, empty if none were found, the results of the checks: `files`, `tensors`,
        `linears`, `logits`, and `notes` about checks that are not possible, if there are any.
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
            errors_changed=changes_errors(report),
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
        errors_changed: bool,
        linears: int,
        tokens: int,
    ) -> None:
        self._directory, self._lazy_model, self._report = directory, lazy_model, report
        self._dense = None if dense is None else LazyModel.open(dense, dtype=torch.float32)
        self._errors_changed, self._linears, self._tokens = errors_changed, linears, tokens
        self._problems: list[str] = []
        self._notes: list[str] = []
        self._unsound: set[str] = set()
        """Linears with an invalid index."""

    def perform(self) -> dict[str, Any]:
        looks: dict[str, Callable[[], Any]] = {
            "files": self._files,
            "tensors": self._tensors,
            "linears": self._reconstruct,
            "logits": self._probe,
        }
        found: dict[str, Any] = {}
        self._check_base()
        for name, look in looks.items():
            if name == "logits" and self._unsound:
                # an invalid index selects values that do not exist
                continue
            try:
                found[name] = look()
            except InputError as error:
                self._problems.append(str(error))
        notes = {"notes": self._notes} if self._notes else {}
        return {**found, **notes, "problems": list(dict.fromkeys(self._problems))}

    def _check_base(self) -> None:
        """Keep the dense model only if it is the one that was compressed."""
        base = self._lazy_model.base_fingerprint
        if self._dense is None or base is None:
            return
        found, where = self._dense.weights.fingerprint, self._dense.directory
        if found == base:
            return
        count, other = compare_kept(self._dense, self._lazy_model)
        if count and other is None:
            self._notes.append(
                f"{where}: its files are not those of the model that was compressed, but the "
                f"{counted(count, 'tensor')} that {'was' if count == 1 else 'were'} kept agree"
            )
            return
        because = f"; {other} differs" if other else ""
        self._problems.append(
            f"{where}: is not the model that was compressed; its fingerprint (of config and "
            f"weights) is {found[:12]}, that of the compressed one {base[:12]}{because}; give that "
            "model, or none"
        )
        self._dense = None

    def _complain(self, what: str) -> None:
        self._problems.append(f"{self._directory}: {what}")

    def _files(self) -> dict[str, str]:
        """State of every file: `as reported`, `changed` or `not reported`."""
        dense = None if self._dense is None else self._dense.directory
        found = check_files(self._directory, self._report, dense)
        self._problems += found.problems
        self._notes += found.notes
        return dict(found.states)

    def _tensors(self) -> int:
        """Count the tensors; reports those with NaN or infinite values."""
        weights = self._lazy_model.weights
        for name in weights.names:
            tensor = weights.read(name)
            bad = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
            if bad:
                self._complain(f"{name} has {bad} NaN or infinite of {tensor.numel()} values")
        return len(weights.names)

    def _reconstruct(self) -> dict[str, dict[str, Any]]:
        """Reconstruct sampled linears: form, reported error, and error against the dense weight."""
        architecture = Architecture.read(self._directory)
        stored = Weights.open(self._directory)
        weights = view_experts(stored, architecture)
        assert architecture.forms is not None
        self._check_sizes(architecture.forms)
        model = replace(architecture, forms=None).build(torch.float32, stored=len(stored.names))
        turned = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        install_forms(model, architecture.forms)
        names = map_names(model, weights)
        forms = read_forms(architecture.forms)
        check_stored_guards(model, forms, weights, names)
        compressed = list(forms)
        for name in compressed:
            try:
                check_index(model, name, weights, names)
            except InputError as damage:
                self._problems.append(str(damage))
                self._unsound.add(name)
        found = {}
        for name in sampled(compressed, self._linears):
            if name in self._unsound:
                continue
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
        """Compare the forms in the config with those in the report."""
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
        if reported is None or self._errors_changed:
            return
        if name in self._sharing:
            # the report has the joint error of all linears that share the basis
            return
        part, rounding = TOLERANCE
        if abs(error - reported) > part * reported + rounding:
            self._complain(
                f"{name}: |W - W'|^2 / |W|^2 is {error:.5g}, the report says {reported:.5g}"
            )

    @cached_property
    def _sharing(self) -> set[str]:
        """Names of linears that share a basis with another."""
        bases = {n: each["basis"] for n, each in self._report["linears"].items() if "basis" in each}
        return {*bases, *bases.values()}

    def _probe(self) -> dict[str, Any]:
        """Compute logits of random tokens: finiteness, and divergence from the dense model."""
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


def compare_kept(dense: LazyModel, compressed: LazyModel) -> tuple[int, str | None]:
    """Compare the tensors that a compression has copied, one at a time.

    Returns:
        Their number, and the name of the first one that the dense model lacks or has with other
        values (in the dtype of the copy), None if all are equal.
    """
    disk, kept, replaced = compressed.disk_names, 0, _own_biases(compressed)
    survey = dense.survey()
    linears = {f"{linear.name}.weight" for linear in survey.compressible}
    for module in survey.experts:
        # dropped experts have no bias, and their routers fewer rows
        linears |= {*module.router, *(f"{n}.bias" for e in module.linears().values() for n in e)}
    for name, own in dense.disk_names.items():
        shape = dense.weights.shape(own)
        if name not in disk or compressed.weights.shape(disk[name]) != shape:
            if name in linears:
                continue  # in another form
            return kept, name
        if name in replaced:
            continue
        copy = compressed.weights.read(disk[name])
        if not torch.equal(dense.weights.read(own).to(copy.dtype), copy):
            return kept, name
        kept += 1
    return kept, None


def _own_biases(compressed: LazyModel) -> set[str]:
    """Return the names of biases that belong to a form, in the place of those of dense linears."""
    forms = Architecture.read(compressed.weights.directory).forms
    found = read_forms(forms) if forms else {}
    return {f"{name}.bias" for name, form in found.items() if not FORMS[form.form].keeps_bias}


def _logits(lazy_model: LazyModel, chunk: Chunk) -> Tensor:
    """Compute logits with one block in memory at a time."""
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
    """Sample `count` names in their order, balanced over roles up to a difference of one.

    Within a role they are spaced evenly over the model; names of a role differ only in the numbers
    of block and expert.
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
