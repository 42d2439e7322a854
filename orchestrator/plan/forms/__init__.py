"""Forms that a linear can take, without torch: values, bytes and limits of each.

Stored bytes are those of the values in a number format (`plan.codecs`) plus those of an index. The
modules and tensors of the same forms are in `orchestrator.models.forms`.

A new form is one file there, one file here, and one line in `FORMS`; a form of another package is
two files and an entry point.
"""

from orchestrator.plan.forms.affine import AFFINE
from orchestrator.plan.forms.base import Divided, Form
from orchestrator.plan.forms.dense import DENSE
from orchestrator.plan.forms.dropped import DROPPED
from orchestrator.plan.forms.low_rank import LOW_RANK
from orchestrator.plan.forms.low_rank_sparse import LOW_RANK_SPARSE
from orchestrator.plan.forms.output_basis import OUTPUT_BASIS
from orchestrator.plan.forms.pivoted import PIVOTED
from orchestrator.plan.forms.sparse import SPARSE
from orchestrator.plan.forms.tied import TIED
from orchestrator.registry import Registry

__all__ = [
    "AFFINE",
    "DENSE",
    "DROPPED",
    "FORMS",
    "LOW_RANK",
    "LOW_RANK_SPARSE",
    "OUTPUT_BASIS",
    "PIVOTED",
    "SPARSE",
    "TIED",
    "Divided",
    "Form",
    "stored_as",
]

FORMS: Registry[Form] = Registry(
    "orchestrator.forms",
    {
        "dense": "orchestrator.plan.forms.dense:DENSE",
        "low_rank": "orchestrator.plan.forms.low_rank:LOW_RANK",
        "affine": "orchestrator.plan.forms.affine:AFFINE",
        "output_basis": "orchestrator.plan.forms.output_basis:OUTPUT_BASIS",
        "pivoted": "orchestrator.plan.forms.pivoted:PIVOTED",
        "sparse": "orchestrator.plan.forms.sparse:SPARSE",
        "low_rank_sparse": "orchestrator.plan.forms.low_rank_sparse:LOW_RANK_SPARSE",
        "tied": "orchestrator.plan.forms.tied:TIED",
        "dropped": "orchestrator.plan.forms.dropped:DROPPED",
    },
    base=Form,
    makes=True,
)


def stored_as(form: str, storage: str) -> Form:
    """Form that cut linears are stored in.

    Args:
        form: Name of the form that the method cuts linears to.
        storage: `plain`, or name of the form that its factors are brought to.
    """
    return FORMS[form if storage == "plain" else storage]
