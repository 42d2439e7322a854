"""CAP's global choice of directions and entries (arXiv 2505.03801): initialisation and learning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from orchestrator.allocate.base import Allocator, Scoring
from orchestrator.allocate.budget import Budget, make_plan
from orchestrator.allocate.sparsity.bernoulli import (
    Across,
    Baseline,
    CandidatePool,
    Draw,
    Init,
    Projection,
    initial,
    learn,
    make_pool,
    project,
)
from orchestrator.allocate.sparsity.choice import Choice, choose
from orchestrator.errors import UsageError
from orchestrator.plan.candidates import Candidates
from orchestrator.plan.forms import Divided
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.recipe.options import check_choice, check_number


@dataclass(frozen=True, slots=True, kw_only=True)
class CapAllocator(Allocator):
    """One pool of singular directions and sparse entries over all linears, and one budget.

    Every candidate has a keep-probability s. The paper's second stage samples masks from the
    probabilities, measures the loss of each masked model, moves s against the REINFORCE estimate of
    the gradient of the expected loss, and projects on the budget; at the end the candidates with
    the largest s are kept. A direct call, without losses, gives the initialisation alone: a greedy
    choice by s0.

    Departure: entries share probabilities in buckets of equal utility; in the paper each entry has
    its own. A 70B model has 68e9 targeted values, of which a robust PCA leaves about 48e9 entries;
    one float64 array over them is 383 GB, and about fifteen are needed. With 64 buckets a linear,
    the driver holds at most 3.44e6 directions and 36e3 buckets for 70B: 0.42 GB, of which 0.14 GB
    are received as JSON, plus 10 MB per loss.

    Not specified by the paper and chosen here: the initialisation, the baseline (the mean of the
    last `window` losses: the "sliding window 5"), the number of samples per iteration, eps, and the
    projection. The first author's code differs from the paper: `init = "magnitude"`, `projection =
    "multiplicative"`, `baseline = "ema"`, 120 iterations of 8 samples and eta 0.1 approximate it;
    its overflow penalty is omitted, because a projection leaves no overflow.

    For results of method `cap`. A larger budget need not keep every candidate that a smaller one
    keeps: candidates that do not fit are skipped.
    """

    source: ClassVar[str] = "arXiv 2505.03801"
    divides: ClassVar[tuple[Divided, ...]] = ("ranks and entries together",)
    scoring: ClassVar[Scoring] = Scoring.MASKS
    init: Init = "utility"
    across: Across = "linear"
    """Comparison of utilities of different linears before the first loss: over the utility at which
    the linear alone would have spent its kept fraction (`linear`: all linears start with the same
    kept fraction), over the energy of the linear (`relative`), or unchanged (`absolute`: favours
    linears with large outputs). On SmolLM2-135M-Instruct at keep 0.5, without the second stage:
    perplexity 2.3e3, 5.8e3 and 7.4e4 on the validation text of WikiText-2."""
    temperature: float = 0.5
    """Temperature of the sigmoid of `utility`: a smaller value is closer to the greedy choice and
    draws less."""
    stage2: bool = True
    """Use losses (the second stage); False gives the initialisation alone."""
    iterations: int = 3
    samples: int = 4
    """Masked models per iteration. With one, the minimum in the paper, the first of three
    iterations has no baseline, and each step depends on the noise of a single mask."""
    chunks: int = 8
    """Number of calibration sequences, the first ones, on which a loss is measured."""
    eta: float = 0.05
    eps: float = 0.05
    """Damping in (m - s) / (s (1 - s) + eps): a candidate close to 0 or 1 moves by less than eta /
    eps per unit of loss. Near 0, the rarest draws of 1e5 candidates dominate a step."""
    baseline: Literal["window", "ema"] = "window"
    window: int = 5
    beta: float = 0.9
    projection: Projection = "shift"
    keep_better: bool = True
    """Keep the initialisation if its loss on the same sequences is not larger; the report names
    both losses and the choice. The first author's code also returns the better of two."""

    def __post_init__(self) -> None:
        check_choice("cap: init", self.init, ("utility", "magnitude", "constant"))
        check_choice("cap: across", self.across, ("linear", "relative", "absolute"))
        check_choice("cap: baseline", self.baseline, ("window", "ema"))
        check_choice("cap: projection", self.projection, ("shift", "euclid", "multiplicative"))
        check_number("cap: temperature", self.temperature, 1e-3, 1e3)
        check_number("cap: eta", self.eta, 0, 1e6)
        check_number("cap: eps", self.eps, 1e-12, 1)
        check_number("cap: beta", self.beta, 0, 1)
        for name, lowest in (("iterations", 0), ("samples", 1), ("chunks", 1), ("window", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise UsageError(
                    f"cap: {name} is {value!r}; it must be a whole number, at least {lowest}"
                )
        for name in ("stage2", "keep_better"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(
                    f"cap: {name} is {getattr(self, name)!r}; it must be true or false"
                )

    @property
    def learns(self) -> bool:
        """True if the allocator needs losses."""
        return self.stage2 and self.iterations > 0

    def scoring_passes(self, num_linears: int) -> float:
        """Return the passes of the drawn masks: `iterations` of `samples` on `chunks`."""
        return float(self.iterations * self.samples * self.chunks)

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Any],
        budget: Budget,
        cosines: Mapping[str, float],
    ) -> Plan:
        """Return the plan of the initialisation; `curves` are `Candidates`.

        Raises:
            InfeasibleError: As `Budget.total`.
        """
        total = budget.total(linears)
        pool = self.pool(linears, curves, budget)
        return self.plan(pool, choose(pool, self.start(pool, total), total), total)

    def pool(
        self, linears: Sequence[Linear], candidates: Mapping[str, Candidates], budget: Budget
    ) -> CandidatePool:
        """Build the pool of the candidates of all linears."""
        return make_pool(linears, candidates, self.across, budget.kept)

    def start(self, pool: CandidatePool, budget: int) -> np.ndarray:
        """Compute the probabilities before the first loss, [N]."""
        probability_N = initial(pool, budget, self.init, self.temperature)
        return project(pool, probability_N, budget, self.projection)

    def new_baseline(self) -> Baseline:
        return Baseline(self.baseline, self.window, self.beta)

    def step(
        self,
        pool: CandidatePool,
        probability_N: np.ndarray,
        draws: Sequence[Draw],
        baseline: Baseline,
        *,
        budget: int,
    ) -> np.ndarray:
        """Update the probabilities with the losses of one iteration, [N]."""
        probability_N = learn(pool, probability_N, draws, baseline, eta=self.eta, eps=self.eps)
        return project(pool, probability_N, budget, self.projection)

    def plan(self, pool: CandidatePool, choice: Choice, budget: int) -> Plan:
        """Convert a choice to a plan."""
        kept = pool.split(choice.kept_N)
        assignments = {}
        for linear in pool.linears:
            rank, nonzeros = (int(part.sum()) for part in kept[linear.name])
            form = "low_rank_sparse" if nonzeros else "low_rank"
            assignments[linear.name] = (
                Assignment(form="dense")
                if linear.name in choice.dense
                else Assignment(form=form, rank=rank, nonzeros=nonzeros)
            )
        return make_plan(pool.linears, assignments, budget)
