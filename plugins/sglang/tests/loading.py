"""SGLang's own loader of checkpoints, in this process and without an engine."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import on_cpu  # noqa: F401 # first: imports of SGLang need it
import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import parallel_state
from sglang.srt.model_loader import get_model
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs


def arguments(directory: str | Path) -> ServerArgs:
    """Settings of a server for a checkpoint."""
    return ServerArgs(
        model_path=str(directory),
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        disable_cuda_graph=True,
    )


def prepare(directory: str | Path) -> None:
    """Load plug-ins by their entry points, and make the groups of one rank."""
    load_plugins()
    publish(arguments(directory), role="scheduler", ranks=SpawnRanks(world_rank=0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    parallel_state.init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
    parallel_state.initialize_model_parallel(backend="gloo")


def finish() -> None:
    """End the groups."""
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def load(directory: str | Path) -> Any:
    """Return SGLang's model of a checkpoint."""
    config = ModelConfig.from_server_args(arguments(directory))
    with torch.no_grad():
        return get_model(
            model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu", 0)
        )


def changed(model: str, copy: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a checkpoint with another config."""
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy
