"""Forecast of the speed of a result's linears over dense ones, from its report."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from orchestrator.plan.forms import FORMS
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment

SIZES = ("form", "rank", "nonzeros")
"""Fields of a linear in the report that are fields of an `Assignment`."""


def speed_forecast(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the forecast of a report; empty if the report lacks what it needs.

    `at_most` bounds the speed of the targeted linears, alone and all together, over that of the
    dense ones: in prefill by operations (`OperationCost`), in decoding by the bytes that a token
    reads. An expert counts by the part of the tokens that it sees, `routed` in the report, or by a
    larger one if routers choose among fewer experts. A kernel, its calls, attention and norms only
    lower it. `measured` is the speed by the table of times, if the recipe names one, at its number
    of tokens.
    """
    found = _bounds(report)
    times = report.get("costs", {}).get("microseconds")
    if times:
        found["measured"] = {"speed": times["dense"] / times["planned"], **times}
    return found


def _bounds(report: Mapping[str, Any]) -> dict[str, Any]:
    linears, values = report.get("linears", {}), report.get("values", {})
    dense_bytes = report.get("bytes", {}).get("dense_linears")
    is_complete = all("shape" in e and e.get("form") in FORMS for e in linears.values())
    if not (linears and is_complete and dense_bytes and values.get("dense_linears")):
        return {}
    itemsize = dense_bytes // values["dense_linears"]
    dense = planned = read = 0
    growth = _growth(linears) if "router" in report.get("experts", {}) else {}
    for name, entry in linears.items():
        cut = Assignment(**{size: entry[size] for size in SIZES if size in entry})
        linear, form = _linear(name, *entry["shape"]), FORMS[cut.form]
        operations = form.operations(linear, cut)
        part = entry.get("routed", 1)
        dense += part * linear.values
        part *= growth.get(_around(name), 1)
        planned += part * operations
        # an index of entries is left out: the dense weight that they are made of is read
        index = form.index_bytes(linear, cut) if form.is_factored else 0
        read += part * (itemsize * operations + index)
    return {"at_most": {"prefill": dense / planned, "decode": itemsize * dense / read}}


def _growth(linears: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the growth of the part of the tokens that an expert sees, by its module.

    A token takes as many experts, of those that are not dropped.
    """
    count = Counter(map(_around, linears))
    left = Counter(_around(name) for name, each in linears.items() if each["form"] != "dropped")
    return {module: count[module] / left[module] for module in left}


def _around(name: str) -> str:
    """Return the name of the module around the parent of a linear: of an expert, the experts."""
    return ".".join(name.split(".")[:-2])


def _linear(name: str, out_features: int, in_features: int) -> Linear:
    return Linear(
        name=name,
        block=0,
        role=name,
        site=name,
        out_features=out_features,
        in_features=in_features,
        has_bias=False,
    )


def forecast_texts(forecast: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return lines about a forecast by their names: the speed, and an explanation."""
    shown = {}
    if bounds := forecast.get("at_most"):
        prefill, decode = (f"{bounds[phase]:.2f} x" for phase in ("prefill", "decode"))
        says = f"in prefill and {decode} in decoding, by operations and bytes of the linears alone"
        shown["speed over dense, bound"] = f"at most {prefill}", says
    if times := forecast.get("measured"):
        tokens = f"{times['tokens']} token{'' if times['tokens'] == 1 else 's'}"
        says = (
            f"{times['planned']:,.0f} us of the linears at {tokens}, {times['dense']:,.0f} dense, "
            f"by {times['file']} ({times['device']}, {times['dtype']})"
        )
        shown["speed over dense, forecast"] = f"{times['speed']:.2f} x", says
    return shown
