"""Forms that a linear can take, without torch: values, bytes and limits of each.

Stored bytes are those of the values in a number format (`plan.codecs`) plus those of an index. The
modules and tensors of the same forms are in `orchestrator.models.forms`.

A new form is one file and one line here, and one file and one line there.
"""

from orchestrator.plan.forms.base import Form
from orchestrator.plan.forms.dense import DENSE
from orchestrator.plan.forms.low_rank import LOW_RANK
from orchestrator.plan.forms.low_rank_sparse import LOW_RANK_SPARSE
from orchestrator.plan.forms.pivoted import PIVOTED
from orchestrator.plan.forms.sparse import SPARSE

__all__ = [
    "DENSE",
    "FORMS",
    "LOW_RANK",
    "LOW_RANK_SPARSE",
    "PIVOTED",
    "SPARSE",
    "Form",
    "stored_as",
]

FORMS: dict[str, Form] = {
    "dense": DENSE,
    "low_rank": LOW_RANK,
    "pivoted": PIVOTED,
    "sparse": SPARSE,
    "low_rank_sparse": LOW_RANK_SPARSE,
}


def stored_as(form: str, storage: str) -> Form:
    """Form that cut linears are stored in.

    Args:
        form: Name of the form that the method cuts linears to.
        storage: `plain`, or name of the form that its factors are brought to.
    """
    return FORMS[form if storage == "plain" else storage]
