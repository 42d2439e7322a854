"""Whole runs on tiny models: every family; any cut and any workers give the same bytes."""

import json

import pytest
import torch
from families import FAMILIES
from pipeline import contents, run, with_tokenizer, write_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import orchestrator
from orchestrator.errors import UsageError
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.plan.cut import cut_blocks

TOKENS = torch.arange(2, 34)[None] * 5 % 96


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama10") / "dense")


@pytest.fixture(scope="module")
def reference(llama, text, tmp_path_factory):
    """Result in one process, cut into five shards."""
    out = tmp_path_factory.mktemp("reference") / "out"
    run(llama, out, text, shards=5)
    return contents(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_compressed_and_loads(family, checkpoint, text, tmp_path):
    """Compressed on two shards, it loads with transformers and equals the output of our shards."""
    model = with_tokenizer(checkpoint(family), tmp_path / "dense")
    result = run(model, tmp_path / "out", text, shards=2)
    report = result.report
    assert 0.4 < report["kept"]["linears"] <= 0.5
    loaded = orchestrator.load(result.out).eval()
    expected = loaded(input_ids=TOKENS).logits
    lazy_model = LazyModel.open(result.out)
    chunk = Chunk(0, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    first, second = cut_blocks(lazy_model.num_blocks, 2)
    with lazy_model.shard(first) as shard:
        chunk = shard.forward(chunk)
    with lazy_model.shard(second) as shard:
        assert torch.equal(shard.logits(chunk), expected)
    saved = sum(e["shape"][0] * e["shape"][1] - e["values"] for e in report["linears"].values())
    assert report["values"]["model_after"] == sum(p.numel() for p in loaded.parameters())
    assert report["values"]["model_before"] - saved == report["values"]["model_after"]
    values = report["values"]
    stored = {"dense_linears": 4 * values["dense_linears"], "stored": 4 * values["stored"]}
    assert report["bytes"] == stored  # float32, and factors need no index


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_everything_kept_changes_nothing(family, checkpoint, text, tmp_path):
    """At 1 every linear stays dense, and the logits are bit for bit the dense model's."""
    model = with_tokenizer(checkpoint(family), tmp_path / "dense")
    result = run(model, tmp_path / "out", text, keep=1.0)
    assert {entry["form"] for entry in result.report["linears"].values()} == {"dense"}
    dense = AutoModelForCausalLM.from_pretrained(model)
    assert torch.equal(
        orchestrator.load(result.out)(input_ids=TOKENS).logits, dense(input_ids=TOKENS).logits
    )


def test_activation_errors_are_those_of_the_calibration_tokens(checkpoint, text, tmp_path):
    """The report's error of a linear is the change of its outputs when it alone is replaced."""
    model = with_tokenizer(checkpoint("llama"), tmp_path / "dense")
    result = run(model, tmp_path / "out", text)
    dense = AutoModelForCausalLM.from_pretrained(model)
    small = orchestrator.load(result.out)
    seen = {}
    names = ["model.layers.1.self_attn.o_proj", "model.layers.3.mlp.down_proj"]
    for name in names:
        dense.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.setdefault(name, []).append(inputs[0][0])
        )
    tokenizer = orchestrator.models.inputs.tokenizer.load_tokenizer(model)
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"][: 6 * 48]).view(6, 48)
    with torch.no_grad():
        for row in ids:
            dense(input_ids=row[None])
    for name in names:
        inputs = torch.cat(seen[name]).double()
        weight = dense.get_submodule(name).weight.double()
        module = small.get_submodule(name)
        change = weight - module.weight.double() @ module.down.weight.double()
        error = (inputs @ change.T).square().sum() / (inputs @ weight.T).square().sum()
        expected = result.report["linears"][name]["activation_error"]
        assert error.item() == pytest.approx(expected, rel=1e-3)


def test_what_no_class_has_is_left_out_with_a_line(checkpoint, text, tmp_path):
    """A stored tensor that the model does not know: in the progress and in the report."""
    model = with_tokenizer(checkpoint("llama"), tmp_path / "dense")
    tensors = load_file(model / "model.safetensors") | {"mtp.proj.weight": torch.zeros(2, 2)}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    events = []
    result = run(model, tmp_path / "out", text, samples=2, on_event=events.append)
    notes = [event["text"] for event in events if event["event"] == "note"]
    (note,) = [text for text in notes if "left out" in text]
    assert note.endswith("are left out (1): mtp.proj.weight")
    assert result.report["left_out"] == ["mtp.proj.weight"]


@pytest.mark.parametrize("shards", [1, 2, 3, 10])
def test_the_cut_changes_no_bit(shards, llama, text, reference, tmp_path):
    """From one shard to one per block the output is byte-identical."""
    run(llama, tmp_path / "out", text, shards=shards)
    assert contents(tmp_path / "out") == reference


@pytest.mark.ray
@pytest.mark.parametrize(("workers", "shards"), [(1, 2), (2, None), (2, 10), (4, 4)])
def test_the_number_of_workers_changes_no_bit(
    workers, shards, llama, text, reference, tmp_path, ray_workers
):
    """With 1, 2 and 4 Ray actors the output equals that of one process without Ray."""
    fields = {"executor": "ray", "workers": workers, "shards": shards}
    run(llama, tmp_path / "out", text, **fields)
    assert contents(tmp_path / "out") == reference


def test_many_files_hold_the_same_model(llama, text, reference, tmp_path):
    """A small file limit divides the checkpoint at whole blocks; it loads as the same model."""
    result = run(llama, tmp_path / "out", text, max_shard_size="100KB")
    assert len(list(result.out.glob("model-*.safetensors"))) == 10
    (tmp_path / "one").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "one" / name).write_bytes(reference[name])
    many, one = orchestrator.load(result.out), orchestrator.load(tmp_path / "one")
    assert torch.equal(many(input_ids=TOKENS).logits, one(input_ids=TOKENS).logits)


