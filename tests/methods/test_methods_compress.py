"""Baseline methods end to end on a tiny model: budget, errors, options, allocations."""

import shutil
from functools import cache

import pytest
import torch
from pipeline import contents, run, with_tokenizer, write_llama, write_text
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import orchestrator
from orchestrator.errors import UsageError
from orchestrator.models.inputs.tokenizer import load_tokenizer

BASELINES = ("svd", "asvd", "wanda")
every_baseline = pytest.mark.parametrize("method", BASELINES)
NAMES = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj")
NARROW = "model.layers.1.mlp.down_proj"
"""The only linear whose output Gram is accumulated."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama2") / "dense", blocks=2)


def run_uniform(model, out, text, **fields):
    """Run with the same kept fraction everywhere, instead of the method's own allocation."""
    return run(model, out, text, allocation="uniform", **fields)


@pytest.fixture(scope="module")
def half(llama, text, tmp_path_factory):
    """The result of a method at keep 0.5 in one shard, made once; not to be changed."""
    root = tmp_path_factory.mktemp("half")

    @cache
    def make(method):
        return run_uniform(llama, root / method, text, method=method, shards=1)

    return make


@pytest.fixture
def units(half, tmp_path):
    """The fields of a run whose statistics are those of `half`, in a copy of its run directory."""

    def fields(method):
        run_dir = shutil.copytree(half(method).run_dir, tmp_path / "run")
        return {"method": method, "run_dir": str(run_dir)}

    return fields


def weights(model):
    """Dense weight of every linear by its name, for any form."""
    found = {}
    for name in (*NAMES, NARROW):
        linear = model.get_submodule(name)
        columns = torch.eye(linear.in_features)
        found[name] = linear(columns).detach().double().T
    return found


def inputs_of(dense, directory, text):
    """Inputs of the linears for the calibration tokens, 6 windows of 48."""
    seen = {}
    for name in (*NAMES, NARROW):
        dense.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.setdefault(name, []).append(inputs[0][0])
        )
    ids = torch.tensor(load_tokenizer(directory)(text.read_text())["input_ids"][: 6 * 48])
    with torch.no_grad():
        for row in ids.view(6, 48):
            dense(input_ids=row[None])
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


@every_baseline
@pytest.mark.parametrize("keep", [0.35, 0.5, 0.8])
def test_baselines_meet_the_budget_from_below(method, keep, llama, text, units, tmp_path):
    """The stored values are within the budget, close to it, and equal to those of the loaded
    model."""
    report = run_uniform(llama, tmp_path / "out", text, keep=keep, **units(method)).report
    assert report["kept"]["linears"] <= keep
    entries = report["linears"].values()
    values = report["values"]
    assert sum(entry["values"] for entry in entries) == values["stored"] <= values["budget"]
    assert {entry["form"] for entry in entries} == {"sparse" if method == "wanda" else "low_rank"}
    step = 1 if method == "wanda" else 3 * 64 + 64
    assert values["slack"] < len(entries) * step
    loaded = orchestrator.load(tmp_path / "out")
    assert values["model_after"] == sum(each.numel() for each in loaded.parameters())


def assert_errors(report, llama, out, text, of_outputs, of_weights):
    """The report's errors equal those of the loaded model's linears, each within a tolerance."""
    dense = AutoModelForCausalLM.from_pretrained(llama)
    before, after = weights(dense), weights(orchestrator.load(out))
    inputs = inputs_of(dense, llama, text)
    for name in (*NAMES, NARROW):
        entry, change = report["linears"][name], before[name] - after[name]
        lost = (inputs[name] @ change.T).square().sum()
        error = float(lost / (inputs[name] @ before[name].T).square().sum())
        assert entry["activation_error"] == pytest.approx(error, rel=of_outputs)
        error = float(change.square().sum() / before[name].square().sum())
        assert entry["weight_error"] == pytest.approx(error, rel=of_weights)


@pytest.mark.parametrize(
    ("method", "keep", "within"),
    [("svd", 0.5, 1e-3), ("asvd", 0.53, 1e-3), ("wanda", 0.5, 1e-3), ("wanda", 0.53, 0.02)],
)
def test_errors_are_those_of_the_written_checkpoint(
    method, keep, within, llama, text, units, tmp_path
):
    """Errors on the calibration outputs and on the weight are those of the loaded model. For
    entries they are known at every 5 % of the density, and interpolated between."""
    report = run_uniform(llama, tmp_path / "out", text, keep=keep, **units(method)).report
    assert_errors(report, llama, tmp_path / "out", text, within, within)


@pytest.mark.parametrize(("method", "within"), [("two-sided", 1e-3), ("cap", 0.25)])
def test_errors_are_also_measured_outside_the_norm_of_the_truncation(
    method, within, llama, text, tmp_path
):
    """Two-sided factors report errors of outputs and weight; low rank + sparse reports the outputs'
    by sketch. The sketch's standard deviation is at most 12 %."""
    options = {"cap": {"stage2": False}} if method == "cap" else {}
    report = run(llama, tmp_path / "out", text, method=method, options=options).report
    assert_errors(report, llama, tmp_path / "out", text, within, 1e-3)


@every_baseline
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "opt"])
def test_other_families_are_compressed(family, method, checkpoint, text, tmp_path):
    """Transposed weights and biases too: each linear has the reported error."""
    directory = with_tokenizer(checkpoint(family), tmp_path / "dense")
    report = run_uniform(directory, tmp_path / "out", text, method=method).report
    dense = AutoModelForCausalLM.from_pretrained(directory)
    loaded = orchestrator.load(tmp_path / "out")
    for name, entry in report["linears"].items():
        columns = torch.eye(entry["shape"][1])
        modules = [model.get_submodule(name) for model in (dense, loaded)]
        before, after = ((each(columns) - each(0 * columns)).detach() for each in modules)
        error = float((before - after).square().sum() / before.square().sum())
        assert entry["weight_error"] == pytest.approx(error, rel=1e-3)


