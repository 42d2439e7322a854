"""Searches for a plan: the course, its resumption, and the losses by which plans are compared."""

import math
import re
import shutil
from pathlib import Path

import pytest
from pipeline import SENTENCES, add_tokenizer, contents, run
from pools import several

from orchestrator import evaluate, retarget
from orchestrator.errors import InfeasibleError, InputError, StoppedError, UsageError
from orchestrator.methods import METHODS
from orchestrator.pages.report import write_report
from orchestrator.plan.forms import FORMS
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.stages.score_plans.job import TriedPlan, told_losses

SMALL = {"sequences": 2, "trials": 6, "batch": 3, "sampler": "tpe"}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    path = tmp_path_factory.mktemp("held") / "held.txt"
    path.write_text((SENTENCES * 4)[101:400])
    return path


@pytest.fixture(scope="module")
def searched(llama3, text, held_out, tmp_path_factory):
    """A search of six plans; tests that change its run take a copy."""
    out, events = tmp_path_factory.mktemp("searched") / "out", []
    return search(llama3, out, text, held_out, on_event=events.append), events


def search(model, out, text, held_out, *, on_event=None, options=None, **fields):
    options = {"search": {**SMALL, "text": str(held_out), **(options or {})}}
    given = {"allocation": "search", "options": options, **fields}
    return run(model, out, text, on_event=on_event, **given)


def losses(events):
    """Units of the scoring stage as they were made: losses of plans."""
    return [each for each in events if each["event"] == "unit" and each["stage"] == "score"]


def test_the_plan_is_the_best_of_all_trials(searched):
    """Never worse than a closed form, and within the budget; the report has every trial."""
    report = searched[0].report["search"]
    found = [each["loss"] for each in report["trials"]]
    assert [each["origin"] for each in report["trials"]] == [
        *("even", "threshold", "threshold by group", "asked", "asked", "asked"),
    ]
    assert report["loss"] == min(found) == found[report["best"]]
    assert report["gains"] == {
        name: loss - min(found)
        for name, loss in zip(("even", "threshold", "threshold by group"), found[:3], strict=True)
    }
    assert min(report["gains"].values()) >= 0
    plan = searched[0].plan
    assert plan.stored_values == report["trials"][report["best"]]["stored"] <= plan.budget_values
    assert report["not_finite"] == 0


def losses_by_evaluation(out, held_out, **given):
    """Mean loss of a checkpoint on the sequences of a search, and its divergence from another."""
    text = {"text": str(held_out), "samples": 2, "sequence_length": 48}
    found = evaluate(out, executor="local", **text, **given)
    return math.log(found["models"]["model"]["perplexity"]), found.get("kl")


METHODS_OF_RANKS = [name for name in METHODS if FORMS[METHODS[name].form].divided == "ranks"]
UNFITTED = {"basis-sharing": {"refit": "never"}}
"""Options without which a later stage changes what the search has measured."""


@pytest.mark.parametrize("method", [name for name in METHODS_OF_RANKS if name != "expert-sharing"])
def test_the_loss_is_that_of_the_written_model(method, llama2, text, held_out, tmp_path):
    """An evaluation of the result has the loss of its plan, for every method with ranks."""
    options = {method: UNFITTED.get(method, {})}
    options["search"] = {**SMALL, "trials": 3, "text": str(held_out)}
    given = {"method": method, "allocation": "search", "options": options, "keep": 0.6}
    result = run(llama2, tmp_path / "out", text, **given)
    loss = result.report["search"]["loss"]
    assert losses_by_evaluation(result.out, held_out)[0] == pytest.approx(loss, abs=1e-5)


