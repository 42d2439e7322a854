"""Forms of compressed linears: reader of the config, tensors and index codes.

Copies of orchestrator's sources. Of the modules only the class methods are used here.
"""

from orchestrator_sglang.shared.forms.affine import AffineLinear
from orchestrator_sglang.shared.forms.base import FormLinear
from orchestrator_sglang.shared.forms.dropped import DroppedLinear
from orchestrator_sglang.shared.forms.low_rank import LowRankLinear
from orchestrator_sglang.shared.forms.low_rank_sparse import LowRankSparseLinear
from orchestrator_sglang.shared.forms.output_basis import OutputBasisLinear
from orchestrator_sglang.shared.forms.pivoted import PivotedLinear
from orchestrator_sglang.shared.forms.sparse import SparseLinear
from orchestrator_sglang.shared.forms.tied import TiedLinear

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
