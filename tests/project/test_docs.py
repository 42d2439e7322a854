"""The README is short; its commands and those of the pages in docs/ work.

A block in `sh` or `python` runs, in the order of its page. A block in `console` needs a cluster, a
network, a large model or much time: its orchestrator commands are parsed, unless their output
follows. Lines of a `text` block are in the output of the command above it.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pipeline import SENTENCES, add_tokenizer, with_tokenizer
from pools import warm_workers

from orchestrator import api
from orchestrator.cli.main import main
from orchestrator.cli.parser import make_parser
from orchestrator.cli.verbs import VERBS
from orchestrator.recipe.field import described
from orchestrator.recipe.recipe import Recipe, make_recipe

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
PAGES = sorted(
    path for path in (ROOT / "docs").rglob("*.md") if re.search(r"```\w", path.read_text())
)
ON_WORKERS = {"compress", "retarget", "evaluate", "search"}
READS_TEXT = ON_WORKERS - {"retarget"}
LOCAL = ("--executor", "local")
FEW = ("--samples", "6", "--sequence-length", "48")
"""Flags that follow those of a page, and so replace them: without Ray, on little text."""
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Config of Mistral-7B-v0.3, as far as a forecast reads it."""


def blocks(page):
    """Languages and contents of the blocks of a page."""
    return BLOCK.findall(page.read_text())


def commands(body):
    """Lines of a shell block, with continuation lines joined and without comments."""
    lines = body.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def write_inputs(root, checkpoint):
    """Write the files that the README and the pages name."""
    add_tokenizer(with_tokenizer(checkpoint("llama"), root / "dense"))
    (root / "text.txt").write_text(SENTENCES * 220)
    (root / "held-out.txt").write_text(SENTENCES[::-1] * 40)
    (root / "mistral-7b").mkdir()
    (root / "mistral-7b" / "config.json").write_text(json.dumps(MISTRAL))
    return root


def perform(words, *more):
    """Run a command in this process; returns its exit code and its output."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            code = main([*words[1:], *more])
        except SystemExit as ended:
            code = ended.code or 0
    return code, said.getvalue()


def test_the_readme_is_under_200_lines():
    """The README has less than 200 lines."""
    assert len(README.read_text().splitlines()) < 200


def test_every_command_is_known():
    """Commands of `sh` blocks are ours; the two scripts are not run below."""
    shells = [body for page in (README, *PAGES) for name, body in blocks(page) if name == "sh"]
    names = {words[0] for body in shells for words in commands(body)}
    assert names == {"orchestrator", "scripts/quickstart", "scripts/test"}
    for script in ("quickstart", "test"):
        assert (ROOT / "scripts" / script).stat().st_mode & 0o100


# warnings of libraries about each other are shown to a reader too
@pytest.mark.filterwarnings("default")
@pytest.mark.ray
def test_the_commands_of_the_readme_run(checkpoint, ray_address, tmp_path, monkeypatch, capfd):
    """The orchestrator commands run in order on a tiny model, and so do the Python blocks.

    All tests share one Ray, and all commands one worker; the commands are called in this process,
    which is in that Ray.
    """
    monkeypatch.chdir(write_inputs(tmp_path, checkpoint))
    with warm_workers():
        for language, body in blocks(README):
            if language == "python":
                exec(compile(body, "README.md", "exec"), {})
            for words in commands(body) if language == "sh" else ():
                if words[0] == "orchestrator":
                    more = ["--workers", "1"] if words[1] in ON_WORKERS else []
                    assert perform(words, *more)[0] == 0, f"{words}: {capfd.readouterr().err}"
    assert (tmp_path / "small-dense" / "config.json").is_file()
    assert not (tmp_path / "small.run").exists()


@pytest.fixture(scope="module")
def prepared(checkpoint, tmp_path_factory):
    """A directory with the names that the pages use, one of them the shared run `small`."""
    root = write_inputs(tmp_path_factory.mktemp("pages"), checkpoint)
    with contextlib.chdir(root):
        flags = "--preset fast --keep 0.8 --calibration text.txt --samples 64 --sequence-length 512"
        words = ["orchestrator", "compress", "dense", "small", *flags.split()]
        assert perform(words, *LOCAL, *FEW)[0] == 0
    return root


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, prepared, tmp_path, monkeypatch, capfd):
    """Commands end with 0, examples in Python and TOML are valid, and outputs are the real ones."""
    root = shutil.copytree(prepared, tmp_path / "page")
    monkeypatch.chdir(root)
    found = blocks(page)
    namespace, output = {}, ""
    for (language, body), after in zip(found, [*found[1:], ("", "")], strict=True):
        has_output = after[0] == "text"
        if language == "python":
            exec(compile(body, page.name, "exec"), namespace)
        elif language == "toml":
            make_recipe(tomllib.loads(body))
        elif language == "text":
            assert [line for line in body.splitlines() if line not in output] == []
        elif language in ("sh", "console"):
            for words in commands(body):
                if language == "sh" or (has_output and words[0] == "orchestrator"):
                    more = LOCAL if words[1] in ON_WORKERS else ()
                    more += FEW if words[1] in READS_TEXT else ()
                    code, output = perform(words, *more)
                    assert code == 0 or has_output, f"{words}: {capfd.readouterr().err}"
                elif words[0] == "orchestrator":
                    check_parses(words[1:])


def check_parses(arguments):
    """Check a command that cannot run here, and the one that it submits."""
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    if "--help" in arguments:
        assert perform(["orchestrator", *arguments])[0] == 0
        return
    options = make_parser().parse_args(arguments)
    if options.command == "submit":
        assert options.parse(options.program).command in VERBS


def test_messages_about_models_are_those_of_the_program():
    """The parts of messages that docs/models.md quotes are in the sources."""
    table = (ROOT / "docs" / "models.md").read_text().partition("| message")[2]
    cells = [line.split("|")[2] for line in table.splitlines()[2:] if line.startswith("|")]
    quoted = [part for cell in cells for part in re.findall(r"`([^`]{12,})`", cell)]
    assert len(quoted) > 5
    sources = [*(ROOT / "orchestrator" / "models" / "survey").glob("*.py")]
    text = "".join(path.read_text() for path in sources)
    assert [part for part in quoted if part not in text] == []


class Text(HTMLParser):
    """Text of a page, without markup."""

    def __init__(self, page):
        super().__init__()
        self.parts = []
        self.feed(page.read_text())

    def handle_data(self, data):
        self.parts.append(data)

    def __str__(self):
        return " ".join("".join(self.parts).split())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, built strictly: a dead link is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    return out


def test_the_reference_has_every_field_and_verb(site):
    """Generated pages have the names and help texts of the program, and the public functions."""
    recipe = str(Text(site / "reference" / "recipe.html"))
    assert [name for name in described(Recipe) if name not in recipe] == []
    shown = str(Text(site / "reference" / "commands.html"))
    assert [verb for verb in VERBS if verb not in shown] == []
    assert "--keep-bytes FRACTION" in shown
    python = (site / "reference" / "python.html").read_text()
    names = [f'id="orchestrator.api.{name}"' for name in api.__all__]
    assert [name for name in names if name not in python] == []
    options = str(Text(site / "reference" / "options.html"))
    assert "mgaa.t" in options
    assert "Largest fraction that may be removed of one linear." in options


def test_the_home_page_is_the_readme(site):
    """The picture of the README is a file of the site."""
    home = (site / "index.html").read_text()
    (picture,) = re.findall(r'<img src="([^"]+)"', home)
    assert (site / picture).is_file()
    assert "What it gives" in str(Text(site / "index.html"))
