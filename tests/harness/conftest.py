"""A small task in local files, a dense and a compressed model, and their evaluation."""

import json
import shutil

import pytest
from pipeline import run, write_llama, write_text

from orchestrator import api

QUESTIONS = ("ships past the mill", "salt and rope", "who built the bridge", "the inn by the sea")
CHOICES = ("a river", "42 ships", "nobody", "rope & salt")
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
  cache_dir: {cache}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0{metadata}}}
"""


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    """A dense and a compressed model, and a directory with a task, one with a chance level, and one
    without documents."""
    root = tmp_path_factory.mktemp("tasks")
    dense = write_llama(root / "dense", blocks=2, hidden=32)
    run(dense, root / "out", write_text(root / "text.txt"), keep=0.3)
    # the same model a second time, for comparisons
    shutil.copytree(root / "out", root / "twin")
    documents = [
        {"question": f"{n} {question}", "choices": CHOICES, "gold": (n + i) % 4}
        for n in range(6)
        for i, question in enumerate(QUESTIONS)
    ]
    tasks = root / "tasks"
    tasks.mkdir()
    (tasks / "documents.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    for name, file, metadata in (
        ("ships", "documents", ""),
        ("guessed", "documents", ", chance: 0.1"),
        ("missing", "nowhere", ""),
    ):
        given = {"file": tasks / f"{file}.jsonl", "cache": root / "cache", "metadata": metadata}
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, **given))
    return root


@pytest.fixture(scope="package")
def report(place):
    """The report of two tasks; shared, not to be changed."""
    given = {"tasks": ["ships", "guessed"], "task_dir": place / "tasks", "executor": "local"}
    return api.evaluate(place / "out", against=str(place / "dense"), dtype="float32", **given)
