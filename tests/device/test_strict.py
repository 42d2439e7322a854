"""Deterministic algorithms: on in backward passes and off elsewhere; CUDA's environment."""

import os
import subprocess
import sys

import pytest
import torch
from pipeline import run, write_llama, write_text
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from orchestrator.device.strict import (
    CUDA_ENVIRONMENT,
    cuda_environment,
    cuda_environment_here,
    strict,
)

TRAINING = {"epochs": 1, "batches": 2, "every": 2, "top_k": 24}
REFINEMENT = {"epochs": 1, "batches": 2}
RECIPES = {
    "curvature": {"method": "two-sided"},
    "pruned": {"method": "two-sided-sparse"},
    "blocks": {"refine": "blocks", "options": {"refinement": REFINEMENT}},
    "in order": {"refine": "in_order", "options": {"refinement": REFINEMENT}},
    "swept": {"refine": "swept", "options": {"refinement": REFINEMENT}},
    "train": {"train": "all", "options": {"training": TRAINING}},
    "recomputed": {
        "train": "lean",
        "options": {"training": TRAINING | {"targets": "recomputed"}},
    },
    "scales": {"train": "light", "options": {"training": TRAINING}},
}
STAGES = {
    "curvature": ["calibrate"],
    "pruned": ["calibrate"],
    "blocks": ["refine"],
    "in order": ["walk"],
    "swept": ["refine", "sweep"],
    "train": ["train"],
    "recomputed": ["train"],
    "scales": ["train"],
}
"""Stages that compute gradients, as the report names them."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama2") / "dense", blocks=2, hidden=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def settings():
    """PyTorch's settings, restored after a failing test."""
    memory = torch.utils.deterministic
    mode, fills = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory

    def read():
        return torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory

    yield read
    torch.set_deterministic_debug_mode(mode)
    memory.fill_uninitialized_memory = fills


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("fills", [True, False])
def test_the_context_restores_whatever_was_set(mode, fills, settings):
    """Inside, also nested, errors are on and filling is off; after it, or an error, as before."""
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    with strict():
        assert settings() == (2, False)
        with strict():
            assert settings() == (2, False)
        assert settings() == (2, False)
    assert settings() == (mode, fills)
    with pytest.raises(ValueError, match="inside"), strict():
        raise ValueError("inside")
    assert settings() == (mode, fills)


@pytest.mark.parametrize("name", RECIPES)
def test_every_backward_pass_is_strict(name, model, text, tmp_path):
    """The forward pass before it is strict too, for all modules with gradients, by stage."""
    modes = []

    def monitor(module, inputs, output):
        if isinstance(output, Tensor) and output.grad_fn is not None:
            forth = torch.get_deterministic_debug_mode()
            output.register_hook(
                lambda _: modes.append((forth, torch.get_deterministic_debug_mode()))
            )

    hook = register_module_forward_hook(monitor)
    try:
        result = run(model, tmp_path / "out", text, samples=4, sequence_length=24, **RECIPES[name])
    finally:
        hook.remove()
    assert modes
    assert set(modes) == {(2, 2)}
    assert result.report["gradients"] == {"algorithms": "deterministic", "stages": STAGES[name]}
    assert torch.get_deterministic_debug_mode() == 0


def test_forward_passes_are_not_strict(model, text, tmp_path):
    """Forward passes and decompositions do not pay for the sorts of strict indexing."""
    modes = []
    hook = register_module_forward_hook(
        lambda *_: modes.append(torch.get_deterministic_debug_mode())
    )
    try:
        fields = {"samples": 4, "sequence_length": 24, "compensate": "blend"}
        result = run(model, tmp_path / "out", text, **fields)
    finally:
        hook.remove()
    assert modes
    assert set(modes) == {0}
    assert "gradients" not in result.report


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, CUDA_ENVIRONMENT),
        ({"HOME": "/"}, CUDA_ENVIRONMENT),
        (
            {"CUBLAS_WORKSPACE_CONFIG": ":16:8"},
            CUDA_ENVIRONMENT | {"CUBLAS_WORKSPACE_CONFIG": ":16:8"},
        ),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"},
            {
                "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
                "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512",
            },
        ),
    ],
)
def test_what_a_user_has_set_is_kept(own, expected):
    """The user's values go to the workers, also by the older name of the allocator's."""
    assert cuda_environment(own) == expected


def test_a_run_in_this_process_leaves_its_environment(model, text, tmp_path, monkeypatch):
    """Variables that the user has not set exist from the forecast on, the first look at a device,
    until the end."""
    for name in CUDA_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before, seen = dict(os.environ), []

    def look(event):
        if event["event"] == "unit" or "forecast" in event.get("text", ""):
            seen.append({name: os.environ.get(name) for name in CUDA_ENVIRONMENT})

    run(model, tmp_path / "out", text, on_event=look)
    assert len(seen) > 1
    assert all(each == CUDA_ENVIRONMENT | {"CUBLAS_WORKSPACE_CONFIG": ":16:8"} for each in seen)
    assert os.environ == before
    with cuda_environment_here():
        assert os.environ["PYTORCH_ALLOC_CONF"] == CUDA_ENVIRONMENT["PYTORCH_ALLOC_CONF"]
    assert os.environ == before


def test_the_context_loads_no_compiler():
    """Inductor, which PyTorch's own switch would import in a second, is not loaded."""
    code = (
        "import sys, torch; from orchestrator.device.strict import strict\n"
        "with strict(): assert torch.are_deterministic_algorithms_enabled()\n"
        "assert 'torch._inductor.config' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.ray
def test_actors_have_it_from_their_start(ray_address, monkeypatch):
    """An actor's environment has the values of the driver's user, else the required ones."""
    from orchestrator.runtime.ray.pool import RayPool
    from orchestrator.runtime.scaling import Bounds

    class Bare:
        def __init__(self, task):
            self.environment = {name: os.environ.get(name) for name in task}

        def probe(self, nonce):
            return {"environment": self.environment, "node": "here", "pid": os.getpid()}

    for name in CUDA_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    resources = {"num_cpus": 1, "num_gpus": 0}
    options = {"nonce": "n", "resources": resources, "threads": 1, "announce": lambda event: None}
    with RayPool(Bare, list(CUDA_ENVIRONMENT), bounds=Bounds(), max_workers=1, **options) as pool:
        (probe,) = pool.gather()
    assert probe["environment"] == CUDA_ENVIRONMENT | {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
