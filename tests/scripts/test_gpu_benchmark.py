"""`scripts/benchmark gpu` at tiny sizes on a CPU: every part ends, and every check holds."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import forking
import pytest
import torch
from benchmarks.gpu import default_out, supervisor
from benchmarks.gpu.bench import Bench, Check
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.rates import device_row, known_name
from benchmarks.gpu.results import Results, summary
from benchmarks.gpu.supervisor import supervise
from benchmarks.gpu.worker import run_part

from orchestrator.forecast import rates

ROOT = Path(__file__).parents[2]
WITHOUT_RAY = 'raise ImportError("Ray must not be imported")'
RESTLESS = """
import os, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.results import Results
path, work, deadline, *names = sys.argv[1:]
results = Results.read(Path(path))
for name in names:
    results.begin(name)
    if name == "attention":
        os._exit(3)
    if name == "eigen":
        child = subprocess.Popen(["sleep", "600"])
        Path(work, "child").write_text(str(child.pid))
        time.sleep(600)
    results.end(name, {"line": "", "figures": os.getpid(), "checks": []})
"""
"""Program instead of the worker: one part ends its process, another one hangs."""


def benchmark(*arguments, tmp_path):
    """The command with the packages of this environment, except Ray, and no GPU."""
    (tmp_path / "ray.py").write_text(WITHOUT_RAY)
    forking.fork_processes()
    paths = os.pathsep.join([str(tmp_path), str(forking.HERE)])
    given = {"PYTHON": sys.executable, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    given["FORKED"] = "all"
    return subprocess.run(
        [ROOT / "scripts" / "benchmark", "gpu", *arguments],
        env=os.environ | given | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Results of all parts, and the printed text."""
    directory = tmp_path_factory.mktemp("gpu")
    out = directory / "new" / "results.json"
    # enough for a busy machine, so that no part is omitted
    done = benchmark("--small", "--seconds", "1500", "--out", str(out), tmp_path=directory)
    assert done.returncode == 0, done.stderr
    return Results.read(out), done.stdout


@pytest.fixture
def bench(tmp_path):
    results = Results(tmp_path / "results.json", {}, is_small=True)
    return Bench(torch.device("cpu"), tmp_path, results, time.monotonic() + 600)


def figures(small, part):
    return small[0].parts[part]["figures"]


def test_every_part_ends_and_says_so(small):
    """Without Ray, each part prints its line, and the last line counts them."""
    results, printed = small
    assert results.running is None
    assert results.parts.keys() == PARTS.keys()
    for name, entry in results.parts.items():
        assert "figures" in entry, f"{name}: {entry}"
        assert f"\n{name}: {entry['line']} [" in printed
    assert summary(results) in printed


def test_every_check_holds(small):
    """Every part has checks, except for ceilings and for comparisons with other methods."""
    parts = small[0].parts
    broken = [check for entry in parts.values() for check in entry["checks"] if not check["holds"]]
    assert broken == []
    without = {name for name, entry in parts.items() if not entry["checks"]}
    assert without == {"machine", "published"}


def test_factors_lose_what_the_optimum_loses(small):
    """Losses of both shapes, one-sided and two-sided, agree to 1e-7; pivoting adds no loss."""
    rows = figures(small, "decompositions")
    assert [row["shape"] for row in rows] == [[128, 128], [128, 448]]
    for row in rows:
        assert row["same_bits"]
        assert abs(row["above_optimum"]) < 1e-7
        assert abs(row["two_sided_above_optimum"]) < 1e-7
        assert row["pivot"]["error"] < 1e-6
    published = figures(small, "published")
    assert [row["shape"] for row in published] == [row["shape"] for row in rows]
    assert all(-1e-10 < row["published_above_optimum"] < 1e-6 for row in published)


def test_grams_and_eigenvectors_are_exact_to_their_dtypes(small):
    """Grams are within 1e-5 of the largest entry; eigenvectors are orthonormal."""
    grams = figures(small, "grams")
    assert {row["dtype"] for row in grams} == {"bfloat16", "float32"}
    assert all(row["error"] < 1e-5 and row["same_bits"] for row in grams)
    eigen = figures(small, "eigen")
    assert {(row["dtype"], row["triangle"]) for row in eigen} == {
        (dtype, triangle) for dtype in ("float32", "float64") for triangle in "UL"
    }
    wide = [row for row in eigen if row["dtype"] == "float64"]
    assert all(max(row["residual"], row["orthonormality"]) < 1e-12 for row in wide)
    assert all(row["same_bits"] for row in eigen)


def test_recipes_repeat_their_bits_on_one_kind_of_device(small):
    """All six recipes give the same bits three times, with tensors and losses in the results."""
    found = figures(small, "pipeline")
    assert found["errors"] == {}
    assert len(found["recipes"]) == 6
    for row in found["recipes"].values():
        assert row["other_bits_in"] == []
        assert row["same_shapes_as_cpu"]
        assert row["errors_apart"] == 0
        assert row["perplexities"][0] == row["perplexities"][1] > 1


