"""The wheel of the source distribution, installed in an environment of its own, performs every verb
outside the checkout."""

import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import forking
import pytest
from pipeline import write_llama, write_text

from orchestrator.cli.verbs import VERBS
from orchestrator.version import __version__

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "orchestrator"
BUILD = """
import os, sys, tarfile
from setuptools.build_meta import build_sdist, build_wheel

dist, unpacked = sys.argv[1:]
archive = build_sdist(dist)
with tarfile.open(os.path.join(dist, archive)) as tar:
    # `filter` is an argument since Python 3.11.4
    tar.extraction_filter = getattr(tarfile, "data_filter", None)
    tar.extractall(unpacked)
os.chdir(os.path.join(unpacked, archive.removesuffix(".tar.gz")))
build_wheel(dist)
"""
"""Builds the source distribution, and from its files alone the wheel."""
SMALL = ("--executor", "local", "--samples", "4", "--sequence-length", "32")
HALF = ("--calibration", "text.txt", "--keep", "0.5", *SMALL)
VARIED = ("--vary", "sampling=first,random", "--text", "held-out.txt", "--text-samples", "2")
CALLS = {
    "methods": (["methods"], 0, "two-sided"),
    "measure": (["measure", "rates.json"], 0, "rates.json"),
    "plan": (["plan", "dense", *HALF], 0, "H100"),
    "compress": (["compress", "dense", "out", *HALF], 0, "kept fraction"),
    "retarget": (["retarget", "out.run", "less", "--keep", "0.4"], 0, "kept fraction"),
    "search": (["search", "dense", "found", *HALF, *VARIED], 0, "best"),
    "evaluate": (
        ["evaluate", "out", "--against", "dense", "--text", "held-out.txt", *SMALL],
        0,
        "mean KL divergence from the dense model",
    ),
    "lm-eval": (["lm-eval", "--help"], 0, "arguments of lm_eval"),
    "bench": (["bench", "out", "--batch", "1", "--length", "4"], 0, "prefill, 1 x 4"),
    "verify": (["verify", "out", "--against", "dense"], 0, "as reported"),
    "export": (["export", "out", "dense-again"], 0, "dense-again"),
    "push": (["push", "out", "someone/tiny", "--dry-run"], 0, "## Reproduce"),
    "status": (["status", "out.run"], 0, "done"),
    "watch": (["watch", "out"], 4, "its run directory is"),
    "report": (["report", "out.run"], 0, "report.html"),
    "compare": (["compare", "out", "less"], 0, "comparison.html"),
    "clean": (["clean", "found.run"], 0, "found.run"),
    "doctor": (["doctor"], 0, "ok       transformers"),
    "completion": (["completion", "bash"], 0, "complete -o"),
    "submit": (["submit", "--", "compress", "dense", "out"], 2, "give an absolute path"),
}
"""Arguments, exit code and a part of the output of each verb; of submit and watch only
the checks that precede the network."""
PERFORM = """
import contextlib, importlib.metadata, io, json, sys

# a forked process has that of the one that it is forked from
sys.executable = sys.argv[1]
(entry,) = importlib.metadata.entry_points(group="console_scripts", name="orchestrator")
main = entry.load()
found = {}
for verb, arguments in json.load(sys.stdin).items():
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        found[verb] = main(arguments), said.getvalue()
print(json.dumps({"file": sys.modules["orchestrator"].__file__, "found": found}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution of a copy: a build writes into its sources, and
    reads what an earlier one left there."""
    sources, dist, unpacked = map(tmp_path_factory.mktemp, ("sources", "dist", "unpacked"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, sources / PACKAGE.name, ignore=left_out)
    command = [sys.executable, "-c", BUILD, dist, unpacked]
    subprocess.run(command, cwd=sources, check=True, capture_output=True)
    return dist / f"orchestrator-{__version__}-py3-none-any.whl"


def test_the_wheel_has_every_file_of_the_package(wheel):
    """Data files too."""
    files = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Results of one process in an environment with the wheel and the libraries of this one.

    A line of a .pth file adds these libraries without their own .pth files, by which an editable
    installation makes the checkout importable. The process is forked with the imports of torch and
    transformers, which are the same libraries.
    """
    directory = tmp_path_factory.mktemp("installed")
    environment, elsewhere = directory / "venv", directory / "elsewhere"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    options = ["--no-deps", "--no-index", "--no-cache-dir", "--no-compile"]
    options.append("--disable-pip-version-check")
    # with the checkout in its path, pip would take it for the installed package
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*pip, *options, wheel], check=True, capture_output=True, env=bare)
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "libraries.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    write_llama(elsewhere / "dense", blocks=2, hidden=32)
    write_text(elsewhere / "text.txt")
    write_text(elsewhere / "held-out.txt", characters=1000)
    forking.fork_processes()
    forked = {"FORK_SERVER": os.environ["FORK_SERVER"], "FORKED": "all"}
    done = subprocess.run(
        [python, "-c", PERFORM, python],
        cwd=elsewhere,
        env=bare | forked | {"PYTHONPATH": str(forking.HERE)},
        input=json.dumps({verb: arguments for verb, (arguments, _, _) in CALLS.items()}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["file"]).is_relative_to(own)
    return found["found"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", CALLS)
def test_a_verb_works_outside_the_checkout(verb, installed):
    """The smallest real use of each verb ends with its exit code and its output."""
    _, code, says = CALLS[verb]
    found, said = installed[verb]
    assert found == code, said
    assert says in said


def test_every_verb_is_tried():
    assert CALLS.keys() == VERBS.keys()
