"""The README is short; its commands and those of the pages in docs/ work.

`docs_blocks` says what each kind of block is. Those in `sh` and `python` run in the order of their
page, on a tiny model, with the placeholders of `PLACES` replaced. A block in `console` cannot run
here: a comment above it says why, and its commands are parsed. Lines of a `text` block are in the
output of the command above it.
"""

import argparse
import contextlib
import io
import json
import re
import shutil
import tomllib

import pytest
import yaml
from benchmarks.__main__ import SUBCOMMANDS
from command_lines import check_ray_command
from docs_blocks import LANGUAGES, PAGES, README, ROOT, blocks, commands, prose
from pipeline import SENTENCES, add_tokenizer, with_tokenizer
from pools import warm_workers

from orchestrator.cli.main import main
from orchestrator.cli.parser import make_parser
from orchestrator.cli.verbs import VERBS
from orchestrator.recipe.recipe import make_recipe

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
ON_WORKERS = {"compress", "retarget", "evaluate", "search"}
READS_TEXT = ON_WORKERS - {"retarget"}
LOCAL = ("--executor", "local")
FEW = ("--samples", "6", "--sequence-length", "48")
"""Flags that follow those of a page, and so replace them: without Ray, on little text."""
OTHERS = {"cd", "convert_hf_to_gguf.py", "export", "git", "hf", "kubectl", "lm_eval", "sbatch"}
OTHERS |= {"sglang", "transformers", "vllm"}
"""Programs of others in commands of the pages, which are not checked further."""
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


def write_inputs(root, checkpoint):
    """Write the files that the README and the pages name."""
    add_tokenizer(with_tokenizer(checkpoint("llama"), root / "dense"))
    (root / "text.txt").write_text(SENTENCES * 220)
    (root / "held-out.txt").write_text(SENTENCES[::-1] * 40)
    said = [{"role": "user", "content": SENTENCES}, {"role": "assistant", "content": SENTENCES}]
    (root / "chats.jsonl").write_text(f"{json.dumps({'messages': said})}\n" * 4)
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


@pytest.mark.parametrize("page", [README, CONTRIBUTING, *PAGES], ids=lambda page: page.stem)
def test_what_does_not_run_says_why(page):
    """Blocks are of a known kind, and exactly those in `console` have the comment about it."""
    for block in blocks(page):
        assert block.language in LANGUAGES, block.body
        assert bool(block.why) == (block.language == "console"), block.body
    # no comment stands elsewhere, and no fence is left over
    text = re.sub(r"`[^`\n]+`", "", prose(page))
    assert "<!-- parsed" not in text
    assert "```" not in text


def test_every_command_is_known():
    """Commands of `sh` blocks are ours; the two scripts are not run below."""
    shells = [
        each.body for page in (README, *PAGES) for each in blocks(page) if each.language == "sh"
    ]
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
        for block in blocks(README):
            if block.language == "python":
                exec(compile(block.body, "README.md", "exec"), {})
            for words in commands(block.body) if block.language == "sh" else ():
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
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem
)
def test_the_blocks_of_a_page_run(page, prepared, tmp_path, monkeypatch, capfd):
    """Commands end with 0, or with the output below them; Python runs, data are valid."""
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "page"))
    found = blocks(page)
    namespace, output = {}, ""
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language == "python":
            exec(compile(block.body, page.name, "exec"), namespace)
        elif block.language == "text":
            assert [line for line in block.body.splitlines() if line not in output] == []
        elif block.language == "sh":
            for words in commands(block.body):
                more = LOCAL if words[1] in ON_WORKERS else ()
                more += FEW if words[1] in READS_TEXT else ()
                code, output = perform(words, *more)
                may_fail = after is not None and after.language == "text"
                assert code == 0 or may_fail, f"{words}: {capfd.readouterr().err}"
        else:
            check_data(block)


def check_data(block):
    """Read a block of data as what it is."""
    if block.language == "toml":
        make_recipe(tomllib.loads(block.body))
    elif block.language == "yaml":
        assert isinstance(yaml.safe_load(block.body), dict)
    elif block.language == "json":
        assert all(isinstance(json.loads(line), dict) for line in block.body.splitlines())


def parsed_only():
    """Commands of the README and of all pages that do not run here."""
    shells = [
        (page, each.body)
        for page in (README, CONTRIBUTING, *PAGES)
        for each in blocks(page)
        if each.language == "console"
    ]
    return [(page.stem, words) for page, body in shells for words in commands(body)]


