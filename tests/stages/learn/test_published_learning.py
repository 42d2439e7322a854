"""The setting of ACIP as published: gates for all directions, and adapters."""

import pytest
import torch
from pipeline import run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orchestrator import load, verify
from orchestrator.errors import UsageError
from orchestrator.linalg.extend import extend_directions
from orchestrator.models.training.adapted import SCALE, Adapter
from orchestrator.models.training.gated import GatedLowRankLinear

PAPER = {"tail": "full", "penalty_by": "count", "adapters": 3}
FAST = {"rate": 0.2, "penalty": 0.002, "growth": 1.5, "growth_every": 1, "batch": 2}
FAST |= {"steps": 30, "every": 2, "stop": 0.5}
TOKENS = torch.arange(2, 34)[None] * 5 % 96


def learned(model, out, text, *, options=None, **fields):
    options = {"learned": FAST | PAPER | (options or {})}
    fields = {"method": "svd", "keep": 0.9} | fields
    return run(model, out, text, allocation="learned", options=options, **fields)


@pytest.fixture(scope="module")
def first(llama3, text, tmp_path_factory):
    """Run in one process and one shard."""
    return learned(llama3, tmp_path_factory.mktemp("first") / "out", text, shards=1)


def units(found, name):
    """Tensors of the files of a name in a run directory, but for the name of the file."""
    return [(path, load_file(path)) for path in sorted(found.run_dir.rglob(name))]


def gated_logits(found, dense):
    """Logits of the dense model with gates, all closed but those that the plan keeps."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    scores, adapters = {}, {}
    for read, name in ((scores, "scores"), (adapters, "adapters")):
        for _, tensors in units(found, f"{name}.safetensors"):
            read |= tensors
    for name, assigned in found.plan.assignments.items():
        ((_, factors),) = units(found, f"{name}.safetensors")
        module, order_K = model.get_submodule(name), scores[f"{name}.order"].long()
        parts = factors["weight"][: len(order_K)].T, factors["down"][: len(order_K)]
        gated = GatedLowRankLinear(*extend_directions(module.weight.detach(), *parts))
        if assigned.form != "dense":
            rank, (outputs, inputs) = PAPER["adapters"], module.weight.shape
            gated.gates_R.data.zero_()[order_K[: assigned.rank - rank]] = 1
            gated.adapter = Adapter((outputs, inputs, rank), torch.Generator(), torch.device("cpu"))
            gated.adapter.left_OA.data = adapters[f"{name}.weight"].T / SCALE
            gated.adapter.right_AI.data = adapters[f"{name}.down"]
            assert bool(gated.adapter.left_OA.any())
        module.forward = gated.forward
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_learning_begins_at_the_dense_model(first, llama3, text, tmp_path):
    """The loss of the first snapshot is that with a tail, which is the dense one to the bit."""
    plain = {"tail": "gate", "adapters": 0, "steps": 1, "below_stop": "allow"}
    found = learned(llama3, tmp_path / "out", text, options=plain)
    losses = [each.report["learn"]["snapshots"][0]["held_out"] for each in (first, found)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert first.report["learn"]["kept"] <= FAST["stop"]


def test_the_written_model_is_the_gated_one(first, llama3):
    """Gates are open that the plan keeps, with adapters, and all of linears that stay dense, which
    have none; both occur. Checks of the files know that errors of the report are estimates."""
    forms = {each.form for each in first.plan.assignments.values()}
    assert forms == {"dense", "low_rank"}
    with torch.no_grad():
        written = load(first.out)(input_ids=TOKENS).logits
    torch.testing.assert_close(gated_logits(first, llama3), written, rtol=0, atol=2e-5)
    assert verify(first.out, against=llama3, linears=20)["problems"] == []


def test_pivoted_adapters_are_sound(llama2, text, tmp_path):
    """Pivoted storage of the cut with its adapter; with a tail, and of another basis."""
    options = {"tail": "gate", "penalty_by": "cost"}
    fields = {"method": "two-sided", "storage": "pivoted", "options": options}
    found = learned(llama2, tmp_path / "out", text, **fields)
    assert verify(found.out, against=llama2, linears=20)["problems"] == []
    ranks = [each.rank for each in found.plan.assignments.values() if each.form == "pivoted"]
    assert min(ranks) > PAPER["adapters"]
    assert bool(load(found.out)(input_ids=TOKENS).logits.isfinite().all())


def test_adapters_leave_a_rank_to_directions(llama2, text, tmp_path):
    """Refused in one line where they do not."""
    with pytest.raises(UsageError, match=r"adapters is 60, and .* ranks below break-even"):
        learned(llama2, tmp_path / "out", text, options={"adapters": 60})
