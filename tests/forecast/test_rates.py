"""Rates of devices: eigendecompositions, float64, sources."""

import re

import pytest
from forecast_shapes import recipe, shapes_of
from large_models import CONFIGS

from orchestrator.api import plan
from orchestrator.forecast import text, work
from orchestrator.forecast.rates import (
    ROWS,
    eigen_seconds,
    known_devices,
    largest_memory,
    machine_of,
)
from orchestrator.forecast.statistics import joint_linears
from orchestrator.linalg import pivot
from orchestrator.linalg.eigen import LARGEST
from orchestrator.methods import METHODS
from orchestrator.methods.kinds.costs.base import LinearStatistics
from orchestrator.models.evaluation.machine import SIZES
from orchestrator.stages.pivot.cost import BAND

MODELLED = {"A100-80GB": (0.7, 1.4), "H100": (0.36, 0.8), "H200": (0.29, 0.62)}
"""Seconds for n = 8192 in float64: from half the traffic times 1.3 to all of it times 1.6."""


@pytest.mark.parametrize("gpu", MODELLED)
def test_eigendecompositions_by_memory_traffic(gpu):
    """The time is within the bounds of the traffic, and shorter than in both other rows."""
    least, most = MODELLED[gpu]
    machine = machine_of(gpu)
    assert least <= 9 * 8192**3 / machine.modelled_eigen <= most
    assert machine.modelled_eigen > machine.rows[0].eigen
    assert "not measured" in machine.model_source


def test_the_model_of_eigendecompositions_meets_the_time_that_was_published():
    """It gives 13.1 to 13.9 s for an RTX 6000 Ada, 0.96 TB/s, 91.1 TFLOP/s, float32, n = 23,000."""
    assert 13.1 <= eigen_seconds(23_000, 0.96e12, 91.1e12, itemsize=4) <= 13.9
    # both terms count: infinite bandwidth, or infinite products, would not give it
    slow = eigen_seconds(23_000, 0.48e12, 91.1e12, itemsize=4)
    assert slow > 1.5 * eigen_seconds(23_000, 0.96e12, 91.1e12, itemsize=4)
    assert eigen_seconds(8192, 1e12, 1e12) > 5 * eigen_seconds(8192, 1e12, 60e12)


def test_a_plan_says_where_float64_decides_its_time(config):
    """Only for a GPU with float64 at 1/64 of float32; eigendecompositions have three rates."""
    path = config("Llama-3-70B", dtype="bfloat16", tie_word_embeddings=False)
    for gpu in known_devices():
        found = plan(recipe(model=path, preset="fast", samples=256), gpus=1, gpu=gpu)
        assert list(found.float64["eigen"]) == [*ROWS, "memory_traffic"]
        assert list(found.float64["double"]) == list(ROWS)
        rates = machine_of(gpu).rows[0]
        is_slow = rates.single / rates.double > 32
        assert bool(found.float64_remark) == is_slow
        said = "\n".join(text.lines(found))
        assert ("at 1/64 of its rate for float32" in said) == is_slow
        assert re.search(
            r"eigendecompositions +\S+ \(data sheet\), \S+ \(pessimistic\), \S+ \(memory", said
        )


def test_every_device_has_both_rows_and_a_source():
    """The rates used for planning are at most those of the data sheet."""
    for name in known_devices():
        sheet, sober = machine_of(name).rows
        assert len(sheet.source) > 80
        for rate in ("half", "tf32", "single", "double", "eigen", "read", "write", "network"):
            assert getattr(sheet, rate) >= getattr(sober, rate) > 0
        assert sheet.start < sober.start


def test_a_band_is_that_of_the_numerics():
    """A forecast has no torch, so it repeats the number."""
    assert BAND == pivot.BAND


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if not m.expert_activations])
def test_no_eigendecomposition_is_too_large_for_a_gpu(method, name):
    """This holds for any linear, or linears that share a basis, of models up to Llama 405B.
    `tests/linalg/test_eigen.py` tests the methods at this size."""
    shapes, made = shapes_of(name), METHODS[method]
    wide = max(max(each.in_features, each.out_features) for each in shapes.linears)
    for linear in (joint_linears([each], made.grouping)[each.name] for each in shapes.linears):
        side = work.eigen_side(linear)
        assert side <= shapes.hidden <= LARGEST["cuda"]
        given = LinearStatistics(linear.in_features)
        spent = made.kind.cost.decomposing(linear, given, pivoted=False, itemsize=2)
        assert spent.eigen % (9 * side**3) == 0
        assert bool(spent.eigen) == (made.form != "sparse")
    # the wide side of larger models is too large
    assert (wide > LARGEST["cuda"]) == (shapes.hidden >= 8192)


def test_a_gpu_is_measured_with_what_a_70b_model_asks_of_it():
    """The sizes are the largest of the model, because smaller ones have other rates."""
    sides = {work.eigen_side(each) for each in shapes_of("Llama-3-70B").linears}
    assert SIZES["cuda"][1] == max(sides)


def test_the_memory_of_a_kind_of_gpu():
    """Ray does not report which of the two A100s a node has; with the larger, no run is refused
    wrongly."""
    assert largest_memory("A100") == 80e9
    assert largest_memory("H100") == 80e9
    assert largest_memory("") is None
    assert largest_memory("V100") is None


def test_a_forecast_is_told_without_internal_names(config):
    """Names of rows and stages are words; hyphens are of names of methods and GPUs."""
    shown = text.lines(plan(recipe(model=config("Llama-3-8B"), preset="best")))
    assert not [line for line in shown if "_" in line]
    assert next(line.split() for line in shown if line.startswith("stage ")) == [
        *("stage", "FLOPs", "data", "sheet", "pessimistic")
    ]
