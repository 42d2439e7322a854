"""The README is short, and its commands work."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import SENTENCES, add_tokenizer, with_tokenizer

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def blocks(language):
    return [body for found, body in BLOCK.findall(README.read_text()) if found == language]


def commands():
    """Lines of the shell blocks, with continuation lines joined and without comments."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def directory(checkpoint, tmp_path_factory):
    """A directory with the names that the README uses."""
    root = tmp_path_factory.mktemp("readme")
    add_tokenizer(with_tokenizer(checkpoint("llama"), root / "dense"))
    (root / "text.txt").write_text(SENTENCES * 220)
    (root / "held-out.txt").write_text(SENTENCES[::-1] * 40)
    return root


def test_the_readme_is_under_280_lines():
    """The README has less than 280 lines."""
    assert len(README.read_text().splitlines()) < 280


def test_every_command_of_the_readme_is_known():
    """Commands not run below are the two scripts; commands that need a cluster are not in `sh`
    blocks."""
    known = {"orchestrator", "scripts/quickstart", "scripts/test"}
    assert {words[0] for words in commands()} == known
    for script in ("quickstart", "test"):
        assert (README.parent / "scripts" / script).stat().st_mode & 0o100


@pytest.mark.ray
def test_the_commands_of_the_readme_run(directory, ray_address):
    """The orchestrator commands run in order on a tiny model; then the Python blocks."""
    for words in commands():
        if words[0] == "orchestrator":
            # all tests share one Ray; without an address each command would start its own
            on_ray = words[1] in ("compress", "retarget", "evaluate")
            joins = ["--address", ray_address] if on_ray else []
            workers = ["--workers", "1"] if joins else []
            arguments = [sys.executable, "-m", "orchestrator", *words[1:], *joins, *workers]
            done = subprocess.run(arguments, cwd=directory, capture_output=True, text=True)
            assert done.returncode == 0, f"{words}: {done.stderr}"
    assert (directory / "small-dense" / "config.json").is_file()
    assert not (directory / "small.run").exists()
    compressing, loading, recovering = blocks("python")
    code = f"import ray\nray.init(address={ray_address!r}, log_to_driver=False)\n{compressing}"
    for source in (code, loading, recovering):
        run = [sys.executable, "-c", source]
        done = subprocess.run(run, cwd=directory, capture_output=True, text=True)
        assert done.returncode == 0, f"{source}\n{done.stderr}"
