"""The trial: what newcomers and hostile users give ends with one line, through the console script.

The first case of each verb and exit code runs through the installed script itself, the others in
this process through the entry point that it calls. `tests/project/test_wheel.py` performs every
verb with valid arguments in an environment of its own.
"""

import json
import os
import shlex
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from drivers import start
from forking import fork_processes
from pipeline import add_tokenizer, write_text
from trial_cases import CASES, INSTALLED

import orchestrator

RECIPE = '[compress]\nmodel = "dense"\nkeep = 0.5\n'


@pytest.fixture(scope="module")
def workspace(checkpoint, tmp_path_factory):
    """Directory with a tiny model, a text, and things that look like a model; not to be changed."""
    root = tmp_path_factory.mktemp("trial")
    for name in ("dense", "untokenised"):
        (root / name).mkdir()
        for path in checkpoint("llama").iterdir():
            (root / name / path.name).write_bytes(path.read_bytes())
    add_tokenizer(root / "dense")
    write_text(root / "text.txt")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "someone/base"}
    for name, content in {
        "lora/adapter_config.json": json.dumps(adapter).encode(),
        "lora/adapter_model.safetensors": b"\2\0\0\0\0\0\0\0{}",
        "model.gguf": b"GGUF",
        "ggufs/small-Q4.gguf": b"GGUF",
        "table.toml": RECIPE.encode(),
        "latin.txt": "a small café ".encode("latin-1") * 99,
        "utf16.txt": ("a river " * 99).encode("utf-16"),
        "empty.txt": b"",
        "table.csv": b"text",
        "small.parquet": b"PAR1",
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere")
    return root


def words(arguments, out):
    """Return the arguments of a case as a list."""
    split = shlex.split(arguments) if isinstance(arguments, str) else arguments
    return [str(out) if word == "OUT" else word for word in split]


def check(code, said, case):
    """Assert the exit code, and that one line on stderr, after those of progress, is the error."""
    _, expected, says = case
    output, error = said
    lines = [line for line in error.splitlines() if not line.startswith("[")]
    if output.startswith("wrong: "):
        # problems are the result of `verify`
        lines, output = [output.replace("wrong", "orchestrator: error").strip()], ""
    assert (code, len(lines), output) == (expected, 1, ""), (output, error)
    assert lines[0].startswith("orchestrator: error: ")
    assert says in lines[0]
    assert "Traceback" not in error
    assert len(lines[0]) < 600


def named(case):
    """Name of a case in the list of tests."""
    return str(case[0]).replace("/", "|")


@pytest.mark.parametrize("case", [case for case in CASES if case not in INSTALLED], ids=named)
def test_a_case_is_refused_in_one_line(case, workspace, tmp_path, monkeypatch, capsys):
    """Exit code and line are those of the case, and no output looks complete."""
    monkeypatch.chdir(workspace)
    (script,) = entry_points(group="console_scripts", name="orchestrator")
    before = sorted(workspace.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        sys.exit(script.load()(words(case[0], tmp_path / "out")))
    check(ended.value.code, capsys.readouterr(), case)
    assert not (tmp_path / "out" / "config.json").exists()
    assert sorted(workspace.rglob("*")) == before


@pytest.mark.parametrize("case", INSTALLED, ids=named)
def test_the_installed_script_says_the_same(case, workspace, tmp_path):
    """The script that pip installs, from another directory than the checkout."""
    before = sorted(workspace.rglob("*"))
    script = Path(sys.executable).with_name("orchestrator")
    fork_processes()
    paths = [str(Path(orchestrator.__file__).parents[1]), os.environ["PYTHONPATH"]]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    process = start(script, *words(case[0], tmp_path / "out"), cwd=workspace, env=environment)
    said = process.communicate()
    check(process.returncode, said, case)
    assert sorted(workspace.rglob("*")) == before
