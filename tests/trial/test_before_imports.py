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

INTERRUPTED = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "orchestrator.cli.parser":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from orchestrator.cli.main import main

sys.exit(main(["methods"]))
"""


def plainly(*command, **options):
    """Run a Python process with the package of this checkout, not forked."""
    environment = {**os.environ, "PYTHONPATH": str(Path(orchestrator.__file__).parents[1])}
    words = [sys.executable, "-c", *command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, **options)


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
    done = plainly(PROGRAM, json.dumps([line for line, _ in EARLY]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[line, code, []] for line, code in EARLY]
    lines = done.stderr.splitlines()
    assert len(lines) == len(EARLY), done.stderr
    assert all(line.startswith("orchestrator: error: ") for line in lines)


def test_an_interrupt_while_the_program_starts_is_one_line():
    """Ctrl-C during the imports of the command line itself ends with 75 and without a traceback."""
    done = plainly(INTERRUPTED)
    line = "orchestrator: error: stopped by SIGINT\n"
    assert (done.returncode, done.stderr, done.stdout) == (75, line, "")
