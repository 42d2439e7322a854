"""How linears are compensated for the inputs that have changed: the objective and its options."""

from dataclasses import dataclass

from orchestrator.errors import UsageError
from orchestrator.recipe.options import check_choice, check_number

BASES = ("kept", "new")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompensationOptions:
    """What the outputs are compared with, and what of the factors may change."""

    objective: str
    """With x the dense model's inputs of a linear and z the compressed one's: `input`
    |W z - W' z|, `anchored` |W x - W' z|, or `blend`, (1 - beta) of the first squared and beta of
    the second."""
    beta: float = 0.5
    """The dense model's part in `blend`."""
    basis: str = "new"
    """`new` factors of the same rank, best for the outputs, or the left factor `kept`, which a
    method has found for the loss (two-sided: `new` loses that)."""
    damping: float = 0.01
    """Ridge on the second moment of z, as a fraction of its mean diagonal."""

    def __post_init__(self) -> None:
        check_number("compensation: beta", self.beta, 0, 1)
        check_choice("compensation: basis", self.basis, BASES)
        check_number("compensation: damping", self.damping, 0, 1e6)
        if self.objective == "input" and self.basis == "kept":
            raise UsageError(
                "compensation: basis is 'kept' and compensate is 'input'; the right factor is the "
                "best for any inputs then and nothing would change; give basis 'new'"
            )

    @property
    def dense_part(self) -> float:
        """beta of the objective: that of the options for `blend`, else 0 or 1."""
        return {"input": 0.0, "anchored": 1.0}.get(self.objective, self.beta)
