"""Settings of vLLM for tests on a CPU, and the references that orchestrator's environment made."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ |= {
    # the engine in this process: imports are paid once for all models
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # otherwise small helpers of the sampler are compiled, for a minute
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_AOT_COMPILE": "0",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """Directory that `make_checkpoints.py` wrote."""
    return Path(os.environ["SERVED_CHECKPOINTS"]).absolute()


@pytest.fixture(scope="session")
def reference(checkpoints: Path) -> Any:
    """Function from the name of a case to its reference: model, prompts, answers."""
    return lambda name: json.loads((checkpoints / f"{name}.json").read_text())
