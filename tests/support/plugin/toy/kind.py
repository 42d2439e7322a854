"""The method's kind of result."""

from dataclasses import dataclass

from orchestrator.methods.kinds.base import Kind


@dataclass(frozen=True)
class Loss:
    """Input of the allocation: energy that a diagonal linear loses, and that of all outputs."""

    lost: float
    total: float


class DiagonalKind(Kind):
    """One value for each output; a linear is either diagonal or dense."""

    sizes = ()

    @property
    def cost(self):
        from toy.cost import DiagonalCost

        return DiagonalCost()

    def facts(self, name, weight_OI, result):
        weight = weight_OI.double().square().sum()
        kept = result.diagonal_O.double()
        rest = weight_OI.double()
        rows = range(len(weight_OI))
        rest[rows, [row % weight_OI.shape[1] for row in rows]] -= kept
        total = float(result.total_O.sum())
        return {
            "curve": {"name": name, "lost": result.lost, "total": total},
            "weight_error": float(rest.square().sum() / weight),
            "numerics": {"kept_energy": float(result.kept_O.sum()) / total},
        }

    def tensors(self, result, dtype):
        return {
            "diagonal": result.diagonal_O.to(dtype),
            "total": result.total_O,
            "kept": result.kept_O,
        }

    def curve(self, facts):
        return Loss(facts["curve"]["lost"], facts["curve"]["total"])

    def errors(self, facts, linear, assigned):
        loss = self.curve(facts)
        return {
            "activation_error": loss.lost / loss.total,
            "weight_error": facts["weight_error"],
        }

    def part(self, stored, part, *, rank, nonzeros):
        return stored.whole(part)


DIAGONAL = DiagonalKind()