def test_wanda_keeps_weights_as_they_are(llama, text, half):
    """Every row of a pruned weight has its best entries, bit for bit, and zeros."""
    dense = AutoModelForCausalLM.from_pretrained(llama)
    before, after = weights(dense), weights(orchestrator.load(half("wanda").out))
    inputs = inputs_of(dense, llama, text)
    for name in NAMES:
        score = before[name].abs() * inputs[name].norm(dim=0)
        best = score.argsort(dim=1, descending=True)[:, : score.shape[1] // 2]
        expected = torch.zeros_like(score).scatter(1, best, before[name].gather(1, best))
        assert torch.equal(after[name], expected)


@every_baseline
def test_any_cut_gives_the_same_bytes(method, llama, text, half, tmp_path):
    """One shard or one per block: checkpoint and report are the same."""
    run_uniform(llama, tmp_path / "out", text, method=method, shards=2)
    assert contents(tmp_path / "out") == contents(half(method).out)


@every_baseline
def test_other_sizes_use_the_same_units(method, llama, text, units, tmp_path):
    """A second size from the same run directory needs no pass, and has a direct run's bytes."""
    events = []
    fields = {"keep": 0.7, "on_event": events.append} | units(method)
    run_uniform(llama, tmp_path / "more", text, **fields)
    assert not any(e["event"] == "unit" and e["stage"] == "calibrate" for e in events)
    run_uniform(llama, tmp_path / "direct", text, method=method, keep=0.7)
    assert contents(tmp_path / "more") == contents(tmp_path / "direct")


@every_baseline
def test_a_finished_run_is_recognised(method, llama, text, units, tmp_path):
    """The same command returns the same plan and report, read from the output."""
    fields = units(method)
    first = run_uniform(llama, tmp_path / "out", text, **fields)
    again = run_uniform(llama, tmp_path / "out", text, **fields)
    assert again.plan == first.plan
    assert again.report == first.report


@pytest.mark.parametrize("method", ["svd", "asvd"])
@pytest.mark.parametrize("allocation", ["svd-llm-v2", "mgaa", "d-rank"])
def test_any_rank_allocation_works_with_them(
    method, allocation, llama, text, units, half, tmp_path
):
    """Ranks by another method's rule, from the curve in this method's norm, within the budget."""
    uniform = half(method)
    other = run(llama, tmp_path / "other", text, allocation=allocation, **units(method))
    assert other.plan.stored_values <= other.plan.budget_values
    assert other.plan.assignments != uniform.plan.assignments


def test_options_reach_the_decomposition(llama, text, tmp_path):
    """Another alpha gives another unit and other bytes; at 0 it truncates like the plain SVD."""
    run_dir, errors = str(tmp_path / "run"), []
    for name, method, options in [
        ("half", "asvd", {"asvd": {"alpha": 0.5}}),
        ("none", "asvd", {"asvd": {"alpha": 0}}),
        ("plain", "svd", {}),
    ]:
        fields = {"method": method, "options": options, "run_dir": run_dir}
        report = run_uniform(llama, tmp_path / name, text, **fields).report
        errors.append([each["weight_error"] for each in report["linears"].values()])
    assert errors[1] == pytest.approx(errors[2], rel=1e-5)
    assert all(half > none for half, none in zip(*errors[:2], strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "wanda", "allocation": "mgaa"}, "'mgaa' divides ranks"),
        ({"method": "asvd", "options": {"asvd": {"alpha": -1}}}, "alpha is -1"),
        ({"method": "asvd", "options": {"asvd": {"beta": 1}}}, "asvd: unknown option 'beta'"),
        ({"method": "mgaa", "options": {"mgaa": {"tt": 1}}}, "mgaa: unknown option 'tt'"),
    ],
)
def test_invalid_combinations_are_refused_before_the_run(fields, message, llama, text, tmp_path):
    """An allocation for another form, an unknown option, or a value out of range."""
    with pytest.raises(UsageError, match=message):
        run(llama, tmp_path / "out", text, **fields)
    assert not (tmp_path / "out").exists()


def test_a_method_and_its_allocation_share_a_table(llama, text, tmp_path):
    """Options that the method does not have are its allocation's."""
    options = {"mgaa": {"t": 0.0, "low": 0.0, "high": 1.0}}
    even = run(llama, tmp_path / "even", text, method="mgaa", options=options)
    steep = run(llama, tmp_path / "steep", text, method="mgaa", options={"mgaa": {"t": 2.0}})
    assert even.plan.assignments != steep.plan.assignments


def test_a_budget_in_bytes_counts_the_bytes_on_disk(llama, text, tmp_path):
    """Wanda at half the bytes: values and indices in the files fit, with few bytes to spare."""
    result = run(llama, tmp_path / "out", text, method="wanda", keep=None, keep_bytes=0.5)
    found = result.report["bytes"]
    linears = tuple(f"{name}." for name in result.report["linears"])
    on_disk = 0
    for path in result.out.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(linears)]  # noqa: SIM118
            on_disk += sum(file.get_tensor(name).nbytes for name in names)
    assert on_disk == found["stored"]
    assert 0.49 * found["dense_linears"] < on_disk <= 0.5 * found["dense_linears"]
