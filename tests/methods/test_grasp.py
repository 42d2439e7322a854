"""GRASP: directions by gradient, blocks by influence, and the checkpoints without the others."""

import shutil

import numpy as np
import pytest
import torch
from matrices import gaussian, menagerie
from pipeline import contents, run, token_chunks, write_llama, write_text
from pools import several
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orchestrator import retarget
from orchestrator.api import plan
from orchestrator.errors import InfeasibleError, InputError, UsageError
from orchestrator.linalg.cosine import Cosine
from orchestrator.linalg.gradients import DirectionGradients
from orchestrator.linalg.low_rank import InputGram
from orchestrator.methods import make_method
from orchestrator.recipe.recipe import make_recipe

SPECIMENS = menagerie()


def decomposed(name, **options):
    """Factors of a specimen with three sequences, its h by sequence, and its left vectors."""
    specimen = SPECIMENS[name]
    weight_OI = specimen.weight_OI
    outputs, inputs = weight_OI.shape
    directions, total = DirectionGradients(weight_OI), []
    for seed in (3, 4, 5):
        inputs_TI, grads_TO = gaussian(7, inputs, seed=seed), gaussian(7, outputs, seed=seed + 9)
        directions.update(directions.images(inputs_TI), grads_TO)
        total.append(grads_TO.T @ inputs_TI)
    directions.settle()
    statistic = InputGram(specimen.gram_II, gradient=directions)
    method = make_method("grasp", options)
    found = method.decompose(weight_OI, statistic, min(outputs, inputs))
    return specimen, found, total


