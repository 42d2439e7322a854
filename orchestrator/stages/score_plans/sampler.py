"""Points to try next: the samplers of Optuna, an extra, as one function without state."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

Point = tuple[float, ...]
FEWEST = 4
"""Told points from which others are derived."""


def check_installed() -> None:
    """Raise UsageError if Optuna, or what its Gaussian process needs, is not installed."""
    missing = [name for name in ("optuna", "scipy") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"allocation: 'search' needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed; pip install "
            "'orchestrator[search]'"
        )


def ask(
    told: Sequence[tuple[Point, float]],
    bounds: Sequence[tuple[float, float]],
    count: int,
    *,
    sampler: Literal["gp", "tpe", "random"],
    seed: int,
) -> list[Point]:
    """Choose points of a box, with small values in view; the same ones for equal arguments.

    - `gp`: a Gaussian process, Matérn 5/2 with a length for each coordinate; the largest logarithm
      of the expected improvement, in which points that are asked and not told count too.
    - `tpe`: Parzen estimators of the better and the other points, of all coordinates together;
      points that are asked and not told count as bad ones, so that a batch spreads.
    - `random`: uniform.

    All are uniform until `FEWEST` points are told. The first two are numeric code of other
    packages, whose bits may change with versions and processors, so that a caller stores points.

    Costs of 50 points in batches of 8 were 7 CPU seconds by `gp` with 5 coordinates and 14 with 23;
    0.2 and 0.4 by `tpe`.

    Args:
        told: Points and their finite values.
    """
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.trial import create_trial

    # a line for every study otherwise, and one about a package for faster proposals
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, BaseDistribution] = {
        f"z{number}": FloatDistribution(least, most) for number, (least, most) in enumerate(bounds)
    }
    study = optuna.create_study(sampler=_sampler(sampler, seed))
    study.add_trials(
        [
            create_trial(
                params=dict(zip(distributions, point, strict=True)),
                distributions=distributions,
                value=value,
            )
            for point, value in told
        ]
    )
    asked = [study.ask(distributions) for _ in range(count)]
    return [tuple(float(each.params[name]) for name in distributions) for each in asked]


def _sampler(name: str, seed: int) -> "BaseSampler":
    """Make a sampler."""
    from optuna.samplers import GPSampler, RandomSampler, TPESampler

    if name == "gp":
        return GPSampler(seed=seed, n_startup_trials=FEWEST)
    if name == "tpe":
        options = {"multivariate": True, "constant_liar": True}
        return TPESampler(seed=seed, n_startup_trials=FEWEST, **options)
    return RandomSampler(seed=seed)
