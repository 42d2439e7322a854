"""Modules of compressed linears by form, with their tensors, and the config that names them.

Sizes of the same forms, without torch, are in `orchestrator.plan.forms`. A form's file comes behind
those that it imports: in this order their texts are joined into one (`orchestrator.hf.bootstrap`).
"""

from orchestrator.models.forms.base import FormLinear
from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.models.forms.low_rank_sparse import LowRankSparseLinear
from orchestrator.models.forms.pivoted import PivotedLinear
from orchestrator.models.forms.sparse import SparseLinear

FORMS: dict[str, type[FormLinear]] = {
    "low_rank": LowRankLinear,
    "pivoted": PivotedLinear,
    "sparse": SparseLinear,
    "low_rank_sparse": LowRankSparseLinear,
}
