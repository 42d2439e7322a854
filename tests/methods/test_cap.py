"""CAP: projection onto the budget, unbiased estimator, choice of candidates, and whole runs."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from allocation import assert_invariants, make_linears, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import contents, run, with_tokenizer, write_llama, write_text
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import orchestrator
from orchestrator.allocate.bernoulli import (
    Baseline,
    Draw,
    initial,
    learn,
    make_pool,
    project,
    score_function,
)
from orchestrator.allocate.budget import share_values
from orchestrator.allocate.cap import CapAllocator
from orchestrator.allocate.choice import choose
from orchestrator.errors import InfeasibleError, InputError, StoppedError, UsageError
from orchestrator.linalg.gram import Gram
from orchestrator.linalg.low_rank import InputGram
from orchestrator.linalg.ranked import RIDGES, SKETCH, rank_parts, sketched_energy
from orchestrator.linalg.rpca import rpca
from orchestrator.methods.kinds.ranked import CandidateValues, MaskedParts
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.plan.candidates import Candidates
from orchestrator.plan.codecs import CODECS
from orchestrator.plan.forms import LOW_RANK
from orchestrator.runtime.calls import Open, Step
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.stages.context.worker.stored import StoredFile

PROJECTIONS = ("shift", "euclid", "multiplicative")


def make_candidates(linear, rng, buckets=5, largest=6):
    """Random candidates of one linear, with descending utilities of each kind."""
    rank = min(linear.out_features, linear.in_features)
    scale = 10 ** rng.uniform(-2, 2)
    return Candidates(
        direction_utilities=np.sort(rng.exponential(size=rank))[::-1] * scale,
        direction_magnitudes=np.sort(rng.exponential(size=rank))[::-1],
        bucket_counts=rng.integers(1, largest, size=buckets),
        bucket_utilities=np.sort(rng.exponential(size=buckets))[::-1] * scale,
        bucket_magnitudes=rng.exponential(size=buckets),
        energy=scale * rng.exponential(),
    )


def random_pool(linears, seed=0, **sizes):
    rng = np.random.default_rng(seed)
    return make_pool(linears, {each.name: make_candidates(each, rng, **sizes) for each in linears})


SMALL = make_linears([(4, 6), (6, 4), (5, 5)])


def test_candidates_and_pools_round_trip():
    """Candidates go to JSON and back; a pool's values split by linear and join again."""
    candidates = make_candidates(SMALL[0], np.random.default_rng(1))
    again = Candidates.from_json(candidates.to_json())
    for name in Candidates.__slots__:
        assert np.array_equal(getattr(again, name), getattr(candidates, name))
    assert again.bucket_counts.dtype == np.int64
    pool = random_pool(SMALL)
    parts = pool.split(pool.utility_N)
    assert [len(part) for part in parts[SMALL[1].name]] == [4, 5]
    assert np.array_equal(pool.join(parts), pool.utility_N)
    assert np.array_equal(pool.join(pool.split(pool.cost_N)), pool.cost_N)


@pytest.mark.parametrize("projection", PROJECTIONS)
@given(seed=st.integers(0, 99), percent=st.integers(5, 95))
@settings(deadline=None, max_examples=40)
def test_a_projection_spends_the_budget(projection, seed, percent):
    """The expected stored values approach the budget from below; every s is a probability."""
    pool = random_pool(SMALL, seed)
    budget = int(pool.weight_N.sum() * percent / 100)
    share_N = np.random.default_rng(seed).normal(0.5, 1, size=len(pool.owner_N))
    found_N = project(pool, share_N, budget, projection)
    assert np.all((found_N >= 0) & (found_N <= 1))
    assert budget * (1 - 1e-9) <= found_N @ pool.weight_N <= budget * (1 + 1e-15)
    if projection == "shift":
        order = np.argsort(share_N)
        assert np.all(np.diff(found_N[order]) >= 0)


