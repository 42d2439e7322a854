"""Linears, curves and cosines for allocators, the laws of a plan, and enumeration of all plans."""

import itertools
from dataclasses import replace

import numpy as np

from orchestrator.allocate import ALLOCATORS
from orchestrator.plan.curve import Curve
from orchestrator.plan.forms import FORMS, LOW_RANK
from orchestrator.plan.linear import ExpertsModule, Linear
from orchestrator.plan.plan import Assignment

RANK_ALLOCATORS = {name: each for name, each in ALLOCATORS.items() if "ranks" in each.divides}
"""Allocators that divide ranks."""


def make_linears(shapes, *, role="mlp.proj"):
    """Make one linear per block, all of one type."""
    return [_linear(block, role, *shape) for block, shape in enumerate(shapes)]


def make_model(shape_by_role, blocks):
    """Make the same types in every block."""
    return [
        _linear(block, role, *shape)
        for block in range(blocks)
        for role, shape in shape_by_role.items()
    ]


def _linear(block, role, out_features, in_features):
    name = f"blocks.{block}.{role}"
    return Linear(
        name=name,
        block=block,
        role=role,
        site=name,
        out_features=out_features,
        in_features=in_features,
        has_bias=False,
    )


def make_experts(blocks, count, *, choices=2, hidden=8, inner=4):
    """Make the experts of a model, and their linears in model order."""
    modules = [
        ExpertsModule(
            name=f"blocks.{block}.mlp.experts",
            block=block,
            parts=("gate", "up", "down"),
            count=count,
            chosen=choices,
            router=("blocks.0.mlp.gate.weight",),
            guard="gate_up_proj",
        )
        for block in range(blocks)
    ]
    return modules, [
        Linear(
            name=name,
            block=module.block,
            role=name.removeprefix(f"blocks.{module.block}."),
            site=name,
            out_features=hidden if name.endswith("down") else inner,
            in_features=inner if name.endswith("down") else hidden,
            has_bias=False,
        )
        for module in modules
        for number in range(count)
        for name in module.expert(number)
    ]


def make_curve(name, energies, total=None, sensitivities=None):
    energies = np.asarray(energies, dtype=np.float64)
    total = total or float(energies.sum())
    return Curve(name=name, energies=energies, total=total, sensitivities=sensitivities or {})


def make_curves(linears, seed=0, form=LOW_RANK):
    """Make random curves, steep and flat, on different scales, with random sensitivities."""
    rng = np.random.default_rng(seed)
    curves = {}
    for linear in linears:
        count = min(linear.out_features, linear.in_features)
        steep = np.exp(-rng.uniform(0, 6) * np.arange(count) / count)
        energies = np.sort(rng.exponential(size=count) * steep)[::-1] * 10 ** rng.uniform(0, 6)
        curves[linear.name] = make_curve(linear.name, energies)
    # drawn last, so that a seed keeps the energies from before sensitivities were added
    for linear in linears:
        drawn = rng.uniform(2, 9, size=form.break_even(linear))
        sensitivities = {rank: float(loss) for rank, loss in enumerate(drawn) if rank}
        curves[linear.name] = replace(curves[linear.name], sensitivities=sensitivities)
    for linear in linears:
        scores = make_scores(rng, form.break_even(linear) - 1)
        curves[linear.name] = replace(curves[linear.name], scores=scores)
    return curves


def make_scores(rng, count):
    """Draw scores of directions, descending, and of the tail: a tenth is open, others have ties."""
    closed_N = -rng.integers(1, 40, size=count + 1).astype(float)
    opened_N = np.where(rng.random(count + 1) < 0.1, rng.random(count + 1), closed_N)
    return np.append(np.sort(opened_N[:-1])[::-1], closed_N[-1])


def make_cosines(linears, seed=0):
    """Make random cosines of all sublayers, and then of all blocks."""
    rng = np.random.default_rng(seed)
    sublayers = sorted({each.sublayer for each in linears})
    blocks = sorted({f"{each.block}" for each in linears})
    return {name: rng.uniform(0.4, 0.99) for name in (*sublayers, *blocks)}


def assert_invariants(plan, linears, keep, form=LOW_RANK):
    """Assert the laws in the docstring of `orchestrator.allocate`."""
    dense = sum(linear.values for linear in linears)
    stored = sum(plan.assignments[linear.name].stored_values(linear) for linear in linears)
    assert stored == plan.stored_values
    assert stored <= plan.budget_values <= keep * dense + 1e-9 * dense
    assert plan.assignments.keys() == {linear.name for linear in linears}
    for linear in linears:
        assignment = plan.assignments[linear.name]
        if FORMS[assignment.form].is_factored:
            assert assignment.form == form.name
            assert 1 <= assignment.rank < form.break_even(linear)


def size_as_rank(assignment, linear):
    """Return the rank, possibly fractional, at which factors store as many values."""
    return assignment.stored_values(linear) / linear.rank_cost


def lost(assignment, curve):
    return 0.0 if assignment.form == "dense" else curve.loss(assignment.rank)


def every_plan(linears, budget, multiple=1, form=LOW_RANK):
    """Enumerate all assignments of these linears within the budget."""
    choices = [
        [
            Assignment(form=form.name, rank=rank)
            for rank in range(1, form.break_even(linear))
            if rank % multiple == 0
        ]
        for linear in linears
    ]
    for picked in itertools.product(*[[*each, Assignment(form="dense")] for each in choices]):
        stored = sum(a.stored_values(each) for a, each in zip(picked, linears, strict=True))
        if stored <= budget:
            yield dict(zip([linear.name for linear in linears], picked, strict=True))


def make_table(linears, dense, forms, tokens=1):
    """Make a latency table of the shapes of these linears.

    Args:
        dense: Seconds of a dense linear.
        forms: Seconds of a linear at a rank, by form; measured at every second rank and the last.
    """
    entries = []
    for linear in {(each.out_features, each.in_features): each for each in linears}.values():
        entry = {"shape": [linear.out_features, linear.in_features], "forms": {}}
        entry["dense_seconds"] = dense(linear)
        for name, seconds in forms.items():
            most = FORMS[name].break_even(linear) - 1
            ranks = sorted({*range(1, most + 1, 2), most} - {0})
            entry["forms"][name] = [[rank, seconds(linear, rank)] for rank in ranks]
        entries.append(entry)
    about = {"device": "cpu", "dtype": "float32", "threads": 1, "tokens": tokens}
    return {"format_version": 1, **about, "linears": entries}
