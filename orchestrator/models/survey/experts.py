"""Experts modules of a model, and the names that compressed experts would be stored under."""

from transformers import PreTrainedModel

from orchestrator.models.experts.module import Experts
from orchestrator.models.experts.router import can_lose_rows, find_router, row_tensors
from orchestrator.models.forms import FORMS
from orchestrator.models.forms.base import StoredForm
from orchestrator.models.forms.guards import check_names
from orchestrator.models.forms.index_codes import INDEX_CODES
from orchestrator.plan.linear import ExpertsModule


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
                    choices=_choices(model, name, module),
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


def _choices(model: PreTrainedModel, name: str, experts: Experts) -> int:
    """Return the number of experts of a token, `top_k` of the router or of the module around it.

    All of them, so that none can be dropped, if no module says it.
    """
    around = model.get_submodule(name.rpartition(".")[0])
    found = (getattr(module, "top_k", None) for module in (around, *around.children()))
    return next((each for each in found if type(each) is int), experts.num_experts)


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