def test_a_divergence_from_the_dense_model_counts(llama2, text, held_out, tmp_path):
    """With its weight beside the cross-entropy, both as an evaluation finds them; the text passes
    the dense model once, also for further plans."""
    given = {"keep": 0.6, "shards": 2, "options": {"divergence": 3.0, "trials": 3}}
    result = search(llama2, tmp_path / "out", text, held_out, **given)
    loss, divergence = losses_by_evaluation(result.out, held_out, against=llama2)
    found = result.report["search"]["loss"]
    assert divergence > 0.01
    assert found == pytest.approx(loss + 3 * divergence, abs=1e-5)
    units = {path.parent for path in (tmp_path / "out.run").rglob("targets.safetensors")}
    written = {path: path.stat().st_mtime_ns for path in units}
    given["options"] |= {"trials": 6, "divergence": 0.5}
    more = search(
        llama2, tmp_path / "out2", text, held_out, run_dir=str(tmp_path / "out.run"), **given
    )
    assert len(written) == 2
    assert written == {path: path.stat().st_mtime_ns for path in units}
    one, two = (each.report["search"]["trials"] for each in (result, more))
    ratios = [(a["loss"] - b["loss"]) / 2.5 for a, b in zip(one[:3], two[:3], strict=True)]
    assert min(ratios) > 0.01


def test_workers_do_not_decide_the_course(searched, llama3, text, held_out, tmp_path, monkeypatch):
    """Three workers with a block each give the bytes of one, report included."""
    several(monkeypatch)
    other = search(llama3, tmp_path / "out", text, held_out, shards=3)
    assert contents(other.out) == contents(searched[0].out)


def test_the_batch_decides_the_course(searched, llama3, text, held_out, tmp_path):
    """Four points a batch are others than three."""
    shutil.copytree(f"{searched[0].out}.run", tmp_path / "run")
    given = {"run_dir": str(tmp_path / "run"), "options": {"batch": 4}}
    other = search(llama3, tmp_path / "out", text, held_out, **given)
    one, two = (each.report["search"]["trials"] for each in (searched[0], other))
    assert one[:3] == two[:3]
    assert one[3:] != two[3:]


def stopped(done, model, out, *given, **fields):
    """Search until some plans have losses, and go on; gives the result."""
    events, resumed = [], []

    def stop(event):
        events.append(event)
        if event["event"] == "unit" and len(losses(events)) == done:
            raise StoppedError("enough")

    with pytest.raises(StoppedError):
        search(model, out, *given, on_event=stop, **fields)
    result = search(model, out, *given, on_event=resumed.append, **fields)
    assert len(losses(events)) == done
    assert len(losses(resumed)) == 6 - done
    return result


def test_a_search_that_is_stopped_goes_on_undisturbed(searched, llama3, text, held_out, tmp_path):
    """Stopped between two batches: the bytes of an undisturbed one, no plan is measured twice."""
    result = stopped(3, llama3, tmp_path / "out", text, held_out)
    assert contents(result.out) == contents(searched[0].out)


def test_cut_linears_are_dense_again(moe_checkpoint, text, held_out, tmp_path):
    """Stopped within a batch, so that the plans that follow meet dense weights where an undisturbed
    search has cut them before: the losses of experts that share bases are the same."""
    model = add_tokenizer(shutil.copytree(moe_checkpoint("qwen3_moe"), tmp_path / "dense"))
    given = {"options": {"sampler": "random"}, "keep": 0.8, "method": "expert-sharing"}
    whole = search(model, tmp_path / "whole", text, held_out, **given).report["search"]
    part = stopped(4, model, tmp_path / "part", text, held_out, **given).report["search"]
    assert part == whole
    before, *after = ([kept == 1 for kept in each["kept"]] for each in whole["trials"][3:])
    assert any(now and not then for each in after for then, now in zip(before, each, strict=True))


def test_a_longer_search_goes_on_where_a_shorter_one_ended(
    searched, llama3, text, held_out, tmp_path
):
    """Trials are no input of points and losses: nine begin with the six, which stay measured."""
    shutil.copytree(f"{searched[0].out}.run", tmp_path / "run")
    events, given = [], {"run_dir": str(tmp_path / "run"), "options": {"trials": 9}}
    longer = search(llama3, tmp_path / "out", text, held_out, on_event=events.append, **given)
    one, two = (each.report["search"]["trials"] for each in (searched[0], longer))
    assert two[:6] == one
    assert len(losses(events)) == 3