@pytest.mark.parametrize("projection", ["shift", "euclid"])
@given(seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_a_projection_is_the_nearest_point(projection, seed):
    """It satisfies the Karush-Kuhn-Tucker conditions: one multiplier for all s inside (0, 1), and
    the right sign of the slope at the bounds."""
    pool = random_pool(SMALL, seed)
    share_N = np.random.default_rng(seed).normal(0.5, 0.6, size=len(pool.owner_N))
    budget = int(pool.weight_N.sum()) // 2
    found_N = project(pool, share_N, budget, projection)
    # minimise Σ metric (s - s0)² under Σ weight s = K: metric (s0 - s) = ν weight inside
    metric_N = pool.weight_N if projection == "shift" else pool.count_N
    slope_N = metric_N * (share_N - found_N) / pool.weight_N
    inside_N = (found_N > 1e-12) & (found_N < 1 - 1e-12)
    nu = slope_N[inside_N].mean()
    assert slope_N[inside_N] == pytest.approx(nu, abs=1e-9)
    assert np.all(slope_N[found_N <= 1e-12] <= nu + 1e-9)
    assert np.all(slope_N[found_N >= 1 - 1e-12] >= nu - 1e-9)


def test_a_projection_is_nearest_by_brute_force():
    """No point of a fine grid on the budget is nearer, for two candidates of different cost."""
    linear = make_linears([(2, 3)])[0]
    one = np.ones(1)
    candidates = Candidates(
        direction_utilities=one,
        direction_magnitudes=one,
        bucket_counts=np.array([2]),
        bucket_utilities=one,
        bucket_magnitudes=one,
        energy=1.0,
    )
    pool = make_pool([linear], {linear.name: candidates})
    share_N, budget = np.array([0.9, 0.7]), 3
    grid = np.linspace(0, 1, 100_001)
    points = np.stack([grid, (budget - 5 * grid) / 2])
    points = points[:, (points[1] >= 0) & (points[1] <= 1)]
    for projection, metric in (("shift", [5, 2]), ("euclid", [1, 2])):
        distances = np.array(metric) @ (points - share_N[:, None]) ** 2
        best = points[:, distances.argmin()]
        assert project(pool, share_N, budget, projection) == pytest.approx(best, abs=2e-5)


def test_a_budget_for_everything_keeps_everything():
    """All probabilities are 1 if the whole pool fits."""
    pool = random_pool(SMALL)
    share_N = np.zeros(len(pool.owner_N))
    for projection in PROJECTIONS:
        whole = project(pool, share_N, int(pool.weight_N.sum()), projection)
        assert np.array_equal(whole, np.ones_like(share_N))


def greedy(pool, share_N, budget):
    """Greedy choice, draw by draw, by its definition; no linear may become dense."""
    draws = [
        (-share_N[n], -pool.utility_N[n], n)
        for n in range(len(share_N))
        for _ in range(pool.count_N[n])
    ]
    draws.sort()
    first, ranks = {}, dict.fromkeys(range(len(pool.linears)), 0)
    for _, _, n in draws:
        if pool.is_direction_N[n]:
            first.setdefault(pool.owner_N[n], n)
    kept_N = np.zeros_like(pool.count_N)
    for n in [*first.values()]:
        kept_N[n], budget, ranks[pool.owner_N[n]] = 1, budget - pool.cost_N[n], 1
    for _, _, n in draws:
        if n in first.values() or pool.cost_N[n] > budget:
            continue
        if pool.is_direction_N[n]:
            owner = pool.owner_N[n]
            if ranks[owner] == LOW_RANK.break_even(pool.linears[owner]) - 1:
                continue
            ranks[owner] += 1
        kept_N[n] += 1
        budget -= pool.cost_N[n]
    return kept_N


@given(seed=st.integers(0, 500), percent=st.integers(30, 70))
@settings(deadline=None, max_examples=150)
def test_the_choice_is_the_greedy_one(seed, percent):
    """If no linear becomes dense it equals a walk over single draws."""
    linears = make_linears([(8, 12), (12, 8), (10, 10)])
    pool = random_pool(linears, seed, buckets=4, largest=9)
    share_N = np.random.default_rng(seed).choice([0.1, 0.4, 0.4001, 0.8], len(pool.owner_N))
    budget = share_values(linears, percent / 100)
    choice = choose(pool, share_N, budget)
    if not choice.dense:
        assert np.array_equal(choice.kept_N, greedy(pool, share_N, budget))


def test_the_choice_is_optimal_for_equal_costs():
    """With equal costs and probabilities as gains no set of the same size has a larger sum."""
    linear = make_linears([(20, 20)])[0]
    none = np.zeros(0)
    rng = np.random.default_rng(0)
    gains = rng.permutation(np.linspace(0.1, 0.9, 8))
    candidates = Candidates(
        direction_utilities=np.ones(8),
        direction_magnitudes=np.ones(8),
        bucket_counts=none.astype(np.int64),
        bucket_utilities=none,
        bucket_magnitudes=none,
        energy=1.0,
    )
    pool = make_pool([linear], {linear.name: candidates})
    choice = choose(pool, gains, 4 * 40 + 39)
    best = max(itertools.combinations(range(8), 4), key=lambda kept: gains[list(kept)].sum())
    assert np.flatnonzero(choice.kept_N).tolist() == sorted(best)


MODEL = make_model(
    {"self_attn.q_proj": (24, 24), "mlp.gate_proj": (40, 24), "mlp.down_proj": (24, 40)}, blocks=2
)


@given(percent=st.integers(1, 100), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=100)
def test_the_budget_is_met_from_below(percent, seed):
    """Every plan stores at most the budget, with any dense linears, or the budget is infeasible."""
    rng = np.random.default_rng(seed)
    candidates = {each.name: make_candidates(each, rng, 8, 120) for each in MODEL}
    try:
        plan = CapAllocator()(MODEL, candidates, percent / 100, {})
    except InfeasibleError:
        assert percent < 20
        return
    assert_invariants(plan, MODEL, percent / 100)
    for linear in MODEL:
        assignment = plan.assignments[linear.name]
        if assignment.form != "dense":
            assert assignment.stored_values(linear) < linear.values
    if percent == 100:
        assert {assignment.form for assignment in plan.assignments.values()} == {"dense"}


def test_the_start_prefers_utility():
    """At the greedy break point a probability is one half; it increases with utility."""
    pool = random_pool(MODEL)
    budget = int(pool.weight_N.sum()) // 2
    share_N = initial(pool, budget, "utility", 0.5)
    order = np.argsort(-pool.utility_N, kind="stable")
    assert np.all(np.diff(share_N[order]) <= 0)
    spent = np.cumsum(pool.weight_N[order])
    assert share_N[order][np.searchsorted(spent, budget)] == 0.5
    magnitude_N = initial(pool, budget, "magnitude", 0.5)
    assert magnitude_N.min() >= 0.05
    assert magnitude_N.max() == 0.95
    assert set(initial(pool, budget, "constant", 0.5)) == {0.5}


@pytest.mark.parametrize("across", ["linear", "relative", "absolute"])
def test_linears_compare_by_the_requested_scale(across):
    """A linear with energies a million times larger displaces the others only in absolute terms;
    relative to their own linears' break points all start with the same kept fraction."""
    rng = np.random.default_rng(5)
    linears = make_linears([(60, 60)] * 3)
    candidates = {each.name: make_candidates(each, rng, 64, 100) for each in linears}

    def plan(factors):
        scaled = {
            name: replace(
                part,
                direction_utilities=part.direction_utilities * factor,
                bucket_utilities=part.bucket_utilities * factor,
                energy=part.energy * factor,
            )
            for (name, part), factor in zip(candidates.items(), factors, strict=True)
        }
        return CapAllocator(across=across)(linears, scaled, 0.5, {})

    # powers of two are exact
    one, other = plan([2.0**-20, 1, 2.0**20]), plan([2.0**20, 1, 2.0**-20])
    assert (one == other) == (across != "absolute")
    if across == "linear":
        stored = [one.assignments[each.name].stored_values(each) for each in linears]
        # the two sides of a break point: a direction, a bucket
        assert stored == pytest.approx([1800] * 3, abs=120 + 100)


def masks_of(pool):
    """All masks of all draws: number kept of each candidate, and the multiplicity."""
    for bits in itertools.product([0, 1], repeat=int(pool.count_N.sum())):
        owners = np.repeat(np.arange(len(pool.count_N)), pool.count_N)
        drawn_N = np.bincount(owners, bits, minlength=len(pool.count_N)).astype(np.int64)
        yield np.array(bits), owners, drawn_N


def tiny_pool(counts=(3, 2)):
    """Two directions and two buckets of a few entries."""
    linear = make_linears([(4, 3)])[0]
    candidates = Candidates(
        direction_utilities=np.array([3.0, 1.0]),
        direction_magnitudes=np.array([2.0, 1.0]),
        bucket_counts=np.array(counts),
        bucket_utilities=np.array([2.0, 0.5]),
        bucket_magnitudes=np.array([1.0, 0.5]),
        energy=1.0,
    )
    return make_pool([linear], {linear.name: candidates})


def test_the_estimator_is_unbiased():
    """Over all masks, the mean of loss times score is the gradient of the expected loss."""
    pool, rng = tiny_pool(), np.random.default_rng(3)
    share_N = np.array([0.7, 0.2, 0.45, 0.9])
    losses = {}

    def expected_loss(share_N):
        total = 0.0
        for bits, owners, _ in masks_of(pool):
            loss = losses.setdefault(tuple(bits), rng.exponential())
            total += loss * np.prod(np.where(bits, share_N[owners], 1 - share_N[owners]))
        return total

    expected_loss(share_N)
    estimate_N = np.zeros(4)
    for bits, owners, drawn_N in masks_of(pool):
        probability = np.prod(np.where(bits, share_N[owners], 1 - share_N[owners]))
        advantage = losses[tuple(bits)] - 0.37
        estimate_N += probability * advantage * score_function(share_N, drawn_N, pool.count_N, 0.0)
    step = 1e-5
    gradient_N = [
        (expected_loss(share_N + step * unit) - expected_loss(share_N - step * unit)) / (2 * step)
        for unit in np.eye(4)
    ]
    assert estimate_N == pytest.approx(gradient_N, rel=1e-6)


def test_certain_candidates_have_no_score():
    """Probabilities 0 and 1 have no gradient, with and without eps."""
    share_N, count_N = np.array([0.0, 1.0]), np.array([1, 4])
    for eps in (0.0, 0.05):
        assert np.array_equal(score_function(share_N, np.array([0, 4]), count_N, eps), [0, 0])


def test_a_bucket_moves_as_the_mean_of_its_entries():
    """A bucket's step is the mean of the steps of entries with separate probabilities."""
    together, alone = tiny_pool((4, 2)), tiny_pool((1, 1))
    share_N, baseline = np.array([0.5, 0.5, 0.3, 0.5]), Baseline()
    baseline.advantage(1.0)
    moved_N = learn(
        together, share_N, [Draw(np.array([1, 0, 1, 2]), 3.0)], baseline, eta=0.1, eps=0.0
    )
    steps = []
    for entry in (1, 0, 0, 0):
        baseline = Baseline()
        baseline.advantage(1.0)
        draw = Draw(np.array([1, 0, entry, 1]), 3.0)
        steps.append(learn(alone, share_N, [draw], baseline, eta=0.1, eps=0.0)[2])
    assert moved_N[2] == pytest.approx(np.mean(steps))


def test_baselines_are_means_of_earlier_losses():
    """The window drops old losses, the moving average decays, and the first loss has no effect."""
    window, ema = Baseline("window", 2), Baseline("ema", beta=0.75)
    assert [window.advantage(loss) for loss in (4, 6, 8, 1)] == [0, 2, 3, -6]
    assert [ema.advantage(loss) for loss in (4, 8, 5)] == [0, 4, 0]


def overlapping(seed):
    """A 6 x 6 weight as three directions and nine entries that overlap, and every mask's loss. The
    loss is the relative squared error of the outputs on correlated inputs."""
    rng = np.random.default_rng(seed)
    low_OI = rng.normal(size=(6, 3)) @ rng.normal(size=(3, 6))
    sparse_OI = np.zeros(36)
    places = rng.permutation(36)[:9]
    # entries partly cancel the directions, as those of a robust PCA may
    sparse_OI[places] = -rng.uniform(0.2, 1.2, size=9) * low_OI.reshape(-1)[places]
    places = places[np.argsort(-np.abs(sparse_OI[places]))]
    u, s, vt = np.linalg.svd(low_OI)
    weight_OI = low_OI + sparse_OI.reshape(6, 6)
    gram_II = np.cov(rng.normal(size=(6, 6)) @ rng.normal(size=(6, 40)))

    def energy(matrix_OI):
        return np.trace(matrix_OI @ gram_II @ matrix_OI.T)

    def loss(drawn_N):
        kept_OI = (u[:, :3] * (s[:3] * drawn_N[:3])) @ vt[:3]
        kept_OI.reshape(-1)[places] += sparse_OI[places] * drawn_N[3:]
        return energy(weight_OI - kept_OI) / energy(weight_OI)

    directions = s[:3] ** 2 * np.einsum("ri,ij,rj->r", vt[:3], gram_II, vt[:3]) / 12
    entries = sparse_OI[places] ** 2 * np.diag(gram_II)[places % 6]
    linear = make_linears([(6, 6)])[0]
    candidates = Candidates(
        direction_utilities=directions,
        direction_magnitudes=s[:3],
        bucket_counts=np.ones(9, dtype=np.int64),
        bucket_utilities=entries,
        bucket_magnitudes=np.abs(sparse_OI[places]),
        energy=energy(weight_OI),
    )
    return make_pool([linear], {linear.name: candidates}), loss


def learnt(pool, loss, budget, cap, seed):
    rng, baseline = np.random.default_rng(seed), cap.new_baseline()
    share_N = cap.start(pool, budget)
    for _ in range(cap.iterations):
        drawn = [rng.binomial(pool.count_N, share_N) for _ in range(cap.samples)]
        draws = [Draw(drawn_N, loss(drawn_N)) for drawn_N in drawn]
        share_N = cap.step(pool, share_N, draws, baseline, budget=budget)
    return share_N


def test_learning_beats_its_start_on_enumerable_models():
    """If directions and entries overlap, the learnt choice is nearer to the best of all masks than
    the greedy start: by more than half in sum over twelve models, better in most of those that can
    improve, worse in none. It uses many losses and large steps, affordable in a toy."""
    cap = CapAllocator(iterations=300, samples=16, temperature=1.0, eta=1.0, eps=0.25)
    budget, gaps = 28, []
    for seed in range(12):
        pool, loss = overlapping(seed)
        masks = (np.array(bits) for bits in itertools.product([0, 1], repeat=12))
        best = min(loss(each) for each in masks if each @ pool.cost_N <= budget)
        start = loss(choose(pool, cap.start(pool, budget), budget).kept_N)
        end = loss(choose(pool, learnt(pool, loss, budget, cap, seed), budget).kept_N)
        assert best <= min(start, end) + 1e-12
        gaps.append((start - best, end - best))
    starts, ends = np.array(gaps).T
    assert ends.sum() < 0.5 * starts.sum()
    assert np.all(ends <= starts + 1e-9)
    assert np.sum(ends < starts - 1e-9) > np.sum(starts > 1e-9) / 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init": "random"}, "utility, magnitude, constant"),
        ({"iterations": -1}, "whole number"),
        ({"samples": 0}, "whole number"),
        ({"temperature": 0}, "0.001"),
        ({"stage2": 1}, "true or false"),
        ({"projection": "none"}, "shift, euclid, multiplicative"),
    ],
)
def test_options_are_checked(options, said):
    """An invalid value is named with the allowed ones."""
    with pytest.raises(UsageError, match=said):
        CapAllocator(**options)


