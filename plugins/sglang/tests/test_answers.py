"""Answers of SGLang's engine, started as a user starts it, beside those of transformers."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = [
    "low-rank",
    "low-rank-and-dense",
    "pivoted",
    "mixed",
    "every-form",
    "shared-bases",
    # biases of queries, keys and values
    "qwen2",
    "qwen3",
    # queries, keys and values in one linear of the checkpoint, gate and up in another
    "phi3",
]


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_transformers(name, checkpoints):
    """Greedy tokens are equal, and log-probabilities up to 1e-4 in float32."""
    done = subprocess.run(
        [sys.executable, "answering.py", str(checkpoints / f"{name}.json")],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("largest difference") == 4
