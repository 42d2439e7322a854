"""Wrong values are refused before torch, transformers and Ray are imported, which takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

from trial_cases import EARLY

import orchestrator
from orchestrator.store.run import RunDirectory

PROGRAM = """
import json, shlex, sys
from orchestrator.cli.main import main

found = []
for line in json.loads(sys.argv[1]):
    try:
        code = main(shlex.split(line))
    except SystemExit as ended:
        code = ended.code
    heavy = sorted({"torch", "transformers", "ray"} & sys.modules.keys())
    found.append([line, code, heavy])
print(json.dumps(found))
"""


def write_run(root):
    """Write a run directory whose tokens are known, but nothing else."""
    run, key = RunDirectory(root), "ab" * 32
    recipe = {"model": "dense", "out": "out", "keep": 0.5, "calibration": "text.txt"}
    run.claim({"recipe": recipe, "model": "dense", "base_model": "dense", "tokens_key": key})
    run.units.begin(key).commit(environment={}, facts={})


def test_wrong_values_are_refused_without_heavy_imports(tmp_path):
    """One process, started plainly, refuses every case with the exit code of its kind."""
    for name in ("dense", "plain"):
        (tmp_path / name).mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "table.csv").write_text("text")
    write_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([line for line, _ in EARLY])],
        env={**os.environ, "PYTHONPATH": str(Path(orchestrator.__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[line, code, []] for line, code in EARLY]
    lines = done.stderr.splitlines()
    assert len(lines) == len(EARLY), done.stderr
    assert all(line.startswith("orchestrator: error: ") for line in lines)
