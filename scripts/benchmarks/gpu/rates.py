"""Results as rates of the forecast: an entry of `rates.json`, and rows for a plan."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.gpu.results import Results

from orchestrator.forecast.rates import MEASURED, ROWS, Rates, known_devices, machine_of

PESSIMISTIC = 0.5
"""Fraction of the measured rates."""
NO_TRANSFERS = {"read": math.inf, "write": math.inf, "network": math.inf, "start": 0.0}
"""Rates of disk and network that take no time: only computation was measured."""


def device_row(results: Results) -> dict[str, Any]:
    """The entry of `devices` in orchestrator/forecast/rates.json that a results file gives.

    Raises:
        SystemExit: The results lack the part `machine` or `eigen`.
    """
    environment, parts = results.content["environment"], results.parts
    speeds = measured_speeds(parts)
    if speeds is None:
        raise SystemExit(f"{results.path}: rates need the parts machine and eigen; run both")
    sizes = f"eigen at n = {asked_for(parts['eigen']['figures'])['size']}"
    versions = f"torch {environment['torch']}, CUDA {environment['cuda']}"
    driver = f"driver {environment['driver']}, {environment['date'][:10]}"
    row = {
        "memory_bytes": float(environment["memory_bytes"]),
        "bandwidth": float(f"{parts['machine']['figures']['bytes_a_second']['device']:.4g}"),
        **{
            name: scaled(speeds, factor)
            for name, factor in zip(ROWS, (1, PESSIMISTIC), strict=True)
        },
        "source": f"PartResult by scripts/benchmark gpu on {environment['device']}: products of "
        f"random matrices, {sizes}; {versions}, {driver}. Pessimistic: {PESSIMISTIC} of it.",
    }
    return {known_name(environment["device"]) or environment["device"]: row}


def scaled(speeds: Mapping[str, float], factor: float) -> dict[str, float]:
    """Scaled speeds, to four digits; repetitions agree in fewer."""
    return {name: float(f"{factor * speed:.4g}") for name, speed in speeds.items()}


def measured_speeds(parts: Mapping[str, Any]) -> dict[str, float] | None:
    """FLOPs a second by the names of `Rates`; None if one of the two parts is missing."""
    if not all("figures" in parts.get(name, {}) for name in ("machine", "eigen")):
        return None
    eigen = asked_for(parts["eigen"]["figures"])["rate"]
    return {**parts["machine"]["figures"]["product_rates"], "eigen": eigen}


def asked_for(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Row of `eigen` with the largest matrix in the mode of decompositions: float64, upper."""
    ours = [row for row in rows if (row["dtype"], row["triangle"]) == ("float64", "U")]
    return max(ours, key=lambda row: row["size"])


def known_name(device: str) -> str | None:
    """Name in rates.json of a device by CUDA's name; a slice of a device is another one."""
    if "MIG" in device:
        return None
    fitting = [name for name in known_devices() if all(w in device for w in name.split("-"))]
    return max(fitting, key=len, default=None)


def computing_rates(results: Results) -> list[Rates]:
    """Rates of a plan for this device, and the measured ones; disk and network take no time."""
    device = known_name(results.content["environment"]["device"])
    rows = (
        [] if device is None else [replace(row, **NO_TRANSFERS) for row in machine_of(device).rows]
    )
    speeds = measured_speeds(results.parts)
    if speeds is not None:
        rows.append(Rates(row=MEASURED, source="measured here", **speeds, **NO_TRANSFERS))
    return rows
