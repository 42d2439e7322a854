"""Statistics and results of methods in a forecast, against those of the code."""

from typing import Any

import pytest
import torch
from matrices import gaussian, of_model
from pipeline import write_llama

from orchestrator.forecast.shapes import read_shapes
from orchestrator.forecast.statistics import method_statistics
from orchestrator.linalg import ranked
from orchestrator.linalg.low_rank import Curvature, InputGram
from orchestrator.methods import METHODS
from orchestrator.methods.kinds.base import Kind
from orchestrator.methods.kinds.costs.ranked import SKETCH
from orchestrator.methods.kinds.low_rank import LOW_RANK
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.plan.linear import Linear


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One block, with linears that are tall, wide and square."""
    return write_llama(tmp_path_factory.mktemp("small") / "dense", blocks=1)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.expert_activations])
def test_statistics_are_those_that_a_worker_gathers(name, small):
    """Every method has its Grams, with their channels, and its second moments of gradients."""
    method = METHODS[name]
    expected = method_statistics(read_shapes(small).heaviest, method)

    def side(linear, site):
        # the worker sums input Grams for linears that share a basis
        return "input" if method.grouping.joins(linear) else method.side(linear, site)

    with LazyModel.open(small).shard(range(1)) as shard:
        assert [each.name for each in shard.linears] == [each.name for each in expected.linears]
        calibration = Calibration(
            *(shard, shard.linears, side),
            curvature=method.label_draws > 0 and method.gradient == "curvature",
            gradient=None if method.gradient == "curvature" else method.gradient,
            outputs=lambda _: method.output_curvature,
        )
        entries = {}
        for linear in shard.linears:
            found, given = calibration.statistic(linear), expected.of(linear)
            is_input = isinstance(found, InputGram)
            assert is_input == (expected.source(linear) == linear.site)
            gram = found.matrix_II if is_input else found.matrix_OO
            entries[expected.source(linear)] = gram.numel()
            assert len(gram) == given.gram
            curvature = found.curvature.matrix_KK if found.curvature else ()
            assert len(curvature) == given.curvature
            entries[f"{linear.name} gradients"] = len(curvature) ** 2
        assert sum(entries.values()) == expected.entries
        calibration.close()


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 10), (10, 24), (16, 16)])
@pytest.mark.parametrize(
    "name", [n for n, m in METHODS.items() if m.form not in ("low_rank_sparse", "dropped", "tied")]
)
def test_a_unit_stores_what_is_forecast(name, outputs, inputs):
    """Two factors up to the stored rank, or all entries with their positions."""
    method, specimen = METHODS[name], of_model(outputs, inputs)
    linear = Linear(
        name="a", block=0, role="a", site="a", out_features=outputs, in_features=inputs, has_bias=0
    )
    rows_TK = gaussian(2 * outputs, outputs, seed=3)
    if not method.output_curvature and outputs > inputs:
        rows_TK = rows_TK @ specimen.weight_OI
    statistic = InputGram(
        specimen.gram_II,
        magnitude_I=specimen.inputs_TI.abs().mean(dim=0),
        curvature=Curvature(rows_TK.T @ rows_TK, len(rows_TK)),
        means=specimen.means(),
        gradient=specimen.gradient(method.gradient),
    )
    cost = method.kind.cost
    rank = cost.stored_rank(linear, pivoted=False)
    result = method.decompose(specimen.weight_OI.float(), statistic, rank)
    tensors = method.kind.tensors(result, torch.bfloat16)
    stored = sum(each.nbytes for each in tensors.values())
    assert stored == cost.stored_bytes(linear, pivoted=False, itemsize=2)


class PlainKind(Kind[Any]):
    """Kind of result without a cost of its own."""

    facts = tensors = curve = errors = None


def test_a_kind_costs_what_two_factors_cost_unless_it_says_more():
    """The default of a kind from another package is the cost of low-rank results."""
    assert type(PlainKind().cost) is type(LOW_RANK.cost)


def test_a_sketch_is_that_of_the_numerics():
    """The forecast has no torch, so it repeats the number of columns."""
    assert SKETCH == ranked.SKETCH
