"""Statistics of a block that a pass gathers: which there are, their sizes, and their work.

Shape letters as in `memory`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.work import TRIANGLE, Work, computed, forward_flops
from orchestrator.methods.base import Method
from orchestrator.methods.kinds.costs.base import LinearStatistics
from orchestrator.methods.kinds.costs.workspaces import EIGENVECTOR_COPIES
from orchestrator.plan.experts import (
    ROUTED_BYTES,
    are_rows_smaller,
    expert_name,
    module_of_experts,
    reads_tokens,
    rows_bytes,
)
from orchestrator.plan.grouping import Grouping, stack
from orchestrator.plan.linear import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStatistics:
    """Second moments of the linears of a block."""

    linears: tuple[Linear, ...]
    grams: Mapping[str, int]
    """Channels of the Grams by their source: a site, or `NAME output` of a linear; 0 for none."""
    has_gradients: bool = False
    gradient: str = "curvature"
    """Statistic of the gradients, as `Method.gradient`."""
    output_curvature: bool = False
    """True if gradients are those of the outputs, also where O > I."""
    grouping: Grouping = field(default_factory=Grouping)
    """Groups, of which those with a basis of outputs have gradients of the outputs too."""
    runs_every_expert: bool = False
    """True if every expert runs on every token, beside those that the router chooses."""

    def source(self, linear: Linear) -> str:
        """The source of the Gram that a linear is decomposed with."""
        output = f"{linear.name} output"
        return output if output in self.grams else linear.site

    def curvature(self, linear: Linear) -> int:
        """Channels of the second moment of a linear's gradients; 0 if there is none."""
        if not self.has_gradients or self.gradient != "curvature":
            return 0
        outputs, inputs = linear.out_features, linear.in_features
        as_is = self.output_curvature or self.grouping.shares_outputs(linear)
        return outputs if as_is else min(outputs, inputs)

    def is_turned(self, linear: Linear) -> bool:
        """True if gradients are mapped to the inputs' side for their second moment."""
        return 0 < self.curvature(linear) < linear.out_features

    def gradient_bytes(self, linear: Linear, *, settled: bool) -> int:
        """Bytes of the gradient of a linear's weight, or of its directions with their basis.

        Args:
            settled: True once all chunks have passed.
        """
        if not self.has_gradients or self.gradient == "curvature":
            return 0
        if self.gradient == "weight":
            return 4 * linear.values
        narrow = min(linear.out_features, linear.in_features)
        return (8 if settled else 12) * narrow * narrow

    def paired_bytes(self, tokens: float, itemsize: int) -> int:
        """Bytes that a pass of one sequence keeps of inputs until the gradients come back."""
        if not self.has_gradients or self.gradient == "curvature":
            return 0
        if self.gradient == "weight":
            inputs = {each.site: each.in_features for each in self.linears}
            return int(itemsize * tokens * sum(inputs.values()))
        narrow = (min(each.out_features, each.in_features) for each in self.linears)
        return int(4 * tokens * sum(narrow))

    @property
    def basis_bytes(self) -> int:
        """Temporary bytes while the largest basis of directions is computed, in float64."""
        if not self.has_gradients or self.gradient != "directions":
            return 0
        narrow = {each: min(each.out_features, each.in_features) for each in self.linears}
        forming = max(8 * (each.values + size * size) for each, size in narrow.items())
        return max(forming, EIGENVECTOR_COPIES * 8 * max(narrow.values()) ** 2)

    def of(self, linear: Linear, known: int | None = None) -> LinearStatistics:
        """Sizes of the statistics of one linear, or of the joint one that has its name.

        Args:
            known: See `LinearStatistics`.
        """
        source = self.source(linear)
        gram = self.grams[source]
        if source == linear.site and gram not in (0, linear.in_features):
            gram = linear.out_features  # of linears side by side, the moment of their outputs
        return LinearStatistics(gram, self.curvature(linear), known)

    @property
    def entries(self) -> int:
        """Entries of all second moments."""
        curvatures = [self.curvature(each) for each in self.linears]
        return sum(n * n for n in [*self.grams.values(), *curvatures])

    def pools(self, shapes: Shapes) -> dict[str, int]:
        """Channels of the sums over the experts of the block, for experts with few tokens."""
        found = dict[str, int]()
        for linear in self.linears:
            if not shapes.is_expert(linear.name):
                continue
            module, part = module_of_experts(linear), linear.name.rpartition(".")[2]
            source = self.source(linear)
            is_shared = source == linear.site and reads_tokens(linear)
            found[f"{module} {'inputs' if is_shared else part}"] = self.grams[source]
            found[f"{module} {part} gradients"] = self.curvature(linear)
        return found


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Inputs of the experts of a block that are kept as rows in place of Grams."""

    size: int
    """Bytes of the rows, each token once, and of the tokens of every expert."""
    sources: Mapping[str, int]
    """Channels of the Grams that are made from them, one at a time, by their source."""

    @property
    def entries(self) -> int:
        """Entries of these Grams."""
        return sum(n * n for n in self.sources.values())

    def part(self, held: int) -> dict[str, int]:
        """Part of a footprint for bytes of rows that are held; empty for blocks without rows."""
        return {"expert rows": held} if self.sources else {}


def kept_rows(shapes: Shapes, statistics: BlockStatistics, tokens: int, itemsize: int) -> KeptRows:
    """The inputs that a worker keeps as rows, by the rule of `plan.experts`.

    Args:
        tokens: Tokens of all sequences.
        itemsize: Bytes of a value in the passes.
    """
    modules: dict[str, list[Linear]] = {}
    for linear in statistics.linears:
        if shapes.is_expert(linear.name) and reads_tokens(linear):
            modules.setdefault(module_of_experts(linear), []).append(linear)
    size, sources = 0, dict[str, int]()
    for linears in modules.values():
        found = {source: statistics.grams[source] for source in map(statistics.source, linears)}
        rows = rows_bytes(tokens, linears[0].in_features, itemsize)
        if are_rows_smaller(rows, found.values()):
            experts = len({expert_name(each) for each in linears})
            size += rows + int(tokens * shapes.routed * experts) * ROUTED_BYTES
            sources |= found
    return KeptRows(size, sources)


def method_statistics(linears: Sequence[Linear], method: Method) -> BlockStatistics:
    """The statistics that a method needs of the linears of a block.

    Linears that share a basis have the Gram of their inputs. A number or a row of an expert in the
    place of Grams is not counted.
    """
    none = dict.fromkeys((each.site for each in linears), 0)
    return BlockStatistics(
        linears=tuple(linears),
        grams=none if method.expert_activations else dict(_method_grams(linears, method)),
        has_gradients=method.label_draws > 0,
        gradient=method.gradient,
        output_curvature=method.output_curvature,
        grouping=method.grouping,
        runs_every_expert=method.expert_outputs,
    )


def _method_grams(linears: Sequence[Linear], method: Method) -> Iterator[tuple[str, int]]:
    sites: dict[str, list[Linear]] = {}
    for linear in linears:
        sites.setdefault(linear.site, []).append(linear)
    for linear in linears:
        site = sites[linear.site]
        if method.grouping.joins(linear) or method.side(linear, site) == "input":
            yield linear.site, linear.in_features
        else:
            yield f"{linear.name} output", linear.out_features


def input_statistics(linears: Sequence[Linear]) -> BlockStatistics:
    """The Gram of the inputs of every linear, and no gradients."""
    grams = {each.site: each.in_features for each in linears}
    return BlockStatistics(linears=tuple(linears), grams=grams)


def joint_linears(linears: Sequence[Linear], grouping: Grouping) -> dict[str, Linear]:
    """The linear that is decomposed in the place of each and of the others of its group, by name.

    Args:
        linears: Those of one block; groups over blocks are taken as of full size.
    """
    joint: dict[str, Linear] = {}
    for group in grouping.groups(linears):
        whole = stack(group)
        if grouping.joins(whole) and not whole.experts:
            whole = replace(whole, out_features=grouping.size * whole.out_features)
        joint |= {linear.name: whole for linear in group}
    return joint


def gathering(shapes: Shapes, statistics: BlockStatistics, tokens: int, itemsize: int) -> Work:
    """One sequence through one block, with its statistics; of a backward pass, one label.

    A pass back computes the block again and brings gradients to its inputs, not to its weights.
    """
    sites = {each.site for each in statistics.linears}
    passes = 2 if statistics.has_gradients else 1
    total = computed(forward_flops(shapes, tokens), itemsize).times(passes)
    if statistics.runs_every_expert:
        total += computed(2.0 * tokens * shapes.expert_values, itemsize)

    def as_passed(flops: float) -> Work:
        """Products of values of the pass, in its dtype, with results in float32."""
        return Work(tf32=flops) if itemsize < 4 else Work(single=flops)

    def seen(name: str) -> float:
        """Tokens that a linear sees, by its name or that of its statistic."""
        return tokens * shapes.routed if shapes.is_expert(name) else tokens

    def gram(name: str, channels: int) -> float:
        return TRIANGLE * 2.0 * seen(name) * channels * channels

    for source, channels in statistics.grams.items():
        flops = gram(source, channels)
        total += as_passed(flops) if source in sites else Work(single=flops)
    for linear in statistics.linears:
        product = as_passed(2.0 * seen(linear.name) * linear.values)
        if statistics.source(linear) != linear.site and itemsize < 4:
            total += product
        if statistics.is_turned(linear):
            total += product + Work(single=gram(linear.name, statistics.curvature(linear)))
        elif statistics.curvature(linear):
            total += as_passed(gram(linear.name, statistics.curvature(linear)))
        elif statistics.has_gradients:
            total += product
            if statistics.gradient == "directions":
                narrow = min(linear.out_features, linear.in_features)
                total += Work(single=4.0 * seen(linear.name) * narrow * narrow)
    return total


def decomposing_block(
    linears: Sequence[Linear], method: Method, *, pivoted: bool, itemsize: int
) -> Work:
    """Decomposition of all linears of a block, and writing of the results.

    Args:
        itemsize: Bytes of a value of the stored factors.
    """
    statistics, cost = method_statistics(linears, method), method.kind.cost
    total, joint = Work(), joint_linears(linears, method.grouping)
    for linear in linears:
        whole = joint[linear.name]
        part = linear.values / whole.values
        given = statistics.of(whole)
        total += cost.decomposing(whole, given, pivoted=pivoted, itemsize=itemsize).times(part)
    return total
