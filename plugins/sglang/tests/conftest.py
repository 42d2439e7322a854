"""Checkpoints and references that orchestrator's environment made, and SGLang's loader."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """Directory that `make_checkpoints.py` of the package for vLLM wrote."""
    return Path(os.environ["SERVED_CHECKPOINTS"]).absolute()


@pytest.fixture(scope="session")
def reference(checkpoints: Path) -> Any:
    """Function from the name of a case to its reference: model, prompts, answers."""
    return lambda name: json.loads((checkpoints / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def load(reference: Any) -> Iterator[Callable[..., Any]]:
    """Function that loads a directory as a server does, in this process."""
    import loading

    loading.prepare(reference("low-rank")["model"])
    yield loading.load
    loading.finish()