@pytest.mark.parametrize(("page", "words"), parsed_only(), ids=lambda value: str(value)[:60])
def test_a_command_that_does_not_run_here_is_valid(page, words):
    """Our verbs parse, the ones that are submitted too; files, extras and options of Ray exist."""
    for name in words:
        assert not name.startswith("scripts/") or (ROOT / name).exists(), name
    if words[0] in ("orchestrator", "ssh"):
        check_parses(words[words.index("orchestrator") + 1 :])
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = re.findall(r"\[([\w-]+)\]", " ".join(words))
        assert set(wanted) <= extras["optional-dependencies"].keys()
    elif words[0] == "ray":
        check_ray_command(words[1:])
    elif words[0] == "python":
        compile(words[words.index("-c") + 1], page, "exec")
    elif words[0] == "scripts/benchmark":
        assert words[1] in SUBCOMMANDS
    else:
        assert words[0] in OTHERS or words[0].startswith("scripts/"), words


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


@pytest.mark.parametrize("page", [README, CONTRIBUTING, *PAGES], ids=lambda page: page.stem)
def test_flags_in_the_text_exist(page):
    """A verb in the text, `evaluate --tasks NAME`, has the flags that are written after it."""
    parser = make_parser()
    (verbs,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for code in re.findall(r"`([^`]+)`", prose(page)):
        words = code.split()
        if words[0] == "orchestrator" and len(words) > 1:
            words = words[1:]
            assert words[0] in VERBS or words[0].startswith(("-", ".", "VERB")), code
        if words[0] in VERBS and words[0] != "lm-eval":
            known = verbs.choices[words[0]]._option_string_actions.keys()
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            # what follows -- is for another verb
            assert given - known - {"--"} == set(), code


def test_sections_of_the_report_are_those_of_the_page(prepared, monkeypatch, capsys):
    """The table of docs/report.md has every section of a report, and four that this one lacks."""
    monkeypatch.chdir(prepared)
    assert perform(["orchestrator", "report", "small.run", "--output", "page.html"])[0] == 0
    sections = re.findall(r"<h2[^>]*>(.*?)</h2>", (prepared / "page.html").read_text())
    rows = re.findall(r"^\| ([A-Z][^|]*) \|", (ROOT / "docs" / "report.md").read_text(), re.M)
    assert [name for name in rows if name not in sections] == [
        "Experts",
        "Plans of the search",
        "Before and after",
        "Speed",
    ]
    assert [name for name in sections if name not in rows] == []


def test_the_table_of_machines_is_what_plan_says(tmp_path, monkeypatch):
    """Each row of the tutorial is a forecast: memory of a worker, and both durations."""
    monkeypatch.chdir(tmp_path)
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256}
    for name, config in (("", MISTRAL), ("Llama-3-8B, ", MISTRAL | llama)):
        (tmp_path / (name or "mistral")).mkdir()
        (tmp_path / (name or "mistral") / "config.json").write_text(json.dumps(config))
    row = r"^\| `(\w+)`, (Llama-3-8B, )?(\d) (\S+) \| (.*?) \| (.*?) \| (.*?) \|$"
    rows = re.findall(row, (ROOT / "docs" / "tutorial.md").read_text(), re.M)
    assert len(rows) == 4
    for preset, name, count, gpu, *figures in rows:
        words = ["plan", name or "mistral", "--keep", "0.8", "--preset", preset]
        code, said = perform(["orchestrator", *words, "--gpus", count, "--gpu", gpu])
        assert code == 0
        # the durations are on one line, the last one of the table of stages
        assert re.search(rf"^together .*\s{figures[1]}\s+{figures[2]}$", said, re.M), said
        assert figures[0] in said


def test_messages_about_models_are_those_of_the_program():
    """The parts of messages that docs/models.md quotes are in the sources."""
    table = (ROOT / "docs" / "models.md").read_text().partition("| message")[2]
    cells = [line.split("|")[2] for line in table.splitlines()[2:] if line.startswith("|")]
    quoted = [part for cell in cells for part in re.findall(r"`([^`]{12,})`", cell)]
    assert len(quoted) > 5
    models = ROOT / "orchestrator" / "models"
    sources = [path for name in ("survey", "experts") for path in (models / name).glob("*.py")]
    text = "".join(path.read_text() for path in sources)
    assert [part for part in quoted if part not in text] == []
