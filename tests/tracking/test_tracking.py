"""Trackers: what a run tells them is read back by each library, and their failures end no run."""

import json
import struct
import sys
from contextlib import suppress

import pytest
from pipeline import write_llama, write_text

from orchestrator.cli.main import main
from orchestrator.errors import StoppedError, UsageError
from orchestrator.tracking.figures import of_event, of_report
from orchestrator.tracking.follow import TRACKERS, following

pytestmark = pytest.mark.filterwarnings("ignore")
SNAPSHOTS = [
    {"event": "snapshot", "step": 0, "train": None, "held_out": 2.5},
    {"event": "snapshot", "step": 4, "train": 2.25, "held_out": 2.0},
]
UNITS = [{"event": "unit", "stage": "calibrate", "done": n, "total": 2} for n in (1, 2)]
END = {"event": "stage", "stage": "calibrate", "state": "end", "seconds": 3.5}
REPORT = {
    "kept": {"linears": 0.5, "model": 0.625},
    "refine": {"blocks": {"0": {"before": 0.5, "after": 0.25}}},
    "models": {"model": {"perplexity": 20.5}, "against": {"perplexity": float("inf")}},
    "tasks": [
        {
            "task": "ships",
            "metric": "acc",
            "model": {"value": 0.5},
            "against": {"value": 0.75},
            "retention": 2 / 3,
        }
    ],
}
FOUND = {
    "progress/calibrate": [(1, 0.5), (2, 1.0)],
    "seconds/calibrate": [(0, 3.5)],
    "train/held_out": [(0, 2.5), (4, 2.0)],
    "train/train": [(4, 2.25)],
    "result/kept_model": [(0, 0.625)],
    "refine/after": [(0, 0.25)],
    "evaluation/perplexity": [(0, 20.5)],
    "tasks/ships_acc": [(0, 0.5)],
    "tasks/dense_ships_acc": [(0, 0.75)],
    "tasks/retention_ships_acc": [(0, pytest.approx(2 / 3))],
}


def test_figures_of_events_and_reports():
    """Every finite number has a series with a step of its own; others are left out."""
    series = {}
    points = [point for event in (*UNITS, END, *SNAPSHOTS) for point in of_event(event)]
    for point in [*points, *of_report(REPORT)]:
        for name, value in point.values.items():
            series.setdefault(f"{point.group}/{name}", []).append((point.step, value))
    assert FOUND.items() <= series.items()
    assert "evaluation/dense_perplexity" not in series


def tensorboard_series(root):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(root / "tensorboard" / "out.run"))
    found.Reload()
    names = found.Tags()["scalars"]
    return {name: [(each.step, each.value) for each in found.Scalars(name)] for name in names}


def mlflow_series(root):
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("orchestrator")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("out.run", "FINISHED")
    assert found.data.params["keep"] == "0.5"
    names = found.data.metrics
    histories = {name: client.get_metric_history(found.info.run_id, name) for name in names}
    return {name: [(p.step, p.value) for p in points] for name, points in histories.items()}


def wandb_records(content):
    """Records of an offline run, in LevelDB's format of logs: blocks of 32 KiB with fragments."""
    at, parts = 7, []
    while at < len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def wandb_series(root):
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    # its service writes files of finished runs until the process ends, or this
    wandb.teardown()
    series, ids = {}, set()
    for file in sorted(root.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            ids |= {record.run.run_id} - {""}
            items = {"/".join(i.nested_key) or i.key: i for i in record.history.item}
            row = {name: json.loads(item.value_json) for name, item in items.items()}
            for name, value in row.items():
                if not name.startswith("_") and not name.endswith("/step"):
                    step = row[f"{name.partition('/')[0]}/step"]
                    series.setdefault(name, []).append((step, value))
    assert len(ids) == 1
    return series


def trackio_series(root):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("orchestrator")
    assert run.name == "out.run"
    series = {}
    for row in SQLiteStorage.get_logs("orchestrator", run.name):
        for metric, value in row.items():
            group, _, name = metric.partition("/")
            if name not in ("", "step"):
                series.setdefault(metric, []).append((row[f"{group}/step"], value))
    return series


READERS = {
    "tensorboard": tensorboard_series,
    "mlflow": mlflow_series,
    "wandb": wandb_series,
    "trackio": trackio_series,
}


@pytest.mark.parametrize("name", READERS)
def test_a_library_has_every_series(name, tmp_path, monkeypatch):
    """Read back by the library itself; a run that is stopped and resumed is one run."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name)
    told = []
    run = ([name], str(tmp_path / "out.run"), {"keep": 0.5}, told.append)
    with suppress(StoppedError), following(*run) as trackers:
        trackers.on_event(UNITS[0])
        trackers.on_event(SNAPSHOTS[0])
        raise StoppedError("stopped")
    with following(*run) as trackers:
        for event in (UNITS[1], END, SNAPSHOTS[1]):
            trackers.on_event(event)
        trackers.report(REPORT)
    assert told == [UNITS[0], SNAPSHOTS[0], UNITS[1], END, SNAPSHOTS[1]]
    assert FOUND.items() <= READERS[name](tmp_path).items()


def test_a_command_is_tracked(tmp_path, capsys):
    """Compression and evaluation by `--track tensorboard`, under the name of the run directory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    dense = write_llama(tmp_path / "dense", blocks=2, hidden=32)
    text = write_text(tmp_path / "text.txt")
    small = ["--samples", "2", "--sequence-length", "32", "--executor", "local"]
    small += ["--track", "tensorboard", "--json"]
    out = str(tmp_path / "out")
    calibration = ["--calibration", str(text), "--keep", "0.5"]
    assert main(["compress", str(dense), out, *calibration, *small]) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]["model"]
    assert main(["evaluate", out, "--text", str(text), *small]) == 0
    perplexity = json.loads(capsys.readouterr().out)["models"]["model"]["perplexity"]
    expected = {"run": ("result/kept_model", kept), "evaluation": ("evaluation/perplexity",)}
    expected["evaluation"] += (perplexity,)
    for kind, (name, value) in expected.items():
        found = EventAccumulator(str(tmp_path / "tensorboard" / f"out.{kind}"))
        found.Reload()
        assert [each.value for each in found.Scalars(name)] == [pytest.approx(value)]
        assert [name for name in found.Tags()["scalars"] if name.startswith("seconds/")]


def test_a_failure_is_one_warning(tmp_path):
    """The store of a tracker is a file, not a directory: the run goes on, warned once."""
    (tmp_path / "tensorboard").write_text("no directory")
    told = []
    with following(["tensorboard"], str(tmp_path / "out.run"), {}, told.append) as trackers:
        trackers.on_event(END)
        trackers.report(REPORT)
    warning, *others = told
    assert others == [END]
    assert warning["text"].startswith("warning: tensorboard cannot start tracking, the run goes on")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    """One line with the package to install, before the run begins."""
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delitem(sys.modules, f"orchestrator.tracking.{name}", raising=False)
    with (
        pytest.raises(UsageError, match=rf"{name} is not installed; pip install 'orchestrator\["),
        following([name], str(tmp_path), {}, print),
    ):
        pass
