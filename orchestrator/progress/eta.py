"""Time that is left of a stage and of a run: pure mathematics.

The work of a stage consists of calls of some kinds k (a chunk through a shard, the decomposition of
a block, ...), counted in units that cost about the same within a kind (a chunk through one block).
Of kind k, n_k units have ended in s_k seconds of a worker, m_k are left, those of running calls
included, and the forecast has f_k seconds a unit. Forecasts are right in their proportions rather
than in their scale, so all of them are corrected by one ratio,

    r = sum n_k c_k / sum n_k f_k
    c_k = cost of a unit as measured      if n_k > 0
    c_k = r f_k                           otherwise

over the kinds with n_k > 0 and a forecast. Of these, those that are LOADING do not count, nor
those SIMILAR to another one if there are others; if nothing has ended yet, r is that of the run
so far. The measured cost is s_k / n_k over the calls that were not the first of their kind on a
worker (which imports, allocates and reads what later ones find), each with the weight exp(-age /
max(FRESH, T / 3)), T seconds after the pass began: machines are shared, and the recent past tells
more about the next minutes.

A call of u units that has been running for e seconds has min(e, c_k u) of its cost behind it; if
its kind has never been measured, is not LOADING, and e > c_k u, then c_k is at least e / u. With
N workers that can be busy,

    W = sum m_k c_k - sum min(e, c_k u)
    left = max(W / (b N), largest max(c_k u - e, 0))

    b = (B + SETTLING N) / (A + SETTLING N)

in which b is the busy fraction of the workers, from the B seconds in calls of the A seconds that
workers existed in this stage; SETTLING seconds in which all were busy are added to both. A kind
without measurement and forecast costs what a SIMILAR one does; without that, the time is unknown.

Units that an earlier run has stored are in neither n_k nor m_k.

The time of the run adds the forecasts F of the later stages, corrected by the ratio of the measured
seconds E of the stages so far to the forecast P of the work that was done in them,

    run_left = left + R sum F,    R = (E + K) / (P + K),    K = CAUTION sum of all forecasts
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SETTLING = 2.0
"""Seconds after which the measured busy fraction of workers outweighs the assumption of 1."""
FRESH = 20.0
"""Least time constant, in seconds, with which measured calls lose their weight."""
LOADING = frozenset({"open", "take"})
"""Kinds that read files rather than compute."""
CAUTION = 0.005
"""Fraction of a run's forecast until which a measured ratio of time to forecast counts little."""


SIMILAR = {"score": "forward", "turn": "back"}
"""Kinds that differ in the head of the model alone, whose softmax is slow for its FLOPs."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Calls of one kind that have ended."""

    units: float = 0.0
    seconds: float = 0.0
    """Seconds of workers in these calls."""
    recent_units: float = 0.0
    """Weighted units of the calls that were not the first on their worker."""
    recent_seconds: float = 0.0

    @property
    def cost(self) -> float:
        """Seconds of a worker for a unit."""
        if self.recent_units > 0:
            return self.recent_seconds / self.recent_units
        return self.seconds / self.units

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.units + other.units,
            self.seconds + other.seconds,
            self.recent_units + other.recent_units,
            self.recent_seconds + other.recent_seconds,
        )

    def aged(self, weight: float) -> "Measured":
        """Return the same calls with less weight."""
        recent = weight * self.recent_units, weight * self.recent_seconds
        return Measured(self.units, self.seconds, *recent)


@dataclass(frozen=True, slots=True)
class Running:
    """A call that is running."""

    kind: str
    units: float
    seconds: float
    """Seconds since its start."""
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """State of a stage at one time; work in units by kind."""

    to_do: Mapping[str, float]
    """Units that have not ended, those of running calls included."""
    ended: Mapping[str, Measured] = field(default_factory=dict)
    running: Sequence[Running] = ()
    workers: int = 1
    """Workers that can be busy."""
    existed: float = 0.0
    """Sum over workers of the seconds that they existed within the stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Forecast of a run on a machine of nominal rates."""

    units: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Seconds of a worker for a unit, by stage and kind."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the stages, in their order."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Time that is left of a stage."""

    left: float | None
    """Seconds; None while it is unknown."""
    fraction: float | None
    """Fraction of the stage's work in this run that is done, by its cost; None while unknown."""


