"""Options of the compensation for changed inputs: objective, factors to refit, damping."""

from dataclasses import dataclass

from orchestrator.errors import UsageError
from orchestrator.recipe.options import check_choice, check_number

BASES = ("kept", "new")
TOGETHER_BYTES = 2**32
"""Memory of the moments that are gathered in one pass of the chunks; of one site at least."""
SITE_BYTES = 56
"""Bytes of the moments of a site, per squared channel: three moments of dense and compressed
inputs, summed and read out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompensationOptions:
    """Objective of the compensation, and the factors that it may change."""

    objective: str
    """With x a linear's inputs in the dense model and z those in the compressed one: `input`
    |W z - W' z|, `anchored` |W x - W' z|, or `blend`, (1 - beta) of the first squared plus beta of
    the second squared."""
    beta: float = 0.5
    """Weight of the dense model's inputs in `blend`."""
    basis: str = "new"
    """`new`: both factors anew, same rank, optimal for the outputs. `kept`: keep the left factor,
    which a two-sided method chose for the loss (`new` loses that)."""
    damping: float = 0.01
    """Ridge on the second moment of z, as a fraction of its mean diagonal."""

    def __post_init__(self) -> None:
        check_number("compensation: beta", self.beta, 0, 1)
        check_choice("compensation: basis", self.basis, BASES)
        check_number("compensation: damping", self.damping, 0, 1e6)
        if self.objective == "input" and self.basis == "kept":
            raise UsageError(
                "compensation: basis is 'kept' and compensate is 'input'; the right factor is then "
                "optimal for any inputs and no factor would change; give basis 'new'"
            )

    @property
    def dense_part(self) -> float:
        """Value of beta in the objective: the option for `blend`, else 0 or 1."""
        return {"input": 0.0, "anchored": 1.0}.get(self.objective, self.beta)
