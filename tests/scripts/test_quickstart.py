"""Quickstart: its last lines are commands, and a long step is not silent."""

import shlex
import subprocess
from pathlib import Path

from orchestrator.cli.parser import make_parser

SCRIPTS = Path(__file__).parents[2] / "scripts"


def said_by(script, *words):
    """Lines of a piece of bash that has the functions of the scripts."""
    text = f"source {shlex.quote(str(SCRIPTS / 'environment'))}; {script}"
    call = ["bash", "-c", text, "bash", *words]
    both = subprocess.run(call, check=True, text=True, stdout=-1, stderr=subprocess.STDOUT)
    return both.stdout.splitlines()


def test_the_next_commands_are_commands():
    """The parser takes each; they name what quickstart has made, and a new output."""
    dense, small = ".work/model", ".work/small"
    lines = said_by('suggest_next "$@"', dense, small)
    assert "suggest_next" in (SCRIPTS / "quickstart").read_text()
    found = []
    for line in lines:
        mark, program, *words = shlex.split(line)
        assert (mark, program) == ("next:", ".venv/bin/orchestrator")
        found.append(make_parser().parse_args(words))
    assert [each.command for each in found] == ["retarget", "verify", "watch"]
    retarget, verify, watch = found
    assert retarget.run == watch.run == f"{small}.run"
    assert (verify.out, verify.against) == (small, dense)
    assert retarget.out not in (dense, small)


def test_a_long_step_says_something_within_ten_seconds():
    """At the interval of its wait, here shortened, until its end and no longer; its code stays."""
    script = """
    exec 9>&1
    sleep() { echo "waits $1" >&9; command sleep 0.02; }
    step() { command sleep 0.2; return 7; }
    beating "echo busy" step || echo "code $?"
    command sleep 0.1
    """
    lines = said_by(script)
    waits = {float(line.split()[1]) for line in lines if line.startswith("waits")}
    assert waits
    assert max(waits) < 10
    assert sum(line.endswith("busy") for line in lines) >= 2
    assert lines[-1] == "code 7"
