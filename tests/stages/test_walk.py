"""Blocks processed in order as a stage of a run: compensation, refinement, any workers, resumed."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from pipeline import contents, run, token_chunks, with_tokenizer
from safetensors.torch import load_file

import orchestrator
from orchestrator.errors import UsageError
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.training.refine import refine
from orchestrator.models.training.refine_options import RefineOptions
from orchestrator.randomness import Randomness
from orchestrator.store.run import RunDirectory

TOKENS = torch.arange(2, 34)[None] * 5 % 96
SHORT = {"refinement": {"epochs": 3, "batches": 2, "learning_rate": 2e-4}}
BOTH = {"compensate": "blend", "refine": "in_order", "options": SHORT}


@pytest.fixture(scope="module")
def reference(llama, text, tmp_path_factory):
    """Compensated and refined in one process: the checkpoint, and its run directory."""
    out = tmp_path_factory.mktemp("reference") / "out"
    result = run(llama, out, text, **BOTH)
    return contents(out), result.run_dir


@pytest.fixture(scope="module")
def plain(llama, text, tmp_path_factory):
    """Run without a walk; the run directory is to be copied."""
    return run(llama, tmp_path_factory.mktemp("plain") / "out", text)


def test_losses_are_in_the_journal_epoch_by_epoch(reference):
    """Each epoch of a block adds one loss, before the unit that has all of them."""
    events = RunDirectory(Path(reference[1])).events()
    found = [each for each in events if each.get("stage") == "walk" and "losses" in each]
    kinds = [(each["event"], each["block"], len(each["losses"]["train"])) for each in found]
    assert kinds == [
        (kind, block, done)
        for block in range(4)
        for kind, done in (("epoch", 1), ("epoch", 2), ("epoch", 3), ("unit", 3))
    ]
    for last, unit in zip(found[2::4], found[3::4], strict=True):
        assert last["losses"] == unit["losses"]


@pytest.mark.parametrize("family", ["falcon", "phi3"])
def test_families_are_walked(family, checkpoint, text, tmp_path):
    """Every family's sites are found by its own forward pass; norms, biases, other layouts."""
    model = with_tokenizer(checkpoint(family), tmp_path / "dense")
    options = SHORT | {"compensation": {"basis": "kept"}}
    result = run(
        model, tmp_path / "out", text, compensate="anchored", refine="in_order", options=options
    )
    blocks = result.report["walk"]["blocks"].values()
    assert all(entry["after"] <= entry["before"] for entry in blocks)
    assert all(entry["refinement"]["after"] <= entry["refinement"]["before"] for entry in blocks)
    assert any(each["taken"] for entry in blocks for each in entry["linears"].values())
    assert bool(orchestrator.load(result.out)(input_ids=TOKENS).logits.isfinite().all())


def test_blocks_are_refined_behind_the_refined_ones(llama, text, plain, tmp_path):
    """Block by block the bits equal a refinement whose inputs come from the preceding blocks."""
    run_dir = str(shutil.copytree(plain.run_dir, tmp_path / "run"))
    result = run(llama, tmp_path / "out", text, refine="in_order", options=SHORT, run_dir=run_dir)
    stored = load_file(result.out / "model.safetensors")
    dense, compressed = LazyModel.open(llama), LazyModel.open(plain.out)
    options = RefineOptions(**SHORT["refinement"])
    targets = inputs = token_chunks(llama, text)
    for block in range(4):
        with dense.shard(range(block, block + 1)) as shard:
            targets = [shard.forward(chunk) for chunk in targets]
        with compressed.shard(range(block, block + 1)) as shard:
            refined = refine(shard, inputs, targets, options=options, randomness=Randomness(0))
            inputs = [shard.forward(chunk) for chunk in inputs]
        for name, tensor in refined.tensors.items():
            assert torch.equal(stored[name], tensor)
        entry = result.report["walk"]["blocks"][str(block)]
        assert entry["refinement"]["before"] == refined.start
        assert entry["after"] < entry["before"]


def test_a_sweep_is_a_walk_over_what_was_refined_apart(llama, text, plain, tmp_path):
    """Its bits equal refinement in order that starts from the blocks refined apart."""
    fields = {"options": SHORT, "run_dir": str(shutil.copytree(plain.run_dir, tmp_path / "run"))}
    apart = run(llama, tmp_path / "apart", text, refine="blocks", **fields)
    result = run(llama, tmp_path / "out", text, refine="swept", **fields)
    assert result.report["refine"] == apart.report["refine"]
    assert "walk" not in result.report
    stored = load_file(result.out / "model.safetensors")
    dense, refined_apart = LazyModel.open(llama), LazyModel.open(apart.out)
    targets = inputs = token_chunks(llama, text)
    for block in range(4):
        with dense.shard(range(block, block + 1)) as shard:
            targets = [shard.forward(chunk) for chunk in targets]
        with refined_apart.shard(range(block, block + 1)) as shard:
            refined = refine(
                shard,
                inputs,
                targets,
                options=RefineOptions(**SHORT["refinement"]),
                randomness=Randomness(0),
            )
            inputs = [shard.forward(chunk) for chunk in inputs]
        assert all(torch.equal(stored[name], tensor) for name, tensor in refined.tensors.items())
        entry = result.report["sweep"]["blocks"][str(block)]
        assert entry["refinement"]["after"] <= entry["refinement"]["before"]