def test_a_finished_run_does_nothing_again(llama2, text, tmp_path):
    """The same command again returns the same report, without a pass and without writing."""
    first = run(llama2, tmp_path / "out", text)
    times = {path: path.stat().st_mtime_ns for path in first.out.iterdir()}
    events = []
    again = run(llama2, tmp_path / "out", text, on_event=events.append)
    assert again.report == first.report
    assert again.plan == first.plan
    assert not any(event.get("stage") == "calibrate" for event in events)
    assert {path: path.stat().st_mtime_ns for path in first.out.iterdir()} == times


def test_another_size_needs_no_second_calibration(llama3, text, tmp_path):
    """A second size made from a run directory has the bytes of a direct run."""
    run_dir = str(tmp_path / "run")
    run(llama3, tmp_path / "half", text, run_dir=run_dir)
    events = []
    fields = {"keep": 0.7, "run_dir": run_dir, "on_event": events.append}
    run(llama3, tmp_path / "more", text, **fields)
    assert not any(e["event"] == "unit" and e["stage"] == "calibrate" for e in events)
    run(llama3, tmp_path / "direct", text, keep=0.7)
    assert contents(tmp_path / "more") == contents(tmp_path / "direct")


def test_a_finished_output_is_not_overwritten(llama2, text, tmp_path):
    """A complete checkpoint of another recipe is refused and kept."""
    result = run(llama2, tmp_path / "out", text)
    before = contents(result.out)
    with pytest.raises(UsageError, match="another recipe"):
        run(llama2, tmp_path / "out", text, keep=0.6)
    assert contents(result.out) == before


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_only_targets_are_touched(layout, llama3, text, tmp_path):
    """Linears outside the selection keep their bytes, and are named in the report."""
    lines = tmp_path / "text.jsonl"
    rows = text.read_text().splitlines()
    lines.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    fields = {"target": ("*.mlp.*",), "ignore": ("*.0.mlp.*", "re:.*down.*"), "layout": layout}
    result = run(llama3, tmp_path / "out", lines, **fields)
    touched = set(result.report["linears"])
    assert touched == {
        f"model.layers.{b}.mlp.{r}_proj" for b in range(1, 3) for r in ("gate", "up")
    }
    dense, small = AutoModelForCausalLM.from_pretrained(llama3), orchestrator.load(result.out)
    for name in result.report["not_targeted"]:
        assert torch.equal(dense.get_submodule(name).weight, small.get_submodule(name).weight)


def test_padding_does_not_reach_the_statistics(llama3, text, tmp_path):
    """Documents padded to a longer sequence give the same tokens and the same errors."""
    rows = text.read_text().splitlines()[:6]
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    reports = []
    for length in (64, 90):
        fields = {"layout": "padded", "sequence_length": length, "keep": 0.4}
        result = run(llama3, tmp_path / f"out{length}", lines, **fields)
        assert result.report["calibration"]["tokens_used"] == sum(map(len, rows))
        reports.append(result.report["linears"])
    for name, entry in reports[0].items():
        other = reports[1][name]["activation_error"]
        assert entry["activation_error"] == pytest.approx(other, rel=1e-4)