def low_rank_and_sparse(outputs=7, inputs=5, seed=0):
    """A weight, the Gram of some inputs, and its robust PCA."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    inputs_IT = torch.randn(inputs, 20, generator=generator, dtype=torch.float64)
    return weight_OI, InputGram(inputs_IT @ inputs_IT.T, 20), rpca(weight_OI)


@pytest.mark.parametrize("utility", ["activation", "magnitude"])
def test_utilities_are_energies_per_stored_value(utility):
    """A single direction and a single entry give the outputs exactly the stated energy."""
    weight_OI, gram, parts = low_rank_and_sparse()
    matrix_II = gram.matrix_II if utility == "activation" else torch.eye(5, dtype=torch.float64)
    ranked = rank_parts(weight_OI, parts, gram, utility=utility, buckets=0)

    def energy(piece_OI):
        return float((piece_OI @ matrix_II @ piece_OI.T).trace())

    directions = [
        energy(torch.outer(left_O, right_I)) / 12
        for left_O, right_I in zip(ranked.weight_OR.T, ranked.down_RI, strict=True)
    ]
    assert ranked.direction_utilities_R.tolist() == pytest.approx(directions)
    assert directions == sorted(directions, reverse=True)
    entries = []
    for value, position in zip(ranked.values_N, ranked.positions_N, strict=True):
        piece_OI = torch.zeros(7, 5, dtype=torch.float64)
        piece_OI.view(-1)[position] = value
        entries.append(energy(piece_OI))
    assert ranked.bucket_utilities_B.tolist() == pytest.approx(entries, rel=1e-5)
    assert torch.equal(ranked.bucket_counts_B, torch.ones(len(entries), dtype=torch.int64))
    assert ranked.energy == pytest.approx(energy(weight_OI))
    whole_OI = ranked.weight_OR @ ranked.down_RI
    whole_OI.view(-1)[ranked.positions_N.long()] += ranked.values_N
    assert torch.allclose(whole_OI, weight_OI, atol=1e-6)


@pytest.mark.parametrize("buckets", [1, 3, 1000])
def test_buckets_divide_the_order_equally(buckets):
    """Counts are equal except for the last; means are those of single entries."""
    weight_OI, gram, parts = low_rank_and_sparse(outputs=12, inputs=9)
    alone = rank_parts(weight_OI, parts, gram, utility="activation", buckets=0)
    together = rank_parts(weight_OI, parts, gram, utility="activation", buckets=buckets)
    counts_B = together.bucket_counts_B
    assert counts_B.sum() == len(alone.values_N)
    assert len(counts_B) <= buckets
    assert torch.all(counts_B[:-1] == counts_B[0])
    assert counts_B[-1] <= counts_B[0]
    pieces = torch.split(alone.bucket_utilities_B, counts_B.tolist())
    means = torch.stack([piece.mean() for piece in pieces])
    assert torch.allclose(together.bucket_utilities_B, means)


def test_the_sketch_estimates_the_change_of_the_outputs():
    """It is within four standard deviations of trace(D H D^T), for a change of one row and of
    all."""
    generator = torch.Generator().manual_seed(3)
    inputs_IT = torch.randn(40, 90, generator=generator, dtype=torch.float64)
    gram = InputGram(inputs_IT @ inputs_IT.T, 90)
    weight_OI = torch.randn(30, 40, generator=generator, dtype=torch.float64)
    ranked = rank_parts(weight_OI, rpca(weight_OI), gram, utility="activation", buckets=8)
    for rows in (1, 30):
        change_OI = weight_OI[:rows]
        exact = float((change_OI @ gram.matrix_II * change_OI).sum())
        estimate = sketched_energy(change_OI, ranked.sketch_IS.double(), ranked.ridge_I)
        assert estimate == pytest.approx(exact, rel=4 * (2 / SKETCH / rows) ** 0.5)


def gathered(rows_TI):
    """Gram of rows as calibration computes it: float32 products of bfloat16 rows."""
    return Gram(rows_TI.shape[1]).update(rows_TI.bfloat16()).matrix()


def outlier_rows(tokens, channels, seed=0):
    """Inputs like those of models: 20 dominant directions, a massive channel, a dead one."""
    generator = torch.Generator().manual_seed(seed)
    rows_TI = torch.randn(tokens, 20, generator=generator) @ torch.randn(
        20, channels, generator=generator
    )
    rows_TI += 3e-3 * torch.randn(tokens, channels, generator=generator)
    rows_TI[:, 5] += 300
    rows_TI[:, 9] = 0
    return rows_TI


@pytest.mark.parametrize("tokens", [600, 100])
def test_the_sketch_needs_no_gram_of_full_rank(tokens):
    """Estimates have the expected variance, also for changes that hardly affect the outputs. A
    truncation leaves such changes. The ridge that a singular H needs is a large part of their
    energy, and is subtracted."""
    matrix_II = gathered(outlier_rows(tokens, 150))
    generator = torch.Generator().manual_seed(2)
    weight_OI = torch.randn(60, 150, generator=generator, dtype=torch.float64)
    _, vectors_OO = torch.linalg.eigh(weight_OI @ matrix_II @ weight_OI.T)
    ranked = rank_parts(
        weight_OI, rpca(weight_OI), InputGram(matrix_II), utility="activation", buckets=8
    )
    is_singular = tokens < 150
    assert (ranked.report["ridge"] > 0) == is_singular
    sketch_IS = ranked.sketch_IS.double()
    for cut in (0, 1, 10, 30):
        left_OO = vectors_OO[:, : 60 - cut]
        change_OI = left_OO @ (left_OO.T @ weight_OI)
        energies_O = torch.linalg.eigvalsh(change_OI @ matrix_II @ change_OI.T).clamp(min=0)
        exact, rank = float(energies_O.sum()), energies_O.sum() ** 2 / energies_O.square().sum()
        within = 4 * (2 / SKETCH / float(rank)) ** 0.5
        estimate = sketched_energy(change_OI, sketch_IS, ranked.ridge_I)
        assert estimate == pytest.approx(exact, rel=within)
    with_ridge = float((change_OI @ sketch_IS).square().sum())
    assert (with_ridge > (1 + within) * exact) == is_singular


def test_dead_inputs_have_no_part_in_a_sketch():
    """Dead channels are 0 in the random combinations and in the ridge."""
    matrix_II = gathered(outlier_rows(100, 150))
    weight_OI = torch.ones(4, 150)
    ranked = rank_parts(
        weight_OI, rpca(weight_OI), InputGram(matrix_II), utility="activation", buckets=8
    )
    assert not ranked.sketch_IS[9].any()
    assert ranked.ridge_I[9] == 0


def test_a_sketch_needs_a_second_moment():
    """A matrix with large negative eigenvalues and a positive diagonal raises InputError."""
    matrix_II = torch.tensor([[1.0, -3.0], [-3.0, 1.0]], dtype=torch.float64)
    weight_OI = torch.eye(2, dtype=torch.float64)
    assert RIDGES[-1] == 1
    with pytest.raises(InputError, match="not a second moment"):
        rank_parts(
            weight_OI, rpca(weight_OI), InputGram(matrix_II), utility="activation", buckets=8
        )


def test_a_weight_of_zeros_has_a_direction_to_keep():
    """For a zero weight one zero direction is stored, so that every linear can be truncated."""
    weight_OI, gram = torch.zeros(4, 3), InputGram(torch.eye(3, dtype=torch.float64))
    ranked = rank_parts(weight_OI, rpca(weight_OI), gram, utility="activation", buckets=8)
    assert ranked.down_RI.shape == (1, 3)
    assert ranked.direction_utilities_R.tolist() == [0]
    assert len(ranked.values_N) == len(ranked.bucket_counts_B) == 0


def test_draws_come_from_their_seed_and_have_their_probabilities():
    """The same seed gives the same mask, another linear another; means equal the probabilities."""
    values = CandidateValues(
        torch.tensor([0.0, 1.0, 0.3] + [0.7] * 4000, dtype=torch.float64),
        torch.tensor([0.2, 0.9], dtype=torch.float64),
        torch.tensor([5000, 3000]),
    )
    mask, other = values.draw(1, 2, 3, "a.b"), values.draw(1, 2, 3, "a.c")
    assert torch.equal(mask.entries_N, values.draw(1, 2, 3, "a.b").entries_N)
    assert not torch.equal(mask.entries_N, other.entries_N)
    assert mask.directions_R[:2].tolist() == [False, True]
    # four standard deviations of each mean
    assert mask.directions_R[3:].double().mean().item() == pytest.approx(0.7, abs=0.03)
    directions, buckets = mask.drawn(values.counts_B)
    assert directions == mask.directions_R.int().tolist()
    assert buckets == [int(mask.entries_N[:5000].sum()), int(mask.entries_N[5000:].sum())]
    assert buckets[0] / 5000 == pytest.approx(0.2, abs=0.023)
    assert buckets[1] / 3000 == pytest.approx(0.9, abs=0.022)


def test_a_choice_keeps_the_first_of_each_bucket(tmp_path):
    """The directions and entries read are the chosen ones, and their sum is the masked weight."""
    weight_OI, gram, parts = low_rank_and_sparse()
    ranked = rank_parts(weight_OI, parts, gram, utility="activation", buckets=3)
    counts_B = ranked.bucket_counts_B
    directions_R = torch.zeros(len(ranked.down_RI), dtype=torch.float64)
    directions_R[[0, 2]] = 1
    kept_B = torch.tensor([2.0, 0.0, float(counts_B[2])], dtype=torch.float64)
    mask = CandidateValues(directions_R, kept_B, counts_B).chosen()
    assert mask.drawn(counts_B)[1] == [2, 0, int(counts_B[2])]
    stored = {
        "weight": ranked.weight_OR.T.contiguous(),
        "down": ranked.down_RI.contiguous(),
        "values": ranked.values_N,
        "positions": ranked.positions_N,
    }
    save_file(stored, tmp_path / "stored.safetensors")
    file = StoredFile(tmp_path / "stored.safetensors", torch.device("cpu"))
    found_OI = MaskedParts.read(file, mask).product()
    expected_OI = ranked.weight_OR[:, [0, 2]] @ ranked.down_RI[[0, 2]]
    start = int(counts_B[:2].sum())
    for n in [0, 1, *range(start, len(ranked.values_N))]:
        expected_OI.view(-1)[ranked.positions_N[n].long()] += ranked.values_N[n]
    assert torch.allclose(found_OI.double(), expected_OI, atol=1e-5)


def test_a_worker_receives_the_pass_with_its_shard():
    """Only the worker that opens a shard receives the pass."""
    schedule = ShardPass(
        [range(2), range(2, 4)],
        todo=(),
        num_chunks=1,
        present=[set(), set()],
        results=set(),
        about=("masks",),
    )
    first, second = schedule.calls([0, 1])
    assert first.command == Open((0, 2), about=("masks",))
    assert second.command == Open((2, 4), about=("masks",))
    schedule.succeeded(first)
    (step,) = schedule.calls([0])
    assert step.command == Step(0, emit=True, hand_over=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", blocks=4)


OPTIONS = {"buckets": 8, "samples": 2, "chunks": 2}


def compress_cap(model, out, text, options=None, **fields):
    options = {"cap": OPTIONS | (options or {})}
    return run(model, out, text, method="cap", options=options, **fields)


@pytest.fixture(scope="module")
def reference(llama, text, tmp_path_factory):
    """Result in one process, cut into two shards."""
    out = tmp_path_factory.mktemp("reference") / "out"
    compress_cap(llama, out, text, shards=2)
    return contents(out)


TOKENS = torch.arange(2, 34)[None] * 5 % 96


def test_a_checkpoint_is_written_and_loads(llama, text, tmp_path):
    """At most half of the values; the loaded model is the one of the last loss."""
    result = compress_cap(llama, tmp_path / "out", text, {"iterations": 1})
    values, report = result.report["values"], result.report["cap"]
    assert values["stored"] <= values["budget"] == values["dense_linears"] // 2
    assert values["slack"] == 0
    kept = report["kept"]
    assert kept["direction_values"] + kept["entries"] == values["stored"]
    loaded = orchestrator.load(result.out).eval()
    tokenizer = load_tokenizer(llama)
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"][: 2 * 48]).view(2, 48)
    with torch.no_grad():
        losses = [loaded(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    taken = {"stage 2": "stage2_loss", "initialisation": "initialisation_loss"}[report["taken"]]
    assert np.mean(losses) == pytest.approx(report[taken], rel=1e-4)
    assert report["stage2_loss"] < report["initialisation_loss"] or taken != "stage2_loss"
    for entry in result.report["linears"].values():
        assert {"iterations", "residual", "rank", "density"} <= entry["numerics"].keys()


@pytest.mark.parametrize("shards", [1, 4])
def test_the_cut_changes_no_bit(shards, llama, text, reference, tmp_path):
    """For any cut of the masked passes the output is byte-identical; so is a second run."""
    compress_cap(llama, tmp_path / "out", text, shards=shards)
    assert contents(tmp_path / "out") == reference


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_no_bit(
    workers, llama, text, reference, tmp_path, ray_address
):
    """With 1 and 2 Ray actors the output equals that of one process without Ray."""
    compress_cap(llama, tmp_path / "out", text, executor="ray", workers=workers, shards=2)
    assert contents(tmp_path / "out") == reference


def test_losses_are_not_evaluated_twice(llama, text, reference, tmp_path):
    """A run stopped after some losses continues from them, to the same bytes."""
    lost = []

    def stop(event):
        if event["event"] == "unit" and event["stage"] == "score":
            lost.append(event)
            if len(lost) == 4:
                raise StoppedError("here")

    with pytest.raises(StoppedError):
        compress_cap(llama, tmp_path / "out", text, shards=2, on_event=stop)
    events = []
    compress_cap(llama, tmp_path / "out", text, shards=2, on_event=events.append)
    assert contents(tmp_path / "out") == reference
    units = [e for e in events if e["event"] == "unit" and e["stage"] == "score"]
    assert len(units) == 8 - 4


def test_without_its_second_stage_no_loss_is_evaluated(llama, text, tmp_path):
    """The initialisation alone is the greedy choice by utility, from the same run directory."""
    run_dir = str(tmp_path / "run")
    compress_cap(llama, tmp_path / "both", text, run_dir=run_dir)
    events = []
    first = compress_cap(
        llama, tmp_path / "first", text, {"stage2": False}, run_dir=run_dir, on_event=events.append
    )
    assert not any(e["event"] == "unit" and e["stage"] in ("calibrate", "score") for e in events)
    assert first.report["cap"]["stage2"] is False
    none = compress_cap(llama, tmp_path / "none", text, {"iterations": 0}, run_dir=run_dir)
    assert none.plan == first.plan


def test_another_size_needs_no_second_decomposition(llama, text, tmp_path):
    """A second size chosen from a run directory has the bytes of a direct run."""
    run_dir = str(tmp_path / "run")
    compress_cap(llama, tmp_path / "half", text, run_dir=run_dir)
    events = []
    fields = {"keep": 0.7, "run_dir": run_dir, "on_event": events.append}
    compress_cap(llama, tmp_path / "more", text, **fields)
    assert not any(e["event"] == "unit" and e["stage"] == "calibrate" for e in events)
    compress_cap(llama, tmp_path / "direct", text, keep=0.7)
    assert contents(tmp_path / "more") == contents(tmp_path / "direct")


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.2])
def test_every_budget_is_met(keep, llama, text, tmp_path):
    """Budgets are met from below; with linears that stay dense, the rest is spent to the last
    value."""
    options = {"stage2": False, "across": "absolute"}
    result = compress_cap(llama, tmp_path / "out", text, options, keep=keep)
    values = result.report["values"]
    assert values["stored"] <= values["budget"]
    forms = {entry["form"] for entry in result.report["linears"].values()}
    assert ("dense" in forms) == (keep >= 0.9)
    if keep == 1.0:
        dense = AutoModelForCausalLM.from_pretrained(llama)
        ours = orchestrator.load(result.out)
        assert torch.equal(ours(input_ids=TOKENS).logits, dense(input_ids=TOKENS).logits)


def test_a_budget_in_bytes_is_met(llama, text, tmp_path):
    """Including indices, at most the given bytes are stored, and almost all of them."""
    result = compress_cap(
        llama, tmp_path / "out", text, {"iterations": 1}, keep=None, keep_bytes=0.6
    )
    lazy_model = LazyModel.open(llama)
    linears = lazy_model.survey().linears
    stored = sum(
        result.plan.assignments[each.name].stored_bytes(each, CODECS["float32"]) for each in linears
    )
    dense = 4 * sum(each.values for each in linears)
    assert 0.599 * dense < stored <= 0.6 * dense


@pytest.mark.parametrize("family", ["gpt2", "llama_tied"])
def test_other_families_are_masked_too(family, checkpoint, text, tmp_path):
    """Transposed weights and tied embeddings: the last loss is the loaded model's."""
    model = with_tokenizer(checkpoint(family), tmp_path / "dense")
    options = {"iterations": 1, "samples": 1, "keep_better": False}
    result = compress_cap(model, tmp_path / "out", text, options, keep=0.6)
    loaded = orchestrator.load(result.out).eval()
    ids = torch.tensor(load_tokenizer(model)(text.read_text())["input_ids"][: 2 * 48]).view(2, 48)
    with torch.no_grad():
        losses = [loaded(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    assert np.mean(losses) == pytest.approx(result.report["cap"]["stage2_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "allocation", "said"),
    [
        ("cap", "uniform", "ranks and entries together; it must be one of cap"),
        ("svd-llm", "cap", "divides ranks and entries together"),
        ("wanda", "cap", "divides ranks and entries together"),
    ],
)
def test_its_allocation_needs_its_decomposition(method, allocation, said, llama, text, tmp_path):
    """Its allocation and its decomposition belong together, and the message says so."""
    with pytest.raises(UsageError, match=said):
        run(llama, tmp_path / "out", text, method=method, allocation=allocation)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"buckets": -1}, "whole number"),
        ({"utility": "size"}, "activation, magnitude"),
        ({"solver": "svd"}, "ialm, admm_fixed_mu"),
        ({"bucket": 3}, "near misses"),
    ],
)
def test_the_methods_options_are_checked(options, said, llama, text, tmp_path):
    """Options of method and allocation share one table, and all are known."""
    with pytest.raises(UsageError, match=said):
        compress_cap(llama, tmp_path / "out", text, options)
