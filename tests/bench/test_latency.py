"""`bench --latency-table`: what is measured, and the file that `compress` reads."""

import json

import pytest
import torch
from pipeline import write_llama
from torch import nn

from orchestrator.bench import latency
from orchestrator.bench.latency import grid_of, measure_latency
from orchestrator.cli.main import main
from orchestrator.models.forms.low_rank import LowRankLinear
from orchestrator.models.forms.pivoted import PivotedLinear
from orchestrator.plan.allowed_ranks import AllowedRanks
from orchestrator.plan.forms import LOW_RANK, PIVOTED
from orchestrator.plan.latency_table import read_latency_table
from orchestrator.plan.linear import Linear


def linear_of(out_features, in_features):
    sizes = {"out_features": out_features, "in_features": in_features, "has_bias": False}
    return Linear(name="a", block=0, role="a", site="a", **sizes)


@pytest.mark.parametrize("form", [LOW_RANK, PIVOTED], ids=lambda form: form.name)
@pytest.mark.parametrize("shape", [(2048, 5632), (576, 576), (64, 192), (20, 9)])
def test_measured_ranks_are_allowed_ones(shape, form):
    """Multiples from the first to the last that is allowed, at most twelve."""
    linear = linear_of(*shape)
    found, allowed = grid_of(linear, form), AllowedRanks(form, "auto").of(linear).tolist()
    assert (found[0], found[-1]) == (allowed[0], allowed[-1])
    assert set(found) <= set(allowed)
    assert len(found) == min(len(allowed), latency.MOST_RANKS) == len({*found})


def test_measured_modules_are_those_of_a_model(monkeypatch):
    """Each variant alternates between copies that lie apart; factors have as many values as the
    form states, pivoted ones an order that names every output once."""
    called = []

    def in_turn(runs, device, least):
        for name, work in runs.items():
            for _ in range(3):
                called.append((name, work()))
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "in_turn", in_turn)
    monkeypatch.setattr(latency, "POOL_BYTES", 4 * 4 * 48 * 64)
    made = []
    for kind in (nn.Linear, LowRankLinear, PivotedLinear):
        monkeypatch.setattr(kind, "__call__", lambda module, x: made.append((module, x.shape)))
    with pytest.raises(KeyboardInterrupt):
        measure_latency([linear_of(48, 64)], tokens=5, dtype=torch.float32, threads=1)
    assert [name for name, _ in called][:3] == ["dense"] * 3
    for (name, _), (module, shape) in zip(called, made, strict=True):
        assert shape == (5, 64)
        form, _, rank = name.partition(" ")
        values = sum(p.numel() for p in module.parameters())
        if form == "dense":
            assert values == 48 * 64
        else:
            sizes = {"low_rank": LOW_RANK, "pivoted": PIVOTED}[form]
            assert values == sizes.factor_values(linear_of(48, 64), int(rank))
        if form == "pivoted":
            assert module.is_sound()
    first, second, third = (module.weight.data_ptr() for module, _ in made[:3])
    assert len({first, second, third}) == 3


def test_the_file_is_what_compress_reads(tmp_path, capsys, monkeypatch):
    """Every shape of the model once, with its number; the times are those of the file."""
    monkeypatch.setattr(latency, "MOST_RANKS", 3)
    monkeypatch.setattr(latency, "POOL_BYTES", 2**20)
    write_llama(tmp_path / "dense", blocks=2)
    file = tmp_path / "table.json"
    given = ["bench", str(tmp_path / "dense"), f"--latency-table={file}", "--tokens=2"]
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert "192 x 64" in shown
    assert "cpu, 1 thread, float32, 2 tokens, processor time" in shown
    table, value = read_latency_table(str(file)), json.loads(file.read_text())
    assert {shape: entry.dense for shape, entry in table.shapes.items()} == {
        tuple(entry["shape"]): entry["dense_seconds"] for entry in value["linears"]
    }
    counts = {tuple(entry["shape"]): entry["count"] for entry in value["linears"]}
    assert counts == {(64, 64): 4, (32, 64): 4, (192, 64): 4, (64, 192): 2}
    for shape, entry in table.shapes.items():
        for form in (LOW_RANK, PIVOTED):
            assert entry.forms[form.name][0].tolist() == grid_of(linear_of(*shape), form)
            assert entry.forms[form.name][1].min() > 0


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--latency-table=t.json", "--batch=1"], 2, "--batch has no effect"),
        (["--tokens=4"], 2, "--tokens is for --latency-table"),
        (["--latency-table=t.json", "--tokens=0"], 2, "tokens is 0"),
        (["--latency-table=none/t.json"], 2, "no such directory"),
    ],
)
def test_wrong_flags_are_refused(flags, code, says, tmp_path, capsys, monkeypatch):
    """Refusals are one line, before a file is written."""
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "dense", blocks=1)
    assert main(["bench", "dense", *flags]) == code
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
