"""Kinds of result: facts, stored tensors, reading back, and errors, for every method."""

import json

import pytest
import torch
from matrices import gaussian, of_model
from safetensors.torch import save_file

from orchestrator.linalg.low_rank import Curvature, InputGram
from orchestrator.methods import METHODS
from orchestrator.methods.kinds.low_rank import LOW_RANK
from orchestrator.methods.kinds.ranked import RANKED, CandidateValues, MaskedParts
from orchestrator.methods.kinds.sparse import SPARSE
from orchestrator.plan.linear import Linear
from orchestrator.plan.plan import Assignment
from orchestrator.stages.context.worker.stored import StoredFile, host_tensors

OUTPUTS, INPUTS = 14, 10
LINEAR = Linear(
    name="a", block=0, role="a", site="a", out_features=OUTPUTS, in_features=INPUTS, has_bias=False
)
FACTORED = ("svd", "asvd", "svd-llm", "svd-llm-v2", "basis-sharing", "d-rank", "mgaa", "two-sided")


@pytest.fixture
def specimen():
    return of_model(OUTPUTS, INPUTS)


@pytest.fixture
def decomposed(specimen, tmp_path):
    """Decomposes the specimen by a method: kind, facts after JSON, and the stored file."""

    def decompose(name):
        method, weight_OI = METHODS[name], specimen.weight_OI.clone()
        rows_TK = gaussian(2 * OUTPUTS, OUTPUTS, seed=3)
        if not method.output_curvature:
            rows_TK = rows_TK @ weight_OI
        statistic = InputGram(
            specimen.gram_II,
            magnitude_I=specimen.inputs_TI.abs().mean(dim=0),
            curvature=Curvature(rows_TK.T @ rows_TK, len(rows_TK)),
            gradient=specimen.gradient(method.gradient),
            means=specimen.means(),
        )
        kind, result = method.kind, method.decompose(weight_OI, statistic, INPUTS)
        path = tmp_path / f"{name}.safetensors"
        save_file(host_tensors(kind, result, torch.float64), path)
        facts = json.loads(json.dumps(kind.facts("a", weight_OI, result)))
        return kind, facts, StoredFile(path, torch.device("cpu"))

    return decompose


def relative_errors(specimen, weight_OI):
    """Errors of outputs and weight as they are defined."""
    gap_OI = specimen.weight_OI - weight_OI.double()
    zero_OI = torch.zeros_like(gap_OI)
    return {
        "activation_error": specimen.loss(weight_OI) / specimen.loss(zero_OI),
        "weight_error": float(gap_OI.square().sum() / specimen.weight_OI.square().sum()),
    }


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.expert_activations])
def test_the_curve_is_named_after_the_linear(name, decomposed):
    """The facts are JSON, and every kind reads its own curve from them."""
    kind, facts, _ = decomposed(name)
    assert facts["curve"]["name"] == "a"
    assert "numerics" in facts
    assert kind.curve(facts) is not None


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("name", FACTORED)
def test_factors_have_the_errors_that_the_facts_predict(name, rank, specimen, decomposed):
    """The product of both factors, read back at a rank, loses what the driver computes."""
    kind, facts, stored = decomposed(name)
    sizes, every = {"rank": rank, "nonzeros": 0}, range(OUTPUTS)
    weight_OR = kind.factor(stored, "weight", every, **sizes)
    down_RI = kind.factor(stored, "down", None, **sizes)
    assert (weight_OR.shape, down_RI.shape) == ((OUTPUTS, rank), (rank, INPUTS))
    assert weight_OR.is_contiguous()
    found = kind.errors(facts, LINEAR, Assignment(form="low_rank", rank=rank))
    assert found == pytest.approx(relative_errors(specimen, weight_OR @ down_RI), rel=1e-6)
    part_PR = kind.factor(stored, "weight", range(3, 8), **sizes)
    assert torch.equal(part_PR, weight_OR[3:8])


@pytest.mark.parametrize("name", ["wanda", "two-sided-sparse"])
def test_entries_come_by_ascending_position(name, specimen, decomposed):
    """Entries alone; at a measured density the errors are those of the entries kept."""
    kind, facts, stored = decomposed(name)
    nonzeros = OUTPUTS * INPUTS // 2
    values_N, positions_N = kind.entries(stored, rank=0, nonzeros=nonzeros)
    assert len(values_N) == nonzeros
    assert bool((positions_N.diff() > 0).all())
    weight_OI = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    weight_OI.view(-1)[positions_N.long()] = values_N.double()
    found = kind.errors(facts, LINEAR, Assignment(form="sparse", nonzeros=nonzeros))
    if name == "wanda":
        assert found == pytest.approx(relative_errors(specimen, weight_OI), rel=1e-4)
    else:
        # fitting the entries has lowered the loss of the outputs below the measured one
        assert relative_errors(specimen, weight_OI)["activation_error"] < 1
        assert 0 < found["activation_error"] < 1


def test_a_mask_that_keeps_everything_loses_nothing(decomposed):
    """The errors of kept parts are relative to all parts; those that a file measured are told."""
    _, facts, stored = decomposed("cap")
    counts_B = torch.tensor(facts["curve"]["bucket_counts"])
    ranks = len(facts["curve"]["direction_utilities"])
    whole = CandidateValues(torch.ones(ranks), counts_B.double(), counts_B).chosen()
    assert MaskedParts.read(stored, whole).errors(stored) == {
        "weight_error": 0.0,
        "activation_error": 0.0,
    }
    none = CandidateValues(torch.zeros(ranks), 0.0 * counts_B, counts_B).chosen()
    assert MaskedParts.read(stored, none).errors(stored)["weight_error"] == pytest.approx(1.0)
    assigned = Assignment(form="low_rank_sparse", rank=1, nonzeros=1)
    measured = facts | {"activation_error": 0.25}
    assert RANKED.errors(measured, LINEAR, assigned) == {
        "activation_error": 0.25,
        "weight_error": None,
    }


def test_a_kind_says_which_parts_it_lacks(decomposed):
    """A plan that asks entries of factors, or factors of entries, is refused."""
    _, _, stored = decomposed("svd")
    with pytest.raises(ValueError, match="LowRankKind has no entries"):
        LOW_RANK.entries(stored, rank=1, nonzeros=1)
    with pytest.raises(ValueError, match="SparseKind has no factors; 'down' was asked for"):
        SPARSE.factor(stored, "down", range(OUTPUTS), rank=1, nonzeros=0)