def test_another_size_is_searched_anew(searched, held_out, tmp_path):
    """No linear is decomposed again; the other size has other plans, all within its budget."""
    shutil.copytree(f"{searched[0].out}.run", tmp_path / "run")
    events = []
    given = {"keep": 0.7, "executor": "local", "on_event": events.append}
    result = retarget(tmp_path / "run", tmp_path / "cut", **given)
    assert not [each for each in events if each["event"] == "unit" and each["stage"] == "calibrate"]
    assert len(losses(events)) == 6
    stored = [each["stored"] for each in result.report["search"]["trials"]]
    assert max(stored) <= result.plan.budget_values
    assert min(stored) > searched[0].plan.budget_values


def test_another_text_is_another_result(searched, llama3, text, held_out, tmp_path):
    """The content of the held-out text, not its name, is in the keys of losses and result."""
    copy = tmp_path / "held.txt"
    copy.write_text(held_out.read_text())
    shutil.copytree(f"{searched[0].out}.run", tmp_path / "run")
    given = {"run_dir": str(tmp_path / "run"), "on_event": (events := []).append}
    same = search(llama3, tmp_path / "out", text, copy, **given)
    assert losses(events) == []
    copy.write_text((SENTENCES * 4)[57:400])
    other = search(llama3, tmp_path / "out2", text, copy, **given)
    assert len(losses(events)) == 6
    assert same.report["search"] == searched[0].report["search"] | {
        "text": same.report["search"]["text"]
    }
    assert other.report["key"] != same.report["key"]


def refused(message, llama3, tmp_path, *given, error=UsageError, **fields):
    """Assert that a search is refused before anything is computed."""
    events = []
    with pytest.raises(error, match=message):
        search(llama3, tmp_path / "out", *given, on_event=events.append, **fields)
    assert not [each for each in events if each["event"] == "unit"]


def test_a_search_needs_held_out_text(llama3, text, held_out, tmp_path):
    """No text, that of the calibration, or one with a sequence of it is refused before any work."""
    refused(r"search\.text=FILE", llama3, tmp_path, text, "")
    refused("is the calibration text", llama3, tmp_path, text, text)
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text())
    refused("sequence 1 of text .*copy.txt is one of", llama3, tmp_path, text, copy)
    nothing = tmp_path / "nothing.txt"
    refused("nothing.txt", llama3, tmp_path, text, nothing, error=InputError)


def test_a_budget_below_every_plan_is_refused_before_any_work(llama3, text, held_out, tmp_path):
    """The smallest kept fraction of linears is known from the survey."""
    given = {"error": InfeasibleError, "keep": 0.15}
    refused(r"0\.2 of every linear", llama3, tmp_path, text, held_out, **given)


def test_a_loss_that_is_not_finite_is_told_as_the_worst():
    """Samplers take finite numbers; plans outside the space are not told."""
    plan = Plan(assignments={"a": Assignment(form="dense")}, budget_values=1, stored_values=1)
    tried = [
        TriedPlan("even", (0.0,), plan, 2.0),
        TriedPlan("threshold", None, plan, 1.0),
        TriedPlan("asked", (1.0,), plan, math.nan),
        TriedPlan("asked", (2.0,), plan, 3.0),
        TriedPlan("asked", (3.0,), plan, math.inf),
    ]
    assert told_losses(tried) == [((0.0,), 2.0), ((1.0,), 3.0), ((2.0,), 3.0), ((3.0,), 3.0)]


def test_the_page_has_every_plan(searched, tmp_path):
    """A row for each, with its loss, and a column for each group; the best one is named."""
    report = searched[0].report["search"]
    page = write_report(Path(searched[0].out), tmp_path / "page.html").read_text()
    (shown,) = re.findall(r"<h2[^>]*>Plans of the search</h2>(.*?)</table>", page, re.DOTALL)
    assert [*re.findall(r'<th scope="col"[^>]*>(.*?)</th>', shown)][4:] == report["groups"]
    rows = re.findall(r"<tr>(.*?)</tr>", shown, re.DOTALL)[1:]
    assert len(rows) == len(report["trials"])
    for row, each in zip(rows, report["trials"], strict=True):
        assert f"{each['loss']:.4f}" in row
    assert f"Plan {report['best'] + 1} has the least loss" in shown
