"""Two-sided compression of tiny models: gradients flow back through the shards."""

import os
import signal

import pytest
import torch
from pipeline import contents, run, with_tokenizer, write_llama

import orchestrator
from orchestrator.runtime.calls import Open
from orchestrator.stages.context.worker.compress_worker import CompressionWorker

TOKENS = torch.arange(2, 34)[None] * 5 % 96


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama6") / "dense", blocks=6)


def compress(llama, out, text, **fields):
    return run(llama, out, text, method="two-sided", **fields)


@pytest.fixture(scope="module")
def reference(llama, text, tmp_path_factory):
    """Result in one process and one shard, without a boundary."""
    out = tmp_path_factory.mktemp("reference") / "out"
    compress(llama, out, text, shards=1)
    return contents(out)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gemma3", "phi3", "falcon"])
def test_families_are_compressed_two_sided(family, checkpoint, text, tmp_path):
    """The budget is met from below, and the loaded model is finite."""
    model = with_tokenizer(checkpoint(family), tmp_path / "dense")
    result = compress(model, tmp_path / "out", text, shards=2, keep=0.6)
    assert 0.55 < result.report["kept"]["linears"] <= 0.6
    assert bool(orchestrator.load(result.out)(input_ids=TOKENS).logits.isfinite().all())


@pytest.mark.parametrize("shards", [2, 6])
def test_the_cut_changes_no_bit(shards, llama, text, reference, tmp_path):
    """For any place of the boundaries the output is byte-identical, and no chunk remains."""
    result = compress(llama, tmp_path / "out", text, shards=shards)
    assert contents(tmp_path / "out") == reference
    assert not [path for path in (result.run_dir / "chunks").rglob("*") if path.is_file()]


@pytest.mark.ray
@pytest.mark.parametrize(("workers", "shards"), [(1, 3), (3, 6)])
def test_the_number_of_workers_changes_no_bit(
    workers, shards, llama, text, reference, tmp_path, ray_workers
):
    """Actors write the same as one process without Ray."""
    fields = {"executor": "ray", "workers": workers, "shards": shards}
    compress(llama, tmp_path / "out", text, **fields)
    assert contents(tmp_path / "out") == reference


@pytest.mark.ray
@pytest.mark.parametrize("units", [0, 3])
def test_a_killed_actor_costs_no_bit(units, llama, text, reference, tmp_path, ray_workers):
    """Killed before or between the units of the backward pass, another gives the same result."""
    pids, killed = [], []

    def kill(event):
        if event["event"] == "workers":
            pids.extend(worker["pid"] for worker in event["workers"])
        due = event["event"] == "unit" if units else event["event"] == "workers"
        if due and not killed and event.get("done", 0) >= units:
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    fields = {"executor": "ray", "workers": 2, "shards": 6, "on_event": kill}
    compress(llama, tmp_path / "out", text, **fields)
    assert killed
    assert contents(tmp_path / "out") == reference


def test_labels_and_seed_are_part_of_the_result(llama2, text, tmp_path):
    """Another seed, however large, draws other labels; more draws are another statistic. A size
    needs neither."""
    run_dir = str(tmp_path / "run")
    compress(llama2, tmp_path / "out", text, run_dir=run_dir)
    weights = contents(tmp_path / "out")["model.safetensors"]
    compress(llama2, tmp_path / "seed", text, seed=2**60, run_dir=run_dir)
    assert contents(tmp_path / "seed")["model.safetensors"] != weights
    options = {"two-sided": {"draws": 2}}
    compress(llama2, tmp_path / "draws", text, options=options, run_dir=run_dir)
    assert contents(tmp_path / "draws")["model.safetensors"] != weights
    events = []
    compress(
        llama2,
        tmp_path / "size",
        text,
        keep=0.7,
        seed=2**60,
        run_dir=run_dir,
        on_event=events.append,
    )
    assert not any(e["event"] == "unit" and e["stage"] == "calibrate" for e in events)


def test_mgaa_divides_what_two_sided_factors_lose(llama, text, tmp_path):
    """Allocations can be combined: the cosines are also accumulated in the backward pass."""
    result = compress(llama, tmp_path / "out", text, allocation="mgaa", keep=0.6)
    plain = run(llama, tmp_path / "plain", text, method="mgaa", keep=0.6)
    kept = {}
    for name, found in (("two-sided", result), ("mgaa", plain)):
        for linear, entry in found.report["linears"].items():
            sublayer = (name, *linear.split(".")[2:4])
            kept[sublayer] = kept.get(sublayer, 0) + entry["values"]
    for (name, block, part), values in kept.items():
        # each sublayer's share follows its cosine, except where it does not fit
        assert values == pytest.approx(kept["mgaa", block, part], rel=0.05), (name, block, part)


def test_a_lost_boundary_chunk_is_made_again(llama, text, reference, tmp_path):
    """A file of the other pass that vanishes during the backward pass costs no block and no bit."""
    events = []

    def vanish(event):
        events.append(event)
        if event["event"] == "unit" and event["stage"] == "calibrate" and event["done"] == 1:
            (chunk,) = (tmp_path / "out.run" / "chunks").rglob("00002/0000003.safetensors")
            chunk.unlink()

    compress(llama, tmp_path / "out", text, shards=3, on_event=vanish)
    assert contents(tmp_path / "out") == reference
    assert [each["unit"] for each in events if each["event"] == "missing"]
    made = [each["unit"] for each in events if each["event"] == "unit" and "block" in each["unit"]]
    assert sorted(made) == [f"block {block}" for block in range(6)]


@pytest.mark.parametrize("is_backward", [False, True])
def test_gradients_that_do_not_fit_go_through_single_blocks(
    is_backward, llama, text, reference, tmp_path, monkeypatch
):
    """The same bytes, whichever of the two passes runs out of memory."""
    perform, lost = CompressionWorker.perform, []

    def fault(worker, command, record):
        if isinstance(command, Open) and bool(command.about) == is_backward:
            start, stop = command.blocks
            if stop - start > 1:
                raise MemoryError("cannot allocate 7 GB")
        return perform(worker, command, record)

    monkeypatch.setattr(CompressionWorker, "perform", fault)

    def note(event):
        if event["event"] == "lost":
            lost.append(event["decided"])

    compress(llama, tmp_path / "out", text, shards=3, on_event=note)
    assert contents(tmp_path / "out") == reference
    assert set(lost) == {"repeat in smaller parts"}
