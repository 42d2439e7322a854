"""Experts modules of a model, and the names that compressed experts would be stored under."""

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction

from transformers import PretrainedConfig, PreTrainedModel

from orchestrator.models.experts.module import Experts
from orchestrator.models.experts.router import can_lose_rows, find_router, row_tensors
from orchestrator.models.forms import FORMS
from orchestrator.models.forms.base import StoredForm
from orchestrator.models.forms.guards import check_names
from orchestrator.models.forms.index_codes import INDEX_CODES
from orchestrator.plan.experts import module_of_experts
from orchestrator.plan.linear import ExpertsModule, Linear

CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Names of the number of experts of a token in configs."""


def survey_experts(model: PreTrainedModel, blocks: str) -> tuple[ExpertsModule, ...]:
    """Describe the replaced experts of a model, in model order.

    Args:
        blocks: Module name of the list of blocks.

    Raises:
        InputError: Loading would change the name under which a form of a linear of an expert is
            stored.
    """
    found, tried = [], dict[type, bool]()
    for name, module in model.named_modules():
        if isinstance(module, Experts) and name.startswith(f"{blocks}."):
            found.append(
                ExpertsModule(
                    name=name,
                    block=int(name.removeprefix(f"{blocks}.").partition(".")[0]),
                    parts=module.layout.parts,
                    count=module.num_experts,
                    chosen=_chosen(model.config, module.num_experts),
                    router=_router(model, name, module, tried),
                    guard=module.layout.fused_name("up", "weight"),
                )
            )
    tensors = _tensors_of_forms() if found else ()
    check_names(
        model,
        [f"{each.name}.0.{part}.{key}" for each in found for part in each.parts for key in tensors]
        + [f"{each.name}.{each.guard}" for each in found],
    )
    return tuple(found)


def with_routing(linears: Iterable[Linear], experts: Iterable[ExpertsModule]) -> tuple[Linear, ...]:
    """Return the linears, those of experts with the fraction of the tokens that they see."""
    routed = {each.name: Fraction(each.chosen, each.count) for each in experts}
    modules = ((linear, module_of_experts(linear)) for linear in linears)
    return tuple(
        replace(linear, routed=routed[module]) if module in routed else linear
        for linear, module in modules
    )


def _chosen(config: PretrainedConfig, experts: int) -> int:
    """Return the number of experts of a token; all if the config does not say it."""
    text = config.get_text_config(decoder=True)
    found = [getattr(part, name, None) for part in (text, config) for name in CHOSEN]
    known = [number for number in found if type(number) is int and number > 0]
    return min(known[0], experts) if known else experts


def _router(
    model: PreTrainedModel, name: str, experts: Experts, tried: dict[type, bool]
) -> tuple[str, ...]:
    """Return the tensors of a router that can lose rows; none if it cannot.

    Args:
        tried: Answers by class, added to: blocks differ in values alone.
    """
    found = find_router(model, name)
    if found is None:
        return ()
    path, router = found
    if type(router) not in tried:
        tried[type(router)] = can_lose_rows(router, experts.num_experts)
    if not tried[type(router)]:
        return ()
    return tuple(f"{path}.{key}" for key in row_tensors(router, experts.num_experts))


def _tensors_of_forms() -> set[str]:
    """Return the names of all tensors that a linear can have in some form."""
    names = {"weight", "bias"}
    for name, form in FORMS.items():
        for code in INDEX_CODES if "index" in form.fields else ("",):
            stored = StoredForm(
                form=name,
                rank=int("rank" in form.fields),
                nonzeros=int("nonzeros" in form.fields),
                index=code,
            )
            names |= {tensor.name for tensor in form.tensors(stored, 8, 8)}
    return names
