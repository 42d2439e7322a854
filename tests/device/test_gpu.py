"""Reports of workers about their GPUs, and their use by a run."""

import json
import subprocess
from dataclasses import replace
from shutil import which
from types import SimpleNamespace

import pytest
import torch
from pretend import pretended_device

from orchestrator.device import gpu
from orchestrator.errors import InfeasibleError, InputError
from orchestrator.models.checkpoint.weights import fingerprint_of
from orchestrator.models.shards.chunk import Chunk
from orchestrator.readable import size
from orchestrator.recipe.recipe import make_recipe
from orchestrator.runtime.worker import Task, Worker, check_alike
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.stages.admission import check_memory, recheck_memory

NVML = """
#include <string.h>
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    if (length < 80) return 7;
    strcpy(version, "550.54.15");
    return SAID;
}
"""
"""Functions as declared in NVIDIA's header; 0 is success."""


@pytest.fixture
def worker(tmp_path):
    """Make workers of a run without a model."""
    made = []

    def make():
        task = Task(run_dir=tmp_path / "run", threads=1, pass_key="pass", fingerprints={})
        made.append(Worker(task, unpack=Chunk.unpack, fingerprint=fingerprint_of))
        return made[-1]

    yield make
    for each in made:
        each.release()


@pytest.fixture
def nvml(tmp_path, monkeypatch):
    """Compile `NVML` to a library that is found as NVIDIA's."""
    gpu.driver_version.cache_clear()

    def compile_with(**results):
        compiler = which("cc")
        if compiler is None:
            pytest.skip("needs a C compiler")
        library, source = tmp_path / "nvml.so", tmp_path / "nvml.c"
        source.write_text(NVML)
        values = [f"-D{name}={value}" for name, value in results.items()]
        command = [compiler, "-shared", "-fPIC", *values, "-o", library, source]
        subprocess.run(command, check=True)
        monkeypatch.setattr(gpu, "_NVML", str(library))

    yield compile_with
    gpu.driver_version.cache_clear()


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ({"INIT": 0, "SAID": 0}, "550.54.15"),
        ({"INIT": 9, "SAID": 0}, "unknown"),
        ({"INIT": 0, "SAID": 3}, "unknown"),
    ],
)
def test_the_driver_is_what_nvml_says(results, expected, nvml):
    """The version comes from NVML's functions; if these fail it is `unknown`."""
    nvml(**results)
    assert gpu.driver_version() == expected


def test_without_nvml_the_driver_is_unknown(nvml, monkeypatch):
    """A missing library, and one that lacks the functions, give `unknown`."""
    for name in ("libthere-is-none.so.1", "libc.so.6"):
        monkeypatch.setattr(gpu, "_NVML", name)
        gpu.driver_version.cache_clear()
        assert gpu.driver_version() == "unknown"


def test_the_environment_of_a_cpu_says_nothing_of_cuda(worker):
    """Units of earlier versions made on CPUs thus keep their environment."""
    names = ["device", "capability", "threads", "torch", "transformers", "orchestrator"]
    assert list(worker().environment()) == names
    assert worker().probe("n")["device_bytes"] is None


def test_the_environment_of_a_gpu_has_what_its_kernels_come_from(worker, nvml, monkeypatch):
    """Workers with other libraries, or another driver, are refused, and the error says which."""
    nvml(INIT=0, SAID=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pretended_device(total=10**10):
        probe = worker().probe("n")
        other = worker().probe("n") | {"node": "b"}
    found = probe["environment"]
    assert (found["cuda"], found["driver"]) == ("13.0", "550.54.15")
    assert found["cudnn"] == str(torch.backends.cudnn.version() or "unknown")
    assert probe["device_bytes"] == 10**10
    check_alike(other, probe)
    other["environment"]["driver"] = "535.104.05"
    with pytest.raises(InputError, match=r"node b: driver is 535\.104\.05, on node .* 550\.54\.15"):
        check_alike(other, probe)
    on_cpu = worker().probe("n") | {"node": "c"}
    for pair in ((on_cpu, probe), (probe, on_cpu)):
        with pytest.raises(InputError, match=r"device is .*; all workers of a run must be alike"):
            check_alike(*pair)


def test_a_gpu_that_torch_does_not_see_is_explained(monkeypatch, nvml):
    """The message names the build or the driver; it is empty with a visible GPU, or without any."""
    nvml(INIT=0, SAID=0)
    assert gpu.unseen([]) == ""
    with pretended_device():
        assert gpu.unseen([0]) == ""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "sees none: it is a build without CUDA" in gpu.unseen([0, "1"])
    assert f"GPU 0, 1, but torch {torch.__version__}" in gpu.unseen([0, "1"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0, on driver 550.54.15;" in gpu.unseen([0])


def test_a_worker_without_the_gpu_that_it_was_given_is_refused(monkeypatch):
    """The error is raised unless the cluster's GPUs are declared as pretended."""
    monkeypatch.delenv(gpu.PRETENDED, raising=False)
    gpu.check_seen({"unseen": ""})
    with pytest.raises(InputError, match="node a: Ray gave"):
        gpu.check_seen({"unseen": "node a: Ray gave"})
    monkeypatch.setenv(gpu.PRETENDED, "1")
    gpu.check_seen({"unseen": "node a: Ray gave"})


def test_what_workers_measure_of_their_gpus_wins_over_what_their_kind_has(tmp_path):
    """For a slice of a card, shards are cut for its own memory, or the run is refused."""
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336}
    config |= {"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    given = {"model": str(tmp_path), "out": str(tmp_path / "out"), "executor": "local"}
    recipe, notes = make_recipe({**given, "keep": 0.8}), []
    monitor = SimpleNamespace(note=notes.append, progress=SimpleNamespace())
    assumed = check_memory(recipe, tmp_path, monitor, measured=80 * 10**9)
    assert assumed.blocks_that_fit == 2

    def again(room):
        notes.clear()
        workers = WorkerGroup(None, 1, {}, (), device_bytes=room)
        return recheck_memory(assumed, recipe, tmp_path, workers=workers, monitor=monitor)

    assert again(None) is assumed
    assert again(80 * 10**9) is assumed
    assert notes == []
    lenient = replace(recipe, allow_infeasible=True)
    tried = {
        room: check_memory(lenient, tmp_path, monitor, measured=room)
        for room in range(10**9, 10**10, 10**8)
    }
    room = next(room for room, found in tried.items() if not found.infeasible)
    assert again(room).blocks_that_fit == 1
    assert notes[0] == f"a worker's GPU has {size(room)}; 80 GB were assumed from its type"
    with pytest.raises(InfeasibleError, match="calibrate: a worker holds"):
        again(room - 10**8)
