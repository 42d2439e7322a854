"""Experts modules of a model, and the names that compressed experts would be stored under."""

from transformers import PreTrainedModel

from orchestrator.models.experts.module import Experts
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
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Experts) and name.startswith(f"{blocks}."):
            found.append(
                ExpertsModule(
                    name=name,
                    block=int(name.removeprefix(f"{blocks}.").partition(".")[0]),
                    parts=module.layout.parts,
                    count=module.num_experts,
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