@pytest.mark.parametrize("name", SPECIMENS)
def test_all_directions_in_their_order_are_the_weight(name):
    """At full rank U Uᵀ W is W for any weight, U is orthonormal, energies descend and end at the
    total, and errors of the outputs are those of every cut."""
    specimen, found, _ = decomposed(name)
    weight_OI, size = specimen.weight_OI, min(specimen.weight_OI.shape)
    scale = float(weight_OI.norm())
    torch.testing.assert_close(
        found.weight_OR @ found.down_RI, weight_OI, rtol=0, atol=1e-9 * scale
    )
    eye_KK = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(found.weight_OR.T @ found.weight_OR, eye_KK, rtol=0, atol=1e-9)
    assert found.report["orthonormality"] < 1e-9
    assert bool((found.energies_K.diff() <= 0).all())
    assert found.total == pytest.approx(float(found.energies_K.sum()))
    for rank in (0, 1, size // 2):
        left = found.activation_total - float(found.activation_R[:rank].sum())
        cut_OI = found.weight_OR[:, :rank] @ found.down_RI[:rank]
        assert left == pytest.approx(specimen.loss(cut_OI), rel=1e-6, abs=1e-9 * scale**2)


@pytest.mark.parametrize("aggregate", ["square", "signed"])
@pytest.mark.parametrize("importance", ["taylor", "gradient"])
@pytest.mark.parametrize("name", ["tall", "wide", "square"])
def test_a_prefix_has_the_most_important_directions(name, importance, aggregate):
    """Importances are Σ h² or |Σ h| of h = u_iᵀ G Wᵀ u_i, or of h / S, by a plain SVD."""
    specimen, found, gradients = decomposed(name, importance=importance, aggregate=aggregate)
    weight_OI = specimen.weight_OI
    u_OK, value_K, _ = torch.linalg.svd(weight_OI, full_matrices=False)
    h_SK = torch.stack([torch.sum(u_OK * (g @ weight_OI.T @ u_OK), dim=0) for g in gradients])
    if importance == "gradient":
        h_SK = h_SK / value_K
    expected_K = h_SK.square().sum(dim=0) if aggregate == "square" else h_SK.sum(dim=0).abs()
    order_K = expected_K.argsort(descending=True)
    torch.testing.assert_close(found.energies_K, expected_K[order_K], rtol=1e-6, atol=0)
    overlap_K = torch.sum(found.weight_OR * u_OK[:, order_K], dim=0).abs()
    torch.testing.assert_close(overlap_K, torch.ones_like(overlap_K), rtol=1e-6, atol=0)


def test_an_undefined_cosine_counts_as_half():
    """A zero vector, and values that overflow, count as 0.5 of a block; others are as before."""
    rows_TC = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3e38, 3e38], [1.0, -1.0]])
    after_TC = torch.tensor([[2.0, 4.0], [1.0, 1.0], [-3e38, 3e38], [1.0, 1.0]])
    halves = Cosine(undefined=0.5).update(rows_TC, after_TC)
    assert halves.mean == pytest.approx((1 + 0.5 + 0.5 + 0) / 4, abs=1e-6)
    defined = [
        Cosine(undefined=each).update(rows_TC[:1], after_TC[:1]).mean for each in (None, 0.5)
    ]
    assert defined[0] == defined[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama5") / "dense", blocks=5, hidden=32)


@pytest.fixture(scope="module")
def grasped(llama, text, tmp_path_factory):
    """The result at 0.8 in one shard and one process; not to be changed."""
    out = tmp_path_factory.mktemp("grasped") / "out"
    return run(llama, out, text, method="grasp", keep=0.8, shards=1)


def test_the_blocks_that_change_the_stream_least_are_cut(grasped, llama, text):
    """Influences in the report are 1 − cos of the whole model's states, and the two blocks with
    the least of five are the ones with factors, which share what the others leave."""
    whole = AutoModelForCausalLM.from_pretrained(llama)
    seen = []
    whole.model.layers[-1].register_forward_hook(lambda module, given, state: seen.append(state))
    apart = []
    for chunk in token_chunks(llama, text):
        with torch.no_grad():
            found = whole(input_ids=chunk.tokens, output_hidden_states=True).hidden_states
        states = torch.cat([*found[:-1], seen.pop()]).double()
        apart.append(1 - torch.cosine_similarity(states[:-1], states[1:], dim=-1))
    expected = torch.cat(apart, dim=1).mean(dim=1).tolist()
    redundancy = grasped.report["redundancy"]
    assert [*redundancy["influences"].values()] == pytest.approx(expected, rel=1e-4)
    assert redundancy["cut_blocks"] == sorted(np.argsort(expected)[:2].tolist())
    for name, entry in grasped.report["linears"].items():
        is_cut = int(name.split(".")[2]) in redundancy["cut_blocks"]
        assert entry["form"] == ("low_rank" if is_cut else "dense")
    assert 0.795 < grasped.report["kept"]["linears"] <= 0.8


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_shards_change_no_bit(workers, grasped, llama, text, tmp_path, monkeypatch):
    """One worker with three shards, and three workers, write the same bytes."""
    several(monkeypatch, size=workers)
    run(llama, tmp_path / "out", text, method="grasp", keep=0.8, shards=3)
    assert contents(tmp_path / "out") == contents(grasped.out)


def test_another_size_or_allocation_needs_no_gradient(grasped, llama, text, tmp_path):
    """A size by one threshold over all blocks, from the run with redundant ones, is that of a run
    of its own, and computes no block again."""
    events = []
    run_dir = shutil.copytree(grasped.run_dir, tmp_path / "run")
    fields = {"allocation": "threshold", "keep": 0.6, "executor": "local"}
    retarget(run_dir, tmp_path / "size", on_event=events.append, **fields)
    assert not [e for e in events if e["event"] == "unit" and e["stage"] == "calibrate"]
    direct = run(llama, tmp_path / "direct", text, method="grasp", **fields)
    weights = [load_file(tmp_path / out / "model.safetensors") for out in ("size", "direct")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(each, weights[1][name]) for name, each in weights[0].items())
    assert "redundancy" not in direct.report
    forms = {entry["form"] for entry in direct.report["linears"].values()}
    assert forms == {"low_rank", "dense"}


def test_other_labels_and_options_are_other_results(grasped, llama, text, tmp_path):
    """Published labels are another statistic, signed sums another order of the same one; seeds
    have no part in either."""
    weights = contents(grasped.out)["model.safetensors"]
    for name, options in {"labels": "after_next", "aggregate": "signed", "seed": None}.items():
        fields = {"options": {"grasp": {name: options}}} if options else {"seed": 5}
        found = run(llama, tmp_path / name, text, method="grasp", keep=0.8, shards=1, **fields)
        same = contents(found.out)["model.safetensors"] == weights
        assert same == (name == "seed")


def test_other_methods_may_cut_redundant_blocks_alone(grasped, llama, text, tmp_path):
    """With another method's directions the same blocks are cut; the default runs of that method
    compute no such cosines, and so are not taken for these."""
    fields = {"method": "svd", "keep": 0.8, "run_dir": str(tmp_path / "run")}
    plain = run(llama, tmp_path / "plain", text, **fields)
    found = run(llama, tmp_path / "out", text, allocation="grasp", **fields)
    redundancy, expected = (each.report["redundancy"] for each in (found, grasped))
    assert redundancy["cut_blocks"] == expected["cut_blocks"]
    assert [*redundancy["influences"].values()] == pytest.approx(
        [*expected["influences"].values()], rel=1e-5
    )
    assert "redundancy" not in plain.report


def test_a_linear_without_a_gradient_is_named(llama, text, tmp_path):
    """A weight of zeros has no gradient by its directions: the run ends with its name, and
    `ignore` leaves it out."""
    model, name = shutil.copytree(llama, tmp_path / "dense"), "model.layers.1.mlp.up_proj"
    tensors = load_file(model / "model.safetensors")
    tensors[f"{name}.weight"].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    # its zeros are the inputs of down_proj
    fields = {"method": "grasp", "keep": 0.9, "ignore": ("*1.mlp.down_proj", "*1.mlp.gate_proj")}
    with pytest.raises(InputError, match=rf"{name}: its gradient is zero, .* does not depend"):
        run(model, tmp_path / "out", text, **fields)
    fields["ignore"] = (*fields["ignore"], name)
    assert name in run(model, tmp_path / "rest", text, **fields).report["not_targeted"]


def test_more_blocks_than_the_model_has_are_refused_before_calibration(llama, text, tmp_path):
    """Five blocks cannot be cut in six; nothing was calibrated."""
    events = []
    with pytest.raises(UsageError, match=r"blocks is 6, .* in 5 blocks"):
        run(
            *(llama, tmp_path / "out", text),
            method="grasp",
            options={"grasp": {"blocks": 6}},
            on_event=events.append,
        )
    assert not [each for each in events if each.get("stage") == "calibrate"]


def test_a_forecast_refuses_what_a_run_would(llama):
    """Too many blocks, and two blocks of five at a budget below the other three, fail in `plan`;
    one that is met is forecast with a backward pass."""
    asked = {"model": str(llama), "out": "o", "method": "grasp", "samples": 6}
    for blocks, error, keep in ((6, UsageError, 0.8), (2, InfeasibleError, 0.55)):
        options = {"grasp": {"blocks": blocks}}
        with pytest.raises(error, match="blocks"):
            plan(make_recipe({**asked, "options": options, "keep": keep}))
    found, plain = (
        plan(make_recipe({**asked, "sequence_length": 48, "keep": 0.8, "method": name}))
        for name in ("grasp", "svd")
    )
    seconds = [each.stages[0].seconds["data_sheet"] for each in (found, plain)]
    assert seconds[0] > 1.2 * seconds[1]