def stage_left(moment: Moment, forecast: Mapping[str, float], ratio: float = 1.0) -> Estimate:
    """Estimate the time that is left of a stage.

    Args:
        forecast: Seconds of a worker for a unit, by kind.
        ratio: Measured over forecast seconds of the run so far; counts until a call has ended.
    """
    costs = unit_costs(moment, forecast, ratio)
    if any(count > 0 and kind not in costs for kind, count in moment.to_do.items()):
        return Estimate(None, None)
    behind = longest = 0.0
    for call in moment.running:
        whole = costs.get(call.kind, 0.0) * call.units
        behind += min(call.seconds, whole)
        longest = max(longest, whole - call.seconds)
    work = sum(count * costs[kind] for kind, count in moment.to_do.items() if count > 0)
    ended = sum(each.seconds for each in moment.ended.values())
    rest = max(work - behind, 0.0)
    workers = max(moment.workers, 1)
    busy = ended + sum(call.seconds for call in moment.running)
    full = SETTLING * workers
    share = min((busy + full) / (moment.existed + full), 1.0)
    done = ended + behind
    fraction = done / (done + rest) if done + rest > 0 else 1.0
    return Estimate(max(rest / (share * workers), longest), fraction)


def unit_costs(
    moment: Moment, forecast: Mapping[str, float], ratio: float = 1.0
) -> dict[str, float]:
    """Return the seconds of a worker for a unit, by kind; unknown kinds are left out."""
    known = {kind: each for kind, each in moment.ended.items() if each.units > 0}
    measured = {kind: each.cost for kind, each in known.items()}
    kinds = [kind for kind in known if kind in forecast]
    usual = [kind for kind in kinds if kind not in SIMILAR and kind not in LOADING]
    kinds = usual or [kind for kind in kinds if kind not in LOADING]
    expected = sum(known[kind].units * forecast[kind] for kind in kinds)
    if expected > 0:
        ratio = sum(known[kind].units * measured[kind] for kind in kinds) / expected
    costs = {kind: ratio * seconds for kind, seconds in forecast.items()}
    for call in moment.running:
        if call.kind in costs and call.kind not in LOADING and call.units > 0:
            costs[call.kind] = max(costs[call.kind], call.seconds / call.units)
    costs |= measured
    similar = {kind: costs[other] for kind, other in SIMILAR.items() if other in costs}
    return similar | costs


def forecast_of_work(
    moment: Moment, forecast: Mapping[str, float], fraction: float | None
) -> float | None:
    """Return the forecast seconds of the work that a stage has done so far.

    Args:
        fraction: Fraction of its work that is done.

    Returns:
        None if a kind has no forecast.
    """
    counts = {kind: each.units for kind, each in moment.ended.items()}
    for kind, count in moment.to_do.items():
        counts[kind] = counts.get(kind, 0.0) + count
    if fraction is None or any(n > 0 and kind not in forecast for kind, n in counts.items()):
        return None
    whole = sum(n * forecast[kind] for kind, n in counts.items() if n > 0)
    return fraction * whole / max(moment.workers, 1)


def run_ratio(measured: float, forecast: float, expected: Expected) -> float:
    """Return the correction R of the forecasts of later stages.

    Args:
        measured: Seconds of the stages so far.
        forecast: Forecast seconds of the work that was done in them.
    """
    caution = CAUTION * sum(expected.stages.values())
    return (measured + caution) / (forecast + caution) if forecast + caution > 0 else 1.0


def later_seconds(stage: str, expected: Expected) -> float | None:
    """Return the forecast of all stages after one; None if the forecast does not have it."""
    names = list(expected.stages)
    if stage not in names:
        return None
    return sum(expected.stages[name] for name in names[names.index(stage) + 1 :])
