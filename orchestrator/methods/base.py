"""Base class of the methods."""

from collections.abc import Sequence
from dataclasses import Field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from orchestrator.methods.kinds.base import Kind
from orchestrator.methods.kinds.low_rank import LOW_RANK
from orchestrator.plan.grouping import Grouping, gram_side
from orchestrator.plan.linear import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from orchestrator.linalg.low_rank import InputGram, OutputGram


Labels = Literal["drawn", "next", "after_next"]


class Method(Protocol):
    """A published method that turns a linear and its statistics into a result to cut from.

    Methods are frozen dataclasses that inherit from this class; their fields are their options.
    Values given here are defaults.

    Laws: `decompose` is a function of the options and its arguments alone, to the bit; any size of
    its result is a slice of any larger one; `energies` and `total` say what a cut loses.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    name: ClassVar[str]
    source: ClassVar[str] = ""
    """Publication, `arXiv 2403.07378`; empty if it was derived here."""
    departure: ClassVar[str] = ""
    """Sentence on what differs from the publication or its code."""
    reconstruction: ClassVar[str] = ""
    """Sentence for the report on what of the publication is not known, so that it is ours; empty if
    all is known."""
    use: ClassVar[str] = ""
    """Sentence on when to take it."""
    version: ClassVar[int] = 1
    """Raised when the method's results change; older units are then computed again."""
    form: ClassVar[str] = "low_rank"
    """Name of the form of the linears that are cut."""
    allocation: ClassVar[str] = "uniform"
    """Default allocator, that of the paper."""
    expert_activations: ClassVar[bool] = False
    """True if `decompose` needs the activation of the linear's expert, and no Gram. Only linears of
    experts are targeted then."""
    expert_outputs: ClassVar[bool] = False
    """True if that activation is the distances of its mean output from those of the others."""
    magnitudes: ClassVar[bool] = False
    """True if `decompose` needs the mean magnitude of every input beside a Gram."""
    input_means: ClassVar[bool] = False
    """True if `decompose` needs the means of the inputs beside a Gram. Linears of experts are
    refused then."""
    gradient: ClassVar[Literal["curvature", "weight", "directions"]] = "curvature"
    """Statistic of the gradients, where `label_draws` asks for some: the second moment of those of
    the outputs; or, gathered with the inputs, the gradient of the weight [O, I], or those of the
    gates of its singular directions, sequence by sequence."""
    block_cosines: ClassVar[bool] = False
    """True if cosines of whole blocks are computed whatever the allocation is, which may be the
    allocation `grasp` of a later size."""
    nats: ClassVar[bool] = False
    """True if energies are in half a nat over all calibration tokens, to second order."""
    output_curvature: ClassVar[bool] = False
    """True if the curvature is that of the outputs, [O, O], also where O > I."""

    @property
    def kind(self) -> Kind[Any]:
        """Kind of the results of `decompose`."""
        return LOW_RANK

    @property
    def label_draws(self) -> int:
        """Number of labels drawn for each token; the gradients of their losses give the curvature
        that `decompose` needs. 0: no backward pass."""
        return 0

    @property
    def labels(self) -> Labels:
        """Labels of the loss: drawn from the model's own distribution, or the token of the text
        that follows, or the one after it."""
        return "drawn"

    @property
    def decomposition(self) -> str:
        """Name of the stored result, with all options that change it.

        Methods that share it read the same units.
        """
        ...

    @property
    def grouping(self) -> Grouping:
        """Groups of linears that are decomposed as one and share its basis; none by default."""
        return Grouping()

    @property
    def takes_experts_apart(self) -> bool:
        """True if the experts of a block can be calibrated in several passes, group by group."""
        is_pooled = self.gradient == "curvature"
        return is_pooled and not (self.expert_activations or self.grouping.experts)

    def refits(self, keep: float) -> bool:
        """Return True if left factors are refitted to the inputs of the compressed model."""
        return False

    def side(self, linear: Linear, site: Sequence[Linear]) -> Literal["input", "output"]:
        """Return which Gram this linear needs, given all targeted linears of its site.

        The output Gram where no linear of the site needs H and it is smaller than H. The left
        singular vectors need no more. Where H is there anyway it is the better one: its products
        of inputs are rounded once, those of outputs twice.
        """
        return gram_side(linear, site)

    def decompose(self, weight_OI: "Tensor", statistic: "InputGram | OutputGram", rank: int) -> Any:
        """Return the result for one linear, of the kind `kind`: factors up to `rank`, all entries,
        or both."""
        ...