@pytest.mark.parametrize("method", ["wanda", "basis-sharing"])
def test_forms_without_factors_of_their_own_are_refined_in_order(method, llama2, text, tmp_path):
    """Values on their support, and shared bases unchanged: held-out errors fall."""
    options = SHORT | ({"basis-sharing": {"refit": "never"}} if method == "basis-sharing" else {})
    result = run(llama2, tmp_path / "out", text, method=method, refine="in_order", options=options)
    entries = [entry["refinement"] for entry in result.report["walk"]["blocks"].values()]
    assert any(entry["after"] < entry["before"] for entry in entries)
    assert all(entry["after"] <= entry["before"] for entry in entries)


def test_blocks_without_a_cut_linear_are_gone_through(llama, text, tmp_path):
    """They do not change, before and between; after the last compressed block the walk ends."""
    options = {"target": ("re:.*layers\\.[02]\\..*",), "compensate": "anchored"}
    result = run(llama, tmp_path / "out", text, **options)
    blocks = result.report["walk"]["blocks"]
    assert list(blocks) == ["0", "1", "2"]
    assert "linears" not in blocks["1"]
    assert blocks["1"]["after"] > 0
    before, after = (load_file(each / "model.safetensors") for each in (llama, result.out))
    whole = [name for name in before if "layers.1." in name or "layers.3." in name]
    assert all(torch.equal(before[name], after[name]) for name in whole)


def test_where_nothing_is_cut_nothing_is_walked(llama2, text, tmp_path):
    """All linears dense: the stage has no unit, and the checkpoint is the dense one."""
    result = run(llama2, tmp_path / "out", text, keep=1.0, compensate="anchored")
    assert result.report["walk"]["blocks"] == {}
    before, after = (load_file(each / "model.safetensors") for each in (llama2, result.out))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_refinement_in_parallel_follows_the_walk(llama, text, plain, tmp_path):
    """The next stage starts from the compensated blocks: its own bits, on the result of the
    walk."""
    run_dir = str(shutil.copytree(plain.run_dir, tmp_path / "run"))
    options, fields = {"compensation": {"basis": "kept"}}, {"compensate": "anchored"}
    run(llama, tmp_path / "walked", text, options=options, run_dir=run_dir, **fields)
    events = []
    fields |= {"refine": "blocks", "options": SHORT | options, "run_dir": run_dir}
    result = run(llama, tmp_path / "out", text, on_event=events.append, **fields)
    assert not any(e["event"] == "unit" and e["stage"] == "walk" for e in events)
    assert "refinement" not in result.report["walk"]["blocks"]["0"]
    dense, compressed = LazyModel.open(llama), LazyModel.open(tmp_path / "walked")
    part, chunks = range(1, 2), token_chunks(llama, text)
    with dense.shard(range(1)) as shard:
        inputs = [shard.forward(chunk) for chunk in chunks]
    with dense.shard(part) as shard:
        targets = [shard.forward(chunk) for chunk in inputs]
    with compressed.shard(part) as shard:
        refined = refine(
            shard,
            inputs,
            targets,
            options=RefineOptions(**SHORT["refinement"]),
            randomness=Randomness(0),
        )
    stored = load_file(result.out / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in refined.tensors.items())


def test_the_cut_changes_no_bit(llama, text, reference, tmp_path):
    """The walk does not depend on shards."""
    run(llama, tmp_path / "out", text, shards=4, **BOTH)
    assert contents(tmp_path / "out") == reference[0]


class Stopped(Exception):
    """Exception that stands for the end of a driver."""


def stop_after(stage, units, events):
    """Event callback that ends the run after the given number of units of a stage."""

    def on_event(event):
        events.append(event)
        if event["event"] == "unit" and (event["stage"], event["done"]) == (stage, units):
            raise Stopped

    return on_event


def walked(events):
    return [e["unit"] for e in events if e["event"] == "unit" and e["stage"] == "walk"]


