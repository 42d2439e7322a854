"""The path of thresholds as a part of a run, and the gains of a snapshot."""

import json

import pytest
import torch
from pipeline import contents, run
from safetensors.torch import load_file

from orchestrator import load, retarget, verify
from orchestrator.cli.main import main
from orchestrator.errors import UsageError
from orchestrator.plan.result import REPORT_FILE

FAST = {"stop": 0.5, "step": 0.02, "batch": 2, "every": 2}
TOKENS = torch.arange(2, 34)[None] * 5 % 96


def followed(model, out, text, *, options=None, **fields):
    options = {"path": FAST | (options or {})}
    fields = {"method": "two-sided", "keep": 0.7} | fields
    return run(model, out, text, allocation="path", options=options, **fields)


@pytest.fixture(scope="module")
def first(llama3, text, tmp_path_factory):
    """Run in one process and one shard."""
    return followed(llama3, tmp_path_factory.mktemp("first") / "out", text, shards=1)


def test_a_size_has_the_gains_of_its_snapshot(first, llama3, text, tmp_path):
    """Without gains the plan of the same scores cuts the decompositions; with them each direction
    of its left factors is a multiple of those, by another factor at another snapshot."""
    plain = followed(llama3, tmp_path / "plain", text, options={"gains": "no"}, keep=0.5)
    gained = retarget(first.run_dir, tmp_path / "gained", keep=0.5, executor="local")
    name = next(n for n, each in gained.plan.assignments.items() if each.form != "dense")
    rank = min(each.plan.assignments[name].rank for each in (plain, gained))
    factors = [load_file(each.out / "model.safetensors") for each in (plain, gained)]
    left, scaled = (each[f"{name}.weight"][:, :rank].float() for each in factors)
    gains = (scaled * left).sum(0) / left.square().sum(0)
    torch.testing.assert_close(scaled, left * gains, rtol=0, atol=0.01 * float(left.abs().max()))
    assert (gains - 1).abs().max() > 0.001
    assert "gains" not in plain.report["learn"]


def test_lost_gains_are_learned_again(first, llama3, text, tmp_path):
    """Scores are there and the gains of the size are not."""
    found = followed(llama3, tmp_path / "out", text)
    units = [each.parent for each in (tmp_path / "out.run").rglob("scores.safetensors")]
    for unit in units:
        if not any(".order" in key for key in load_file(unit / "scores.safetensors")):
            (unit / "scores.safetensors").unlink()
    again = followed(llama3, tmp_path / "again", text, run_dir=found.run_dir)
    assert contents(again.out) == contents(first.out)


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
def test_cuts_of_a_path_are_sound(storage, llama2, text, tmp_path):
    """Errors in the report are not compared where gains change them; logits are finite."""
    found = followed(llama2, tmp_path / "out", text, storage=storage)
    assert verify(found.out, against=llama2, linears=20)["problems"] == []
    assert bool(load(found.out)(input_ids=TOKENS).logits.isfinite().all())


def test_sizes_and_methods_that_are_refused(first, llama3, text, tmp_path):
    """Below the end of the path, and curves in another unit than nats."""
    with pytest.raises(UsageError, match=r"0.4 is below 0.5, where path.stop ends the learning"):
        retarget(first.run_dir, tmp_path / "small", keep=0.4, executor="local")
    with pytest.raises(UsageError, match="needs curves in nats, and those of svd-llm are not"):
        followed(llama3, tmp_path / "other", text, method="svd-llm")
    with pytest.raises(UsageError, match=r"keep_flops is 0\.8, but path"):
        followed(llama3, tmp_path / "flops", text, keep=None, keep_flops=0.8)


def test_a_size_below_the_path_may_be_extrapolated(first, tmp_path):
    """By the corrected curves of its end, if that is asked for; other options are the run's."""
    command = ["retarget", str(first.run_dir), str(tmp_path / "out"), "--keep", "0.4"]
    assert main([*command, "--executor", "local", "--option", "path.below_stop=allow"]) == 0
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["learn"]["extrapolated"]
    assert report["learn"]["gains_of"] == report["learn"]["kept"]
    assert report["recipe"]["options"] == {"path": FAST | {"below_stop": "allow"}}
