"""CAP's global choice of directions and entries (arXiv 2505.03801), before and after it learns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from orchestrator.allocate.bernoulli import (
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
from orchestrator.allocate.budget import budget_values, make_plan
from orchestrator.allocate.choice import Choice, choose
from orchestrator.errors import UsageError
from orchestrator.plan.candidates import Candidates
from orchestrator.plan.forms import Form
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.recipe.options import check_choice, check_number


@dataclass(frozen=True, slots=True, kw_only=True)
class CapAllocator:
    """One pool of singular directions and sparse entries over all linears, and one budget.

    Every candidate has a keep-probability s. The paper's second stage draws masks from them,
    takes the loss of each masked model, moves s against the REINFORCE estimate of the expected
    loss's gradient, and projects on the budget; in the end the largest s are kept for good.
    Called as it is, without losses, this is the initialisation alone: a greedy choice by s0.

    Entries share probabilities in buckets of equal utility, which the paper, where each has its
    own, does not do: 70B has 68e9 targeted values, of which a robust PCA leaves some 48e9 entries;
    one float64 array over them is 383 GB, and there are some fifteen. In buckets, 64 a linear, the
    driver holds at most 3.44e6 directions and 36e3 buckets for 70B: 0.42 GB in all, of which
    0.14 GB come to it as JSON, and 10 MB more with each loss.

    Left open by the paper, and chosen here: the initialisation, the baseline (the mean of the last
    `window` losses: the "sliding window 5"), draws an iteration, eps, and the form of the
    projection. A first author's code differs from the paper: `init = "magnitude"`,
    `projection = "multiplicative"`, `baseline = "ema"`, 120 iterations of 8 samples and eta 0.1
    come near it; its overflow penalty is not here, because a projection leaves no overflow.

    Divides what method `cap` stores. More budget need not keep every candidate that less budget
    keeps: what does not fit is skipped.
    """

    init: Init = "utility"
    across: Across = "linear"
    """How utilities of different linears compare before losses have their say: each over the one
    at which its own linear would have spent its share (`linear`: all linears start with the same
    kept fraction), over its linear's energy (`relative`), or as they are (`absolute`: linears with
    large outputs take from the others). On SmolLM2-135M-Instruct at 0.5 kept, without the second
    stage: perplexity 2.3e3, 5.8e3 and 7.4e4 on validation text of WikiText-2."""
    temperature: float = 0.5
    """Of the sigmoid in `utility`: smaller is closer to the greedy choice, and draws less."""
    stage2: bool = True
    """Whether losses are taken at all; the initialisation alone otherwise."""
    iterations: int = 3
    samples: int = 4
    """Masked models an iteration. One, the paper's fewest, would leave the first of three
    iterations without a baseline, and each step to the noise of a single mask."""
    chunks: int = 8
    """Calibration sequences that a loss is taken on, the first ones."""
    eta: float = 0.05
    eps: float = 0.05
    """In (m - s) / (s (1 - s) + eps): a candidate that is all but decided moves by less than
    eta / eps a unit of loss. Near 0 the rarest draws of 1e5 candidates decide most of a step."""
    baseline: Literal["window", "ema"] = "window"
    window: int = 5
    beta: float = 0.9
    projection: Projection = "shift"
    keep_better: bool = True
    """Whether the initialisation is kept where its loss on the same sequences is no larger; the
    report names both losses and the one that was taken. The first author's code also ends with
    the better of two."""

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
                    f"cap: {name} is {value!r}; it must be a whole number, {lowest} up"
                )
        for name in ("stage2", "keep_better"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(
                    f"cap: {name} is {getattr(self, name)!r}; it must be true or false"
                )

    @property
    def learns(self) -> bool:
        """Whether it asks for losses."""
        return self.stage2 and self.iterations > 0

    def __call__(
        self,
        linears: Sequence[Linear],
        curves: Mapping[str, Any],
        keep: float,
        cosines: Mapping[str, float],
    ) -> Plan:
        """The plan of the initialisation; `curves` are `Candidates`.

        Raises:
            UsageError, InfeasibleError: As `budget_values`.
        """
        budget = budget_values(linears, keep)
        pool = self.pool(linears, curves, keep)
        return self.plan(pool, choose(pool, self.start(pool, budget), budget), budget)

    def pool(
        self, linears: Sequence[Linear], candidates: Mapping[str, Candidates], share: float
    ) -> CandidatePool:
        """The candidates of all linears; `share` is what is to be kept of them."""
        return make_pool(linears, candidates, self.across, share)

    def start(self, pool: CandidatePool, budget: int) -> np.ndarray:
        """The probabilities before the first loss, [N]."""
        share_N = initial(pool, budget, self.init, self.temperature)
        return project(pool, share_N, budget, self.projection)

    def new_baseline(self) -> Baseline:
        return Baseline(self.baseline, self.window, self.beta)

    def step(
        self,
        pool: CandidatePool,
        share_N: np.ndarray,
        draws: Sequence[Draw],
        baseline: Baseline,
        budget: int,
    ) -> np.ndarray:
        """The probabilities after one iteration's losses, [N]."""
        share_N = learn(pool, share_N, draws, baseline, eta=self.eta, eps=self.eps)
        return project(pool, share_N, budget, self.projection)

    def plan(self, pool: CandidatePool, choice: Choice, budget: int) -> Plan:
        """What a choice makes of every linear."""
        kept = pool.split(choice.kept_N)
        assignments = {}
        for linear in pool.linears:
            rank, nonzeros = (int(part.sum()) for part in kept[linear.name])
            form: Form = "low_rank_sparse" if nonzeros else "low_rank"
            assignments[linear.name] = (
                Assignment(form="dense")
                if linear.name in choice.dense
                else Assignment(form=form, rank=rank, nonzeros=nonzeros)
            )
        return make_plan(pool.linears, assignments, budget)
