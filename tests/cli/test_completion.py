"""`completion`: the scripts, read by the shells themselves."""

import shutil
import subprocess

import pytest

from orchestrator.cli.main import main
from orchestrator.cli.verbs import VERBS

COMPLETE = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_shtab_orchestrator
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """A function that writes the script of a shell."""

    def write(shell):
        path = tmp_path_factory.mktemp("completion") / shell
        with path.open("w") as file, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", file)
            assert main(["completion", shell]) == 0
        return path

    return write


def test_bash_completes_verbs_flags_values_and_paths(script, tmp_path):
    """bash, given the words of a line, answers with the words that may follow."""
    (tmp_path / "dense-model").mkdir()
    path = script("bash")

    def complete(*words):
        command = ["bash", "-c", COMPLETE, "bash", path, "orchestrator", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert {*complete("")} == {*VERBS}
    assert complete("retar") == ["retarget"]
    assert complete("compress", "--keep-b") == ["--keep-bytes"]
    assert complete("compress", "--storage", "") == ["plain", "pivoted"]
    assert complete("compress", "den") == ["dense-model"]
    assert complete("completion", "z") == ["zsh"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_scripts_name_every_verb(shell, script):
    """The script has every verb; a shell that is installed reads it without an error."""
    path = script(shell)
    text = path.read_text()
    assert [verb for verb in VERBS if verb not in text] == []
    if shutil.which(shell):
        subprocess.run([shell, "-n", path], check=True)
