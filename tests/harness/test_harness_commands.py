"""Compressed checkpoints in the harness's own command line: log-likelihoods and scores."""

import json
from functools import partial
from pathlib import Path

import pytest
from benchmarks.zero_shot import continuations
from drivers import start
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from orchestrator import load
from orchestrator.cli.main import main
from orchestrator.models.inputs.tokenizer import load_tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")
PLAIN = """
import sys
from functools import partial

sys.modules["orchestrator"] = None  # as where it is not installed
import lm_eval.tasks

# a list of its own 13,000 files of tasks takes many seconds
lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
from lm_eval.__main__ import cli_evaluate

cli_evaluate()
"""


def arguments_of(place, output, *model_arguments):
    """Arguments of the harness for the task `ships`, whose samples are written too."""
    # the tiny tokenizer has no token for the begin of a text
    loaded = [f"pretrained={place / 'out'}", "dtype=float32", "prefix_token_id=0", *model_arguments]
    words = ["--model", "hf", "--model_args", ",".join(loaded), "--device", "cpu"]
    words += ["--tasks", "ships", "--include_path", place / "tasks", "--batch_size", "8"]
    return [*map(str, words), "--log_samples", "--output_path", str(output)]


@pytest.fixture(scope="module")
def plainly(place, tmp_path_factory):
    """Directory of what `lm_eval` writes where orchestrator is not installed."""
    root = tmp_path_factory.mktemp("plain")
    # the code of the checkpoint is copied there
    with_home = {"HF_HOME": str(root / "home")}
    arguments = arguments_of(place, root / "found", "trust_remote_code=True")
    process = start("-c", PLAIN, *arguments, env=with_home, cwd=root)
    said = process.communicate()
    assert process.returncode == 0, said
    return root / "found"


@pytest.fixture(scope="module")
def through_ours(place, tmp_path_factory):
    """Directory of what `orchestrator lm-eval` writes in a process that knows no form yet."""
    root = tmp_path_factory.mktemp("ours")
    with pytest.MonkeyPatch.context() as patch:
        import lm_eval.tasks

        own = partial(lm_eval.tasks.TaskManager, include_defaults=False)
        patch.setattr(lm_eval.tasks, "TaskManager", own)
        for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
            patch.delitem(mapping, "orchestrator")
        assert main(["lm-eval", *arguments_of(place, root / "found")]) == 0
    return root / "found"


def read(found):
    """Scores of the task, and the log-likelihoods of the choices by document."""
    (results,) = Path(found).rglob("results_*.json")
    (samples,) = Path(found).rglob("samples_ships_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    likelihoods = [[float(pair[0]) for pair in row["filtered_resps"]] for row in rows]
    return json.loads(results.read_text())["results"]["ships"], likelihoods


@pytest.mark.parametrize("way", ["plainly", "through_ours"])
def test_log_likelihoods_are_those_of_the_loaded_model(way, place, report, request):
    """Every choice has the log-likelihood that a loop over the loaded model gives it; accuracy and
    standard error are also those of `evaluate --tasks`."""
    scores, likelihoods = read(request.getfixturevalue(way))
    model, tokenizer = load(place / "out", dtype="float32"), load_tokenizer(place / "out")
    lines = (place / "tasks" / "documents.jsonl").read_text().splitlines()
    right = []
    for line, found in zip(lines, likelihoods, strict=True):
        item = json.loads(line)
        choices = [f" {choice}" for choice in item["choices"]]
        by_hand, _ = continuations(
            model, tokenizer, f"Question: {item['question']}\nAnswer:", choices
        )
        assert found == pytest.approx(by_hand, abs=1e-4)
        right.append(by_hand.index(max(by_hand)) == item["gold"])
    ours = report["tasks"][0]["model"]
    assert scores["acc,none"] == pytest.approx(sum(right) / len(right)) == ours["value"]
    assert scores["acc_stderr,none"] == pytest.approx(ours["stderr"])
    assert 0 < sum(right) < len(right)
