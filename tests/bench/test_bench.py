"""`bench`: times in turn, limits of the machine, and reasons why a linear is slower."""

import json

import pytest
import torch
from pipeline import run, write_llama
from torch import nn

import orchestrator
from orchestrator.bench.benchmark import with_reasons
from orchestrator.bench.linears import role_of, typical
from orchestrator.bench.models import least_seconds
from orchestrator.bench.reasons import MeasuredLinear, reasons
from orchestrator.bench.roofline import Roofline
from orchestrator.cli.main import main
from orchestrator.device.timing import LEAST_ROUNDS, MOST_ROUNDS, Stopwatch, Times, in_turn
from orchestrator.pages.report import rendered_report

CPU = torch.device("cpu")
NOT_EXPLAINED = "not explained by rates, calls, rank or form"
LIMITS = Roofline(flops=1e12, bandwidth=1e10, itemsize=2)
"""A machine that computes 1e12 operations, and reads 5e9 values, in a second."""


def test_computations_are_measured_in_turn():
    """One uncounted call each, then rounds whose order is reversed every time."""
    called = []
    found = in_turn({name: lambda n=name: called.append(n) for name in "abc"}, CPU)
    rounds = [called[start : start + 3] for start in range(0, len(called), 3)]
    assert rounds == [[*"abc"], *([*"abc"], [*"cba"]) * MOST_ROUNDS][: 1 + MOST_ROUNDS]
    assert {len(each.seconds) for each in found.values()} == {MOST_ROUNDS}


def test_short_computations_are_repeated_within_a_round(monkeypatch):
    """As often as fill the least time of a round; and long ones end after a few rounds."""
    called = []
    in_turn({"a": lambda: called.append("a")}, CPU, least=1e-3)
    assert len(called) > 10 * MOST_ROUNDS
    monkeypatch.setattr("orchestrator.device.timing.ENOUGH_SECONDS", 0.0)
    assert len(in_turn({"a": lambda: None}, CPU)["a"].seconds) == LEAST_ROUNDS


def test_one_thread_of_a_processor_is_measured_by_its_own_time(monkeypatch):
    """Waiting takes no processor time; with more threads it is time that passes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert Stopwatch(CPU).is_processor
    assert Stopwatch(CPU).seconds(lambda: __import__("time").sleep(0.05)) < 0.04
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not Stopwatch(CPU).is_processor
    assert Stopwatch(CPU).seconds(lambda: __import__("time").sleep(0.05)) >= 0.05


def test_the_spread_is_that_of_the_middle_half():
    """Quarters of 1, 2, 3, 4, 5 are 2 and 4, around the median 3."""
    times = Times((5.0, 1.0, 4.0, 2.0, 3.0))
    assert (times.median, times.spread) == (3.0, pytest.approx(2 / 3))
    assert Times((2.0,)).spread == 0


def test_the_least_time_is_the_longer_of_computing_and_reading():
    """5e6 values are read in 1 ms; they take 2 T 5e6 operations, as much at 100 tokens."""
    assert LIMITS.seconds(1, 5e6) == pytest.approx(1e-3)
    assert LIMITS.seconds(100, 5e6) == pytest.approx(1e-3)
    assert LIMITS.seconds(1000, 5e6) == pytest.approx(1e-2)
    assert LIMITS.seconds(1, 5e6, moved=5e6) == pytest.approx(2e-3)
    assert LIMITS.copied(5e6) == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("changes", "calls", "kind"),
    [
        ({"dense": 2.0}, 0.0, None),
        ({"form": "sparse", "rank": 0}, 0.0, "form"),
        # 1.9e6 of 4.2e6 values less are read in 0.4 ms
        ({}, 1e-3, "launch-bound"),
        ({"rank": 510}, 0.0, "rank"),
        ({"form": "pivoted", "rank": 512, "out_features": 2040}, 0.0, "rank"),
        # 8 is the multiple of narrow linears
        ({"out_features": 192, "rank": 104, "values": 10}, 0.0, NOT_EXPLAINED),
        ({"values": 4_000_000}, 0.0, "too small"),
        ({"form": "pivoted", "tokens": 100}, 0.0, "order"),
        ({"spread": 0.6}, 0.0, "noise"),
        ({}, 0.0, NOT_EXPLAINED),
    ],
)
def test_a_slower_linear_has_a_reason(changes, calls, kind):
    """Each condition alone gives its reason first; a faster linear needs none."""
    plain = {"out_features": 2048, "in_features": 2048, "form": "low_rank", "rank": 512}
    plain |= {"values": 512 * 4096, "tokens": 8, "dense": 1.0, "compressed": 1.5, "spread": 0.1}
    if "tokens" in changes:
        plain["values"] = 2048**2 * 9 // 10
    found = reasons(MeasuredLinear(**(plain | changes)), LIMITS, calls)
    assert [each.partition(":")[0] for each in found] == ([] if kind is None else [kind])


def test_a_slower_model_has_the_reasons_of_its_linears():
    """At as many tokens as it passes, by kind, with their number."""
    row = {"phase": "prefill", "batch": 2, "length": 8, "speed": 0.5, "models": {}}
    linears = [
        {"tokens": 16, "count": 3, "why": ["rank: 7", "noise: much"]},
        {"tokens": 16, "count": 1, "why": ["rank: 5"]},
        {"tokens": 2, "count": 4, "why": ["form: sparse"]},
    ]
    found = with_reasons(row, linears)["why"]
    assert found == ["rank (4 of 4 linears)", "noise (3 of 4 linears)"]
    assert with_reasons({**row, "phase": "decode"}, linears)["why"] == ["form (4 of 4 linears)"]
    assert with_reasons({**row, "speed": 1.5}, linears)["why"] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense model, a compressed one, and the times of both."""
    place = tmp_path_factory.mktemp("bench")
    write_llama(place / "dense", blocks=2)
    (place / "text.txt").write_text(
        "The river ran past seven mills before it came to the sea. " * 9
    )
    few = {"samples": 2, "sequence_length": 16, "keep": 0.6, "storage": "pivoted"}
    run(place / "dense", place / "out", place / "text.txt", **few)
    return place


