"""Result of a compression."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import InputError
from orchestrator.plan.plan import Plan
from orchestrator.plan.speed import speed_forecast
from orchestrator.store.files import parse_json
from orchestrator.store.places import Place

REPORT_FILE = "orchestrator_report.json"
"""Name of the report in a checkpoint."""
BENCH_SUFFIX = ".bench.json"
"""End of the name of the file with a checkpoint's speed, beside it."""
FULL_BITS = 16
"""Bits of a dense weight from which a compression rate counts."""


def read_report(out: Place) -> dict[str, Any]:
    """Read the report of a compressed checkpoint.

    Raises:
        InputError: It is missing, or is not a JSON object.
    """
    path = out / REPORT_FILE
    try:
        report = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(report, dict):
        raise InputError(f"{path}: contains {type(report).__name__}, not an object")
    return report


def kept_bytes(report: Mapping[str, Any]) -> float | None:
    """Kept fraction of the targeted linears in bytes, by a report; None if it has no sizes."""
    sizes = report.get("bytes", {})
    dense = sizes.get("dense_linears")
    return sizes.get("stored", 0) / dense if dense else None


def bits_per_weight(report: Mapping[str, Any]) -> float | None:
    """Bits stored for a weight of the targeted linears, by a report; None if it has no sizes.

    8 * stored bytes / dense values: with indices, and a shared basis counted once.
    """
    stored = report.get("bytes", {}).get("stored")
    dense = report.get("values", {}).get("dense_linears")
    return 8 * stored / dense if stored is not None and dense else None


def theoretical_rate(bits: float, sparsity: float) -> float:
    """Fraction of 16-bit weights that is saved if their positions cost nothing (2505.07289).

    1 - (bits / 16) (1 - sparsity). The paper also weighs retention against this rate. The constants
    of its weights are not known here, so that metric is left out; `pages.retention` shows retention
    over bytes.

    Args:
        bits: Bits of a stored value, above 0 and at most 16.
        sparsity: Fraction of the values that is not stored, 0 to 1.
    """
    return 1 - bits / FULL_BITS * (1 - sparsity)


def compression_rates(report: Mapping[str, Any]) -> tuple[float, float] | None:
    """Rates of the targeted linears by stored bytes and in theory, by a report.

    The first is 1 - bits per weight / 16. The second is larger by the index and by nothing else. Of
    factors both are one minus the kept fraction, if values have 16 bits. None if values have more
    than 16 bits, from which no rate counts, or if the report has no sizes.
    """
    values, dense_bytes = report.get("values", {}), report.get("bytes", {}).get("dense_linears")
    found, stored, dense = (
        bits_per_weight(report),
        values.get("stored"),
        values.get("dense_linears"),
    )
    if found is None or stored is None or not dense_bytes or 8 * dense_bytes > FULL_BITS * dense:
        return None
    return 1 - found / FULL_BITS, theoretical_rate(8 * dense_bytes / dense, 1 - stored / dense)


def bits_texts(report: Mapping[str, Any]) -> tuple[str, str] | None:
    """Bits per weight and the rates as text; None if the report has no sizes."""
    bits, rates = bits_per_weight(report), compression_rates(report)
    if bits is None:
        return None
    if rates is None:
        return f"{bits:.3f}", ""
    real, theory = rates
    return f"{bits:.3f}", f"{real:.1%} below 16 bits, {theory:.1%} without indices"


def rank_multiples(report: Mapping[str, Any]) -> tuple[str, str] | None:
    """Numbers of which ranks are multiples, and their cost, as text; None if all ranks are allowed.

    The cost is the predicted loss over that of a plan with every rank, where it is known.
    """
    said = report.get("rank_multiple", {})
    steps = [step for step in said.get("linears", {}) if step != "1"]
    if not steps:
        return None
    found, free = said["predicted_loss"], said.get("predicted_loss_of_every_rank")
    cost = ""
    if free:
        relation = "above" if found >= free else "below"
        cost = f"predicted loss {abs(found / free - 1):.2%} {relation} that with any rank"
    return f"multiples of {' and '.join(steps)}", cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Compressed checkpoint, run directory, plan and report of a compression."""

    out: Place
    """The compressed checkpoint."""
    run_dir: Place
    """Its run directory, from which further sizes can be cut."""
    plan: Plan
    report: dict[str, Any]
    """The content of `REPORT_FILE`."""

    @property
    def speed_forecast(self) -> dict[str, Any]:
        """Forecast of the speed of the linears: `orchestrator.plan.speed.speed_forecast`."""
        return speed_forecast(self.report)