@pytest.fixture(scope="module")
def stopped(llama, text, tmp_path_factory):
    """Run directory of a walk that was stopped after two blocks; it is to be copied."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(Stopped):
        run(llama, out, text, on_event=stop_after("walk", 2, []), **BOTH)
    return out.with_name("out.run")


@pytest.mark.parametrize("harm", ["nothing", "lost", "damaged"])
def test_a_stopped_walk_goes_on(harm, llama, text, reference, stopped, tmp_path):
    """From the chunks before the next block, or through the blocks again: the same bytes."""
    out, events = tmp_path / "out", []
    shutil.copytree(stopped, tmp_path / "out.run")
    files = sorted((tmp_path / "out.run" / "chunks").rglob("*.safetensors"))
    assert len(files) == 12  # two streams of six sequences at the input of block 2, and no others
    if harm == "lost":
        shutil.rmtree(tmp_path / "out.run" / "chunks")
    elif harm == "damaged":
        data = bytearray(files[3].read_bytes())
        data[-1] ^= 1
        files[3].write_bytes(data)
    run(llama, out, text, on_event=events.append, **BOTH)
    assert walked(events) == ["block 2", "block 3"]
    assert any(e["event"] == "missing" for e in events) == (harm == "damaged")
    assert contents(out) == reference[0]
    assert not list((tmp_path / "out.run" / "chunks").rglob("*.safetensors"))


def test_a_damaged_unit_is_made_again_alone(llama, text, reference, tmp_path):
    """Later blocks are kept; their bits would be the same."""
    run_dir = shutil.copytree(reference[1], tmp_path / "run")
    events = []
    found = [path for path in run_dir.rglob("trained.safetensors")]
    assert len(found) == 4
    victim = next(path for path in found if "model.layers.1.mlp.up_proj.weight" in load_file(path))
    victim.write_bytes(victim.read_bytes()[:-4] + b"\1\2\3\4")
    run(llama, tmp_path / "out", text, run_dir=str(run_dir), on_event=events.append, **BOTH)
    assert walked(events) == ["block 1"]
    assert contents(tmp_path / "out") == reference[0]


@pytest.mark.ray
def test_killed_actors_change_no_bit(llama, text, reference, tmp_path, ray_workers):
    """Both actors killed, one after each of the first two blocks: others continue, bit for bit."""
    workers, killed = [], []

    def kill(event):
        if event["event"] == "workers" and len(event["workers"]) == 2:
            workers[:] = [worker["pid"] for worker in event["workers"]]
        if event["event"] == "unit" and event["stage"] == "walk" and workers:
            killed.append(workers.pop(0))
            os.kill(killed[-1], signal.SIGKILL)

    fields = {"executor": "ray", "workers": 2, "on_event": kill}
    run(llama, tmp_path / "out", text, **fields, **BOTH)
    assert len(killed) == 2
    assert contents(tmp_path / "out") == reference[0]


LONG = {"refinement": {"epochs": 40, "patience": 40, "batches": 2, "slices": 2}}


@pytest.fixture(scope="module")
def sliced(llama, text, tmp_path_factory):
    """Refined in one process with slices of several chunks, after compensation."""
    out = tmp_path_factory.mktemp("sliced") / "out"
    run(llama, out, text, compensate="blend", refine="in_order", options=LONG)
    return contents(out)


def kill_when_there(directory, pid):
    """Thread that kills a process as soon as a boundary's chunks are written."""

    def wait():
        while not list(directory.glob("*/00002")):
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.ray
@pytest.mark.parametrize("workers", [2, 3])
def test_actors_that_share_each_step_change_no_bit(
    workers, llama, text, sliced, tmp_path, ray_workers
):
    """An actor killed while block 1 is replicated: the others compute its slices, bit for bit."""
    events, pids, threads = [], [], []

    def on_event(event):
        events.append(event)
        if event["event"] == "workers" and len(event["workers"]) == workers:
            pids[:] = [worker["pid"] for worker in event["workers"]]
        if event["event"] == "unit" and event["stage"] == "walk" and not threads:
            threads.append(kill_when_there(tmp_path / "out.run" / "chunks", pids[0]))

    fields = {"executor": "ray", "workers": workers, "on_event": on_event}
    run(
        llama, tmp_path / "out", text, compensate="blend", refine="in_order", options=LONG, **fields
    )
    threads[0].join()
    lost = [event["unit"] for event in events if event["event"] == "lost"]
    assert len(lost) == 1
    assert lost[0].startswith("block 1, ")
    assert contents(tmp_path / "out") == sliced


def test_what_cannot_be_walked_is_refused_at_once(llama, text, tmp_path):
    """Unknown options or options without effect, and forms that cannot be compensated."""
    cases = (
        ({"options": {"compensation": {"betta": 1}}}, "beta"),
        ({"options": {"compensation": {"damping": -1}}}, "compensation: damping"),
        ({"options": {"compensation": {"basis": "old"}}}, "compensation: basis"),
        ({"options": {"compensation": {"beta": 0.5}}}, "beta is given, which is for 'blend'"),
        (
            {"compensate": "input", "options": {"compensation": {"basis": "kept"}}},
            "give basis 'new'",
        ),
        ({"options": {"svd-llm": {"refit": "always"}}}, "give refit 'never'"),
        ({"method": "wanda"}, "give compensate 'none', or refine 'in_order'"),
        ({"method": "basis-sharing", "options": {"basis-sharing": {"refit": "never"}}}, "group 1"),
    )
    for fields, message in cases:
        with pytest.raises(UsageError, match=message):
            run(llama, tmp_path / "out", text, **({"compensate": "anchored"} | fields))
    assert not (tmp_path / "out.run").exists()