@pytest.fixture(scope="module")
def measured(place):
    return orchestrator.api.bench(
        place / "out", against=place / "dense", batch=(1, 3), length=(16,)
    )


def test_times_speeds_and_bounds_agree(measured):
    """Tokens a second are those passed over the seconds, and the speed is the ratio of seconds; no
    linear has a least time above the dense one's, and each slower one has a reason."""
    assert [(r["phase"], r["batch"]) for r in measured["whole"]] == [
        *(("prefill", 1), ("decode", 1), ("prefill", 3), ("decode", 3))
    ]
    for row in measured["whole"]:
        passed = row["batch"] * (16 if row["phase"] == "prefill" else 1)
        ours, dense = row["models"]["model"], row["models"]["against"]
        assert ours["tokens_per_second"] == pytest.approx(passed / ours["seconds"])
        assert row["speed"] == pytest.approx(dense["seconds"] / ours["seconds"])
        assert bool(row["why"]) == (row["speed"] < 1)
    assert {row["tokens"] for row in measured["linears"]} == {1, 3, 16, 48}
    for row in measured["linears"]:
        assert row["form"] == "pivoted"
        assert row["least_seconds"] > 0
        assert row["speed"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        assert bool(row["why"]) == (row["speed"] < 1)
    assert sum(row["count"] for row in measured["linears"] if row["tokens"] == 1) == 14


def test_the_linear_of_a_role_is_the_one_of_median_rank(place):
    """Roles are names within a block; the number is that of all of one role and shape."""
    assert role_of("model.layers.11.mlp.experts.3.down_proj") == "down_proj"
    assert role_of("model.layers.0.self_attn.q_proj") == "self_attn.q_proj"
    model = orchestrator.load(place / "out")
    for (role, *_), (module, count) in typical(model).items():
        ranks = sorted(m.rank for n, m in model.named_modules() if role_of(n) == role)
        assert (count, module.rank) == (len(ranks), ranks[len(ranks) // 2])


def test_the_least_time_of_a_model_is_the_sum_of_its_linears():
    """Two linears, each computed by hand; without a head all pass the tokens of blocks."""
    tower = nn.Sequential(nn.Linear(1000, 500), nn.Linear(500, 2000))
    by_hand = sum(LIMITS.seconds(7, v, 7 * m) for v, m in ((500_000, 1500), (1_000_000, 2500)))
    assert least_seconds(tower, 7, 1, LIMITS) == pytest.approx(by_hand)


def test_the_page_and_the_file_have_the_times(place, measured, capsys):
    """The file beside the checkpoint is what was returned; the page shows it."""
    written = json.loads((place / "out.bench.json").read_text())
    assert {**written, "file": measured["file"]} == measured
    page = str(rendered_report(place / "out"))
    assert "Speed" in page
    assert "self_attn.q_proj 64 × 64" in page
    assert main(["bench", str(place / "out"), "--batch", "2", "--length", "4"]) == 0
    shown, said = capsys.readouterr()
    assert "dense, us  model, us  least, us" in shown
    assert "Loading weights" not in said
    assert "prefill, 2 x 4" in shown
    assert "self_attn.q_proj 64 x 64" in shown


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (["--batch", "0"], 2, "batch is"),
        (["--length", "60"], 4, "64 positions"),
        (["--threads", "0"], 2, "threads is"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(place, given, code, says, capsys):
    """Before anything is measured."""
    assert main(["bench", str(place / "out"), *given]) == code
    assert says in capsys.readouterr().err
