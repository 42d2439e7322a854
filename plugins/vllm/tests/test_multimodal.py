"""A language model inside of one with images, whose linears vLLM calls by other names."""

import os
import subprocess
import sys
from pathlib import Path


def test_answers_are_those_of_transformers(checkpoints):
    """Names of the config are changed with those of the tensors; in a process with torchvision."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), os.environ["SERVED_TORCHVISION"]])
    done = subprocess.run(
        [sys.executable, "multimodal.py", str(checkpoints / "multimodal.json")],
        cwd=here,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
