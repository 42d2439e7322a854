"""Experts of a compressed checkpoint: their modules, names and guards.

As soon as one linear of an expert is compressed, all experts of a model are modules of their own,
`Experts`, and stored under the names of these. A guard is stored under the name of a fused tensor
that each of these modules replaces: a program that does not know the format finds another shape
there and stops, where it would have made up the experts.
"""

import copy
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from orchestrator.errors import InputError
from orchestrator.models.experts.module import Experts
from orchestrator.models.experts.replace import replace_experts
from orchestrator.models.forms.base import StoredForm
from orchestrator.models.forms.config import DROPPED

GONE = -1
"""Entry of a guard for a linear of an expert that is dropped."""


def install_experts(model: PreTrainedModel, names: Collection[str]) -> dict[str, Experts]:
    """Replace the fused experts of a model, each with a guard, an int32 buffer [parts, E].

    Experts that are replaced already get their guard.

    Args:
        names: Names of the experts modules by the config: all of the model's.

    Returns:
        The modules by these names.

    Raises:
        InputError: The model has other experts modules, or they are not supported.
    """
    replace_experts(model)
    modules = experts_of(model)
    given = {without_prefix(model, name): name for name in names}
    for name in sorted(given.keys() ^ modules.keys())[:1]:
        raise InputError(
            f"config.json: quantization_config.experts: {given.get(name, name)!r} is "
            f"{'missing, an' if name in modules else 'no'} experts module of "
            f"{type(model).__name__}; the config does not belong to this model"
        )
    for experts in modules.values():
        shape = len(experts.layout.parts), experts.num_experts
        device = next(experts.parameters()).device
        guard = torch.zeros(shape, dtype=torch.int32, device=device)
        experts.register_buffer(experts.layout.fused_name("up", "weight"), guard)
    return {given[name]: module for name, module in modules.items()}


def without_prefix(model: PreTrainedModel, name: str) -> str:
    """Return the name of a module in a model that may lack the head, and then the `model.`."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def experts_of(model: PreTrainedModel) -> dict[str, Experts]:
    """Find the replaced experts of a model, by their names without the prefix, in model order."""
    return {
        without_prefix(model, name): module
        for name, module in model.named_modules()
        if isinstance(module, Experts)
    }


def guard_entry(form: StoredForm) -> int:
    """Return the entry of a guard for a linear: its rank, 0 without one, or `GONE`."""
    return GONE if form.form == DROPPED else form.rank


def guard_values(
    ranks: Mapping[str, int], module: str, parts: Collection[str], *, experts: int
) -> Tensor:
    """Return the guard of a module, int32 [parts, E]: the entry of each linear, 0 if it is dense.

    Args:
        ranks: Results of `guard_entry` by the name of the linear.
        module: Name of the experts module.
    """
    rows = [[ranks.get(f"{module}.{e}.{part}", 0) for e in range(experts)] for part in parts]
    return torch.tensor(rows, dtype=torch.int32)


def check_guards(model: PreTrainedModel, forms: Mapping[str, StoredForm]) -> None:
    """Compare the guards that were loaded with the forms of the config; skip those on a disk.

    Raises:
        InputError: A guard has other ranks, so that files and config are of different models.
    """
    ranks = {without_prefix(model, name): guard_entry(form) for name, form in forms.items()}
    for name, experts in experts_of(model).items():
        layout = experts.layout
        guard = experts._buffers.get(layout.fused_name("up", "weight"))
        if guard is not None and not guard.is_meta:
            check_guard(name, guard, guard_values(ranks, name, layout.parts, experts=len(guard[0])))


def check_guard(module: str, found: Tensor, expected: Tensor) -> None:
    """Raise InputError if the guard of an experts module has other values than the config."""
    if not torch.equal(found.cpu(), expected):
        raise InputError(
            f"{module}: the ranks that are stored with the experts are not those of config.json; "
            "the checkpoint is damaged, or files of different checkpoints are mixed"
        )


def check_dropped(experts: Mapping[str, Experts]) -> None:
    """Raise InputError if only some linears of an expert are dropped."""
    for name, module in experts.items():
        for number, expert in module.named_children():
            if len({each.weight is None for each in expert.children()}) > 1:
                raise InputError(
                    f"config.json: quantization_config.experts[{name!r}]: expert {number} is "
                    "dropped in part; the config does not belong to this model"
                )


def check_names(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Check that transformers loads and saves tensors of experts under the given names.

    Each kind of name is checked once in a module: rules do not depend on the number of the expert.

    Raises:
        InputError: A rule for the weights of this class changes a name.
    """
    kinds = {re.sub(r"\.\d+\.(gate|up|down)\.", r".0.\1.", name): name for name in names}
    rules = conversions_of(model) if kinds else []
    for name in kinds.values():
        renamed, pattern = _renamed(name, rules)
        if renamed != name or pattern is not None:
            raise InputError(
                f"{type(model).__name__}: transformers would load {name} as {renamed}; "
                "compressed experts of this class are not supported by this version"
            )


def conversions_of(model: PreTrainedModel) -> list[Any]:
    """Return transformers' rules for the stored tensors of a model that may have `Experts`."""
    return without_guards(model, get_model_conversion_mapping(model))


def without_guards(model: PreTrainedModel, rules: Sequence[Any]) -> list[Any]:
    """Leave out the conversions of fused tensors that guards are stored in the place of.

    Such a rule transposes a tensor if its shape is not that of the parameter (Qwen3-VL-MoE), and a
    guard is no parameter.
    """
    names = [
        f"{name}.{module.layout.fused_name('up', 'weight')}"
        for name, module in model.named_modules()
        if isinstance(module, Experts)
    ]
    # a rule notes that it was used, and is then reversed when the model is saved
    copies = copy.deepcopy(rules) if names else []
    converted = {_renamed(name, copies)[1] for name in names}
    return [
        rule
        for rule in rules
        if not isinstance(rule, WeightConverter) or converted.isdisjoint(rule.source_patterns)
    ]


def _renamed(name: str, rules: Sequence[Any]) -> tuple[str, str | None]:
    """Return the name in the model of a stored tensor, and the pattern of its conversion."""
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamed, pattern = rename_source_key(name, renamings, converters)
    return str(renamed), pattern
