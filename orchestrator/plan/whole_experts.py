"""Experts as wholes: what an allocation drops, merges or keeps as one."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.errors import UsageError
from orchestrator.plan.linear import ExpertsModule, Linear


@dataclass(frozen=True, slots=True)
class Expert:
    """The linears of one expert, in call order, the last of them `down`."""

    linears: tuple[Linear, ...]

    @property
    def values(self) -> int:
        """Values of the dense weights."""
        return sum(linear.values for linear in self.linears)


def linears_of_experts(
    linears: Sequence[Linear], modules: Sequence[ExpertsModule], method: str
) -> tuple[Linear, ...]:
    """Return those of the targeted linears that belong to experts, for a method that is for them.

    Raises:
        UsageError: There are none.
    """
    names = {name for module in modules for each in module.linears().values() for name in each}
    found = tuple(linear for linear in linears if linear.name in names)
    if not found:
        raise UsageError(
            f"{method} is for experts, and the model has none among the targeted linears; give "
            "another method"
        )
    return found


def check_no_experts(linears: Sequence[Linear], method: str) -> None:
    """Raise UsageError if a targeted linear is an expert's, for a method that is not for them."""
    for linear in linears:
        if linear.experts:
            raise UsageError(
                f"{linear.name} is an expert's, whose mean inputs {method} does not take; leave "
                "experts out by --ignore '*.experts.*', or give method svd-llm"
            )


def chosen_by_module(modules: Sequence[ExpertsModule]) -> dict[str, int]:
    """Return the number of experts that a router chooses for a token, by the name of the module."""
    return {module.name: module.chosen for module in modules}


def check_routers(modules: Sequence[ExpertsModule], option: str) -> None:
    """Raise UsageError if a router cannot lose rows.

    Args:
        option: Option that keeps routers as they are, with its value.
    """
    for module in modules:
        if not module.router:
            raise UsageError(
                f"{module.name}: its router does not choose among fewer experts as if the others "
                f"were never chosen; give --option {option}, which leaves it as it is"
            )


def experts_by_module(
    linears: Sequence[Linear], modules: Sequence[ExpertsModule]
) -> dict[str, list[Expert]]:
    """Group the targeted linears of experts by module and expert, in the order of the model.

    Raises:
        UsageError: Only some linears of an expert are targeted, or only some experts of a block.
    """
    targeted = {linear.name: linear for linear in linears}
    found = {}
    for module in modules:
        experts = [module.expert(number) for number in range(module.count)]
        names = [name for expert in experts for name in expert]
        missing = [name for name in names if name not in targeted]
        if len(missing) == len(names):
            continue
        if missing:
            raise UsageError(
                f"{missing[0]} is not targeted, and others of {module.name} are; experts are "
                "dropped as a whole and compared within their block: target all of them or none"
            )
        found[module.name] = [Expert(tuple(targeted[n] for n in expert)) for expert in experts]
    return found
