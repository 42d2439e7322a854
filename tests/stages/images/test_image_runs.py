"""Calibration and evaluation on records with images, from the command line to the report."""

import json

import pytest
import torch
from image_text.processors import add_processor, write_records
from pipeline import contents, run, with_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText

from orchestrator.cli.main import main
from orchestrator.errors import StoppedError
from orchestrator.models.evaluation.scoring import score
from orchestrator.models.shards.chunk import Chunk
from orchestrator.stages.context.tokens import first_chunk, read_tokens
from orchestrator.stages.context.worker.compress_worker import CompressionWorker
from orchestrator.store.run import RunDirectory

pytest.importorskip("PIL")
TEXTS = ("a <image> b and more", "<image> what is it", "two <image> and <image>.", "text alone")


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    dense = with_tokenizer(checkpoint("llava"), tmp_path_factory.mktemp("dense") / "llava")
    return add_processor("llava", dense)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records with an image, with two, and without one."""
    given = [
        {"text": text, "images": [f"pictures/{n + k}.png" for k in range(text.count("<image>"))]}
        for n, text in enumerate(TEXTS)
    ]
    return write_records(tmp_path_factory.mktemp("records") / "a.jsonl", given, 4)


@pytest.fixture(scope="module")
def result(model, records, tmp_path_factory):
    """Two-sided statistics of the records, in two shards."""
    out = tmp_path_factory.mktemp("result") / "out"
    return run(model, out, records, method="two-sided", samples=4, shards=2)


def test_one_shard_and_two_give_the_same_bytes(model, records, result, tmp_path):
    """Gradients and Grams with images do not depend on the cut; text alone gives other factors."""
    one = run(model, tmp_path / "one", records, method="two-sided", samples=4, shards=1)
    assert contents(one.out) == contents(result.out)
    text = tmp_path / "text.jsonl"
    given = [{"text": each.replace("<image>", "")} for each in TEXTS]
    write_records(text, given)
    alone = run(
        model, tmp_path / "alone", text, method="two-sided", samples=4, layout="padded", shards=1
    )
    name = "model.safetensors"
    assert (alone.out / name).read_bytes() != (result.out / name).read_bytes()


@pytest.mark.parametrize("passed", [2, 6])
def test_a_stopped_run_is_resumed_to_the_same_bytes(
    model, records, result, tmp_path, monkeypatch, passed
):
    """Stopped between two chunks of the first shard, and between two gradients of the second one:
    images and features are read again from the run directory, to the same bytes."""
    step, steps = CompressionWorker.step, []

    def stop(worker, index, emit, record):
        if len(steps) == passed:
            raise StoppedError("enough")
        steps.append((worker.open_pass.opened.blocks.start, index))
        return step(worker, index, emit, record)

    fields = {"method": "two-sided", "samples": 4, "shards": 2}
    with monkeypatch.context() as patch:
        patch.setattr(CompressionWorker, "step", stop)
        with pytest.raises(StoppedError):
            run(model, tmp_path / "out", records, **fields)
    assert steps == [(block, n) for block in (0, 2) for n in range(4)][:passed]
    again = run(model, tmp_path / "out", records, **fields)
    assert contents(again.out) == contents(result.out)


def test_the_report_counts_images_and_tokens(result):
    """Four images of 16 tokens; all other tokens are text."""
    found = result.report["calibration"]
    assert (found["images"], found["image_tokens"]) == (4, 64)
    assert found["text_tokens"] == found["tokens_used"] - 64
    assert found["documents_skipped"] == 0


def test_training_counts_tokens_of_text(model, records, tmp_path):
    """The tokens of its throughput are those of text in the sequences of its steps."""
    out, training = tmp_path / "out", {"epochs": 2, "batches": 1, "held_out": 0.25}
    fields = {"samples": 4, "method": "svd", "train": "light", "options": {"training": training}}
    found = run(model, out, records, **fields).report
    by_sequence = [len(text.replace("<image>", "")) for text in TEXTS]
    trained = found["timings"]["train"]["tokens"]
    assert trained in {2 * (sum(by_sequence) - each) for each in by_sequence}


def test_evaluation_scores_text_tokens_of_records_with_images(
    model, records, result, tmp_path, capsys
):
    """The perplexity is that of the whole model over text tokens alone, images given."""
    out, run_dir = str(result.out), tmp_path / "evaluation"
    asked = ["evaluate", out, "--against", str(model), "--text", records, "--executor", "local"]
    assert main([*asked, "--shards", "2", "--run-dir", str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    key = next(path.parent.name for path in run_dir.rglob("images.safetensors") if path.is_file())
    tokens = read_tokens(RunDirectory(run_dir), key)
    whole = AutoModelForImageTextToText.from_pretrained(model)
    losses, predictions = [], 0
    for row in range(4):
        chunk = first_chunk(tokens, row)
        with torch.no_grad():
            logits = whole(
                input_ids=chunk.tokens, attention_mask=chunk.mask.long(), **chunk.inputs
            ).logits
        real = int(chunk.mask.sum())
        labels = torch.from_numpy(tokens.ids[row, 1:real].astype("int64"))
        labels[torch.from_numpy(tokens.is_image[row, 1:real])] = -100
        losses.append(cross_entropy(logits[0, : real - 1], labels).item())
        predictions += int((labels != -100).sum())
    expected = torch.tensor(losses).double().mean().exp().item()
    assert found["models"]["against"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["predictions"] == predictions
    assert found["text"]["images"] == 4


def test_predictions_of_image_tokens_do_not_count():
    """A token counts where the next one is text; those of images never do."""
    tokens_BT, mask_BT = torch.tensor([[5, 9, 9, 6, 7, 0]]), torch.tensor([[True] * 5 + [False]])
    chunk = Chunk(0, tokens_BT, mask_BT, images=tokens_BT == 9)
    assert chunk.predicting.tolist() == [[False, False, True, True, True, False]]
    logits_BTV = torch.randn(1, 6, 11, generator=torch.Generator().manual_seed(0))
    found = score(tokens_BT, mask_BT, logits_BTV, None, predicting_BT=chunk.predicting)
    expected = cross_entropy(logits_BTV[0, 2:4], tokens_BT[0, 3:5], reduction="sum")
    assert found.predictions == 2
    assert found.loss == pytest.approx(expected.item())


def test_a_record_without_its_image_ends_the_run(model, tmp_path, capsys):
    """One line on standard error, exit code 4, and no output directory."""
    source = write_records(tmp_path / "a.jsonl", [{"text": "<image>", "images": ["none.png"]}])
    asked = ["compress", str(model), str(tmp_path / "out"), "--method", "svd", "--keep", "0.5"]
    assert main([*asked, "--calibration", source, "--executor", "local"]) == 4
    lines = capsys.readouterr().err.strip().splitlines()
    assert "a.jsonl, line 1, image 1 'none.png': no such file in" in lines[-1]
    assert not (tmp_path / "out").exists()
