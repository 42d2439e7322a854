"""A run's metrics, read where Prometheus reads them; and the dashboard that shows them."""

import json
import re
import subprocess
import urllib.request
from pathlib import Path

import pytest
from drivers import start, wait_for
from pipeline import write_llama, write_text

DASHBOARD = Path(__file__).parents[3] / "scripts" / "grafana.json"
SAMPLE = re.compile(r"^ray_orchestrator_(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
DRIVER = """
import json, sys, ray
from orchestrator import Recipe, compress
ray.init(address=sys.argv[1], log_to_driver=False)
result = compress(Recipe(**json.loads(sys.argv[2])))
print(ray.get_runtime_context().get_worker_id(), json.dumps(result.report["timings"]), flush=True)
sys.stdin.readline()
"""
"""Metrics are those of a process, and last as long as it is there."""


def samples(process=""):
    """Values of our metrics by name and stage, as this machine's node says them of a process."""
    import ray

    node = next(node for node in ray.nodes() if node["Alive"])
    address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            text = response.read().decode()
    except OSError:
        return {}
    found = {}
    for name, labels, value in SAMPLE.findall(text):
        stage = re.search(r'stage="(\w+)"', labels)
        if process in labels:
            found[name, stage and stage[1]] = float(value)
    return found


@pytest.mark.ray
def test_a_run_is_counted(ray_address, tmp_path):
    """Units, their seconds and bytes, and the workers that are there, by the cluster's own port."""
    llama = write_llama(tmp_path / "dense", blocks=4)
    text = write_text(tmp_path / "text.txt")
    fields = {"model": str(llama), "out": str(tmp_path / "out"), "calibration": str(text)}
    fields |= {"method": "svd-llm", "keep": 0.5, "samples": 6, "sequence_length": 48, "workers": 2}
    driver = start("-c", DRIVER, ray_address, json.dumps(fields), stdin=subprocess.PIPE)
    process, _, written = driver.stdout.readline().partition(" ")
    timings = json.loads(written)

    def found(name, stage):
        return samples(process).get((name, stage))

    assert wait_for(lambda: found("units_total", "write") == 1)
    assert wait_for(lambda: found("workers", None) == 0), "they have gone"
    assert found("units_total", "calibrate") == 4
    units = (tmp_path / "out.run" / "units").rglob("model.layers.*.safetensors")
    assert found("unit_bytes_total", "calibrate") == sum(unit.stat().st_size for unit in units)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found("unit_bytes_total", "write") == size
    spent = timings["decompose_seconds"]
    assert found("unit_seconds_total", "calibrate") == pytest.approx(spent)
    wall = timings["seconds"]["calibrate"]
    assert found("stage_seconds_total", "calibrate") == pytest.approx(wall, abs=1e-3)
    assert found("units_left", "calibrate") == 0
    driver.communicate("\n")


@pytest.mark.ray
def test_failures_are_counted_by_cause(ray_address):
    """Failures are counted by the cause and the decision in the journal."""
    from orchestrator.runtime.ray.metrics import Metrics

    event = {"event": "lost", "cause": "hung", "decided": "repeat"}
    Metrics().note(event, {"workers": 7})

    assert wait_for(lambda: samples().get(("workers", None)) == 7)
    assert samples()["failures_total", None] == 1


def test_the_dashboard_shows_what_is_counted():
    """Each of our metrics has its panel, and none names another."""
    source = (DASHBOARD.parents[1] / "orchestrator" / "runtime" / "ray" / "metrics.py").read_text()
    gauges = set(re.findall(r'Gauge\(\s*f"\{PREFIX\}(\w+)"', source))
    counters = set(re.findall(r'Counter\(\s*f"\{PREFIX\}(\w+)"', source))
    assert (len(gauges), len(counters)) == (2, 5)
    panels = json.loads(DASHBOARD.read_text())["panels"]
    shown = re.findall(r"ray_orchestrator_(\w+)", " ".join(p["targets"][0]["expr"] for p in panels))
    assert set(shown) == gauges | {f"{name}_total" for name in counters}
    assert len({panel["id"] for panel in panels}) == len(panels)
