"""Compressed linears in a graph that is compiled, as vLLM does by default."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys
from pathlib import Path
from serving import check_answers, served

if __name__ == "__main__":
    reference = json.loads(Path(sys.argv[1]).read_text())
    with served(reference["model"], enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode > 0
        check_answers(llm, reference)
"""


def test_answers_are_those_of_transformers(checkpoints):
    """One graph without breaks takes every form; in a process that may compile."""
    environment = {name: os.environ[name] for name in os.environ if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(checkpoints / "every-form.json")],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