def test_a_results_file_gives_a_row_of_the_forecast_s_rates(small, tmp_path, monkeypatch):
    """A plan accepts it, with the measured rates and half of them as pessimistic ones."""
    path = small[0].path
    done = benchmark("--rates", str(path), tmp_path=tmp_path)
    row = json.loads(done.stdout)
    assert row == device_row(small[0])
    ((name, entry),) = row.items()
    known = rates._file()
    assert entry.keys() >= known["devices"]["H100"].keys()
    monkeypatch.setattr(rates, "_file", lambda: {**known, "devices": known["devices"] | row})
    machine = rates.machine_of(name)
    measured, planned = machine.rows
    assert machine.memory_bytes == small[0].content["environment"]["memory_bytes"]
    speeds = figures(small, "machine")["product_rates"]
    for speed in ("half", "tf32", "single", "double"):
        assert getattr(measured, speed) == pytest.approx(speeds[speed], rel=1e-3)
    eigen = [row for row in figures(small, "eigen") if row["dtype"] == "float64"]
    assert measured.eigen in [pytest.approx(row["rate"], rel=1e-3) for row in eigen]
    for speed in ("half", "tf32", "single", "double", "eigen"):
        assert getattr(planned, speed) == pytest.approx(getattr(measured, speed) / 2, rel=1e-3)


def test_rates_need_both_of_their_parts(bench):
    """A file without eigendecompositions is refused."""
    bench.results.end("machine", {"figures": {"product_rates": {}}})
    with pytest.raises(SystemExit, match="rates need the parts machine and eigen; run both"):
        device_row(bench.results)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
    ],
)
def test_devices_are_known_by_all_words_of_their_names(device, name):
    """A slice of a device, or another one of its series, has no rates yet."""
    assert known_name(device) == name


def test_without_a_gpu_large_sizes_are_refused(tmp_path):
    """The message says what torch sees, and what to do."""
    done = benchmark("--only", "machine", tmp_path=tmp_path)
    assert done.returncode == 1
    assert "sees no CUDA device" in done.stderr
    assert "give --small" in done.stderr


def test_results_are_named_by_device_and_date():
    """Names lie under benchmarks/results and have only characters that every file system allows."""
    environment = {"cuda_device": "NVIDIA A100-SXM4-80GB", "date": "2026-01-31T09:05"}
    found = default_out(environment, is_small=False)
    assert found == ROOT / "benchmarks/results/gpu-nvidia-a100-sxm4-80gb-2026-01-31T0905.json"


def test_a_part_that_cannot_be_imported_stops_no_other(bench, monkeypatch):
    """Without transformers `block` has a traceback as its result, and `grams` its figures."""
    for module in (
        "benchmarks.gpu.parts.block",
        "benchmarks.gpu.parts.model",
        "benchmarks.common.synthetic",
    ):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    run_part(bench, "block")
    run_part(bench, "grams")
    parts = Results.read(bench.results.path).parts
    assert "import of transformers halted" in parts["block"]["error"]
    assert parts["grams"]["figures"][0]["error"] < 1e-5
    assert "block failed: ModuleNotFoundError" in summary(bench.results)


def test_a_part_without_enough_time_is_left_out(bench):
    """Its entry has the available and the required time."""
    bench.results.content["small"] = False
    short = Bench(bench.device, bench.work, bench.results, time.monotonic() + 20)
    run_part(short, "block")
    entry = Results.read(bench.results.path).parts["block"]
    assert entry == {"left_out": "20 s left, 70 s needed"}


def test_a_process_that_dies_or_hangs_costs_its_part_alone(bench, monkeypatch):
    """Another process runs the rest; a hanging one is stopped with its children."""
    monkeypatch.setitem(PARTS, "eigen", Part("eigen", 0.3))
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0)
    program = [sys.executable, "-c", RESTLESS]
    names = ["machine", "attention", "eigen", "grams"]
    supervise(bench.results, names, bench.work, bench.deadline, program=program)
    parts = Results.read(bench.results.path).parts
    assert list(parts) == sorted(names)
    assert parts["attention"]["error"] == "its process ended with status 3"
    assert "was ended after" in parts["eigen"]["error"]
    assert parts["machine"]["figures"] != parts["grams"]["figures"], "another process"
    child = int((bench.work / "child").read_text())
    until = time.monotonic() + 10
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid):
    """Return True if a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_program_that_does_not_start_fails_every_part(bench):
    """It is started once, not once a part."""
    supervise(bench.results, ["grams", "eigen"], bench.work, bench.deadline, program=["false"])
    parts = Results.read(bench.results.path).parts
    says = "the process that was to run it ended with status 1"
    assert [entry["error"] for entry in parts.values()] == [says, says]


def test_a_check_holds_below_its_bound_only():
    """NaN is not below any bound; a statement holds if it is true."""
    assert Check("", 0.5, 1.0).holds
    assert not Check("", 1.0, 1.0).holds
    assert not Check("", math.nan, 1.0).holds
    assert Check("", True).holds
    assert not Check("", False).holds
