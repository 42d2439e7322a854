"""Retention over bytes: the frontier, and its section in a comparison."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pages.retention import frontier, retained, retention_section
from orchestrator.pages.sources import read_source

KEY = "ships: acc, 24 documents"
POINTS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6).map(lambda n: n / 4)), max_size=9)


@given(points=POINTS)
def test_the_frontier_is_that_of_all_pairs(points):
    """A point is on it exactly if no different one has at most its bytes and its retention or
    more; from fewer bytes to more its retention grows."""
    found = frontier(points)
    for (size, kept), is_on in zip(points, found, strict=True):
        exceeding = [p for p in points if p != (size, kept) and p[0] <= size and p[1] >= kept]
        assert is_on == (not exceeding)
    best = sorted({point for point, is_on in zip(points, found, strict=True) if is_on})
    assert best == sorted(best, key=lambda point: point[1])
    assert bool(points) == any(found)


def with_retention(source, size, *kept, base="one"):
    """A source of so many bytes, with the given retention of a task, or none."""
    same = {"task": "ships", "metric": "acc", "documents": 24, "against": None, "model": None}
    rows = [{**same, "retention": each} for each in kept]
    report = {**source.report, "base_fingerprint": base}
    tasks = [{"models": {}, "tasks": rows}]
    sizes = {"out_bytes": size, "dense_bytes": 1000}
    return replace(source, evaluations=tasks, report=report, **sizes)


def test_a_comparison_says_which_runs_none_exceeds(runs):
    """The dense model has retention 1 and is on the frontier if no smaller run has as much; an
    unknown retention is on none."""
    source = read_source(runs[0].out)
    names = ["small", "poor", "large", "unknown"]
    made = [
        with_retention(source, 500, 0.8),
        with_retention(source, 600, 0.7),
        with_retention(source, 900, 0.95),
        with_retention(source, 100),
    ]
    found = retained(names, made)
    assert [each.name for each in found] == ["dense", *names]
    assert (found[0].bytes, found[0].retention) == (1000, {KEY: 1.0})
    assert [each.name for each in found if each.frontier == (KEY,)] == ["dense", "small", "large"]
    page = retention_section(names, made)
    assert page.count("<circle") == 4
    assert page.count('fill-opacity="0.35"') == 1
    for shown in ("80.0%", "70.0%", "95.0%", "100.0%"):
        assert f">{shown}</td>" in page
    better = retained(names, [*made[:2], with_retention(source, 900, 1.0), made[3]])
    assert [each.name for each in better if each.frontier] == ["small", "large"]


def test_runs_of_different_models_have_no_frontier(runs):
    """Nor a dense model; runs without tasks have no section."""
    source = read_source(runs[0].out)
    made = [with_retention(source, 500, 0.8), with_retention(source, 600, 0.9, base="two")]
    assert [each.frontier for each in retained(["a", "b"], made)] == [(), ()]
    page = retention_section(["a", "b"], made)
    assert "different dense models" in page
    assert "<svg" not in page
    assert retention_section(["a"], [with_retention(source, 500)]) is None
