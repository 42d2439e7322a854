"""The README is short, and its commands work."""

import re
import shlex
from pathlib import Path

import pytest
from drivers import start
from pipeline import SENTENCES, add_tokenizer, with_tokenizer
from pools import warm_workers

from orchestrator.cli.main import main

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


EACH = """
import sys
for source in sys.argv[1:]:
    exec(compile(source, "README.md", "exec"), {})
"""


@pytest.mark.ray
def test_the_commands_of_the_readme_run(directory, ray_address, monkeypatch, capsys):
    """The orchestrator commands run in order on a tiny model; then the Python blocks.

    All tests share one Ray, and all commands one worker; the commands are called in this process,
    which is in that Ray, and the last two blocks are executed by one other.
    """
    monkeypatch.chdir(directory)
    with warm_workers():
        for words in commands():
            if words[0] == "orchestrator":
                on_ray = words[1] in ("compress", "retarget", "evaluate")
                code = main([*words[1:], *(["--workers", "1"] if on_ray else [])])
                assert code == 0, f"{words}: {capsys.readouterr().err}"
        assert (directory / "small-dense" / "config.json").is_file()
        assert not (directory / "small.run").exists()
        compressing, *others = blocks("python")
        assert len(others) == 2
        exec(compile(compressing, "README.md", "exec"), {})
    process = start("-c", EACH, *others)
    _, error = process.communicate()
    assert process.returncode == 0, error
