"""A compressed model behind the endpoint that speaks OpenAI's protocol, from end to end."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import TOLERANCE

STARTS = 300
"""Seconds within which a server must answer."""


@contextmanager
def server(model: str, log: Path) -> Iterator[str]:
    """Start a server of a model; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--model", model, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    flags += ["--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", "268435456"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
    # the engine is a process of its own, as it is for users
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
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
def test_smollm2_over_http(name, reference, tmp_path):
    """Completions of real text are those of transformers, in tokens and log-probabilities."""
    expected = reference(name)
    with server(expected["model"], tmp_path / "log") as address:
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
