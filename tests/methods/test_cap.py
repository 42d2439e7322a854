"""CAP: projection onto the budget, unbiased estimator, choice of candidates, and whole runs."""

import pytest
import torch
from safetensors.torch import save_file

from orchestrator.errors import InputError
from orchestrator.linalg.gram import Gram
from orchestrator.linalg.low_rank import InputGram
from orchestrator.linalg.ranked import RIDGES, SKETCH, rank_parts, sketched_energy
from orchestrator.linalg.sparsity.rpca import rpca
from orchestrator.methods.kinds.ranked import CandidateValues, MaskedParts
from orchestrator.runtime.calls import Open, Step
from orchestrator.runtime.shard_pass import ShardPass
from orchestrator.stages.context.worker.stored import StoredFile


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
