"""Forms of compressed linears: reader of the config, tensors and index codes.

Copies of orchestrator's sources. Of the modules only the class methods are used here.
"""

from orchestrator_vllm.forms.affine import AffineLinear
from orchestrator_vllm.forms.base import FormLinear
from orchestrator_vllm.forms.dropped import DroppedLinear
from orchestrator_vllm.forms.low_rank import LowRankLinear
from orchestrator_vllm.forms.low_rank_sparse import LowRankSparseLinear
from orchestrator_vllm.forms.output_basis import OutputBasisLinear
from orchestrator_vllm.forms.pivoted import PivotedLinear
from orchestrator_vllm.forms.sparse import SparseLinear
from orchestrator_vllm.forms.tied import TiedLinear

FORMS: dict[str, type[FormLinear]] = {
    "low_rank": LowRankLinear,
    "affine": AffineLinear,
    "output_basis": OutputBasisLinear,
    "pivoted": PivotedLinear,
    "sparse": SparseLinear,
    "low_rank_sparse": LowRankSparseLinear,
    "tied": TiedLinear,
    "dropped": DroppedLinear,
}
