"""Experts of a block in calibration: their linears in groups, and rows in place of Grams."""

from collections.abc import Collection, Iterable, Sequence

from orchestrator.plan.linear import Linear

GRAM_BYTES = 12
"""Bytes of a Gram's entry while chunks pass: a float64 sum and a float32 one."""
ROUTED_BYTES = 12
"""Bytes at most of a row that is routed to an expert: its token, int64, and its weight, float32."""


def rows_bytes(tokens: int, hidden: int, itemsize: int) -> int:
    """Bytes of the inputs of a block's experts, each token once.

    Args:
        tokens: Tokens of all sequences.
        hidden: Channels of an input.
        itemsize: Bytes of a value in the passes.
    """
    return tokens * hidden * itemsize


def are_rows_smaller(rows: int, channels: Iterable[int]) -> bool:
    """Test if rows of this size take fewer bytes than Grams of these numbers of channels.

    Gate and up of all experts of a block read subsets of one matrix. Its rows grow with the tokens,
    the Grams that they are summed to with the number of experts. A Gram has the same bits either
    way, so this decides memory alone.
    """
    return rows < sum(GRAM_BYTES * n * n for n in channels)


def expert_name(linear: Linear) -> str:
    """Return the name of the module of the expert that a linear belongs to."""
    return linear.name.rpartition(".")[0]


def module_of_experts(linear: Linear) -> str:
    """Return the name of the module of experts that an expert's linear belongs to."""
    return linear.name.rsplit(".", 2)[0]


def reads_tokens(linear: Linear) -> bool:
    """Return True if an expert's linear reads the input of the experts: gate and up do."""
    return not linear.name.endswith(".down")


def expert_groups(
    linears: Sequence[Linear], modules: Collection[str], count: int
) -> tuple[tuple[Linear, ...], ...]:
    """Divide linears by experts: contiguous ones of every block, all other linears with the first.

    Args:
        modules: Names of the modules of experts.
        count: Number of groups; with fewer experts in a block some have none of it.
    """
    group = {
        name: place * count // len(names)
        for names in _by_module(linears, modules).values()
        for place, name in enumerate(names)
    }
    groups: list[list[Linear]] = [[] for _ in range(count)]
    for linear in linears:
        groups[group.get(expert_name(linear), 0)].append(linear)
    return tuple(map(tuple, groups))


def most_experts(linears: Sequence[Linear], modules: Collection[str]) -> int:
    """Return the largest number of experts of a block that have linears among these."""
    return max(map(len, _by_module(linears, modules).values()), default=0)


def _by_module(linears: Sequence[Linear], modules: Collection[str]) -> dict[str, dict[str, None]]:
    """Names of experts, in order, by their module."""
    experts: dict[str, dict[str, None]] = {}
    for linear in linears:
        if module_of_experts(linear) in modules:
            experts.setdefault(module_of_experts(linear), {})[expert_name(linear)] = None
    return experts
