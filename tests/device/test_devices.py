"""Whole runs on a simulated CUDA device: the CPU's files to the bit, and no mixed devices.

See `pretend`; single calls are in `test_device_calls`. Models have two blocks, texts two sequences.
"""

import json
from collections import Counter

import families
import pytest
import torch
from families import _llama, write_checkpoint, write_model
from pipeline import SENTENCES, add_tokenizer, contents, run, with_tokenizer, write_text
from pretend import TO_HOST, pretended_device
from transformers import LlamaConfig, LlamaForCausalLM

from orchestrator import evaluate, export, search, verify
from orchestrator.methods import METHODS
from orchestrator.recipe.recipe import Recipe

SMALL = {"samples": 2, "sequence_length": 24, "shards": 2}
DTYPES = ("float32", "bfloat16")
THREE = ("*.k_proj", "*.o_proj", "*.down_proj")
"""Targets of a wide, a square and a tall shape, for work that is the same for each linear."""
FEW = {
    "asvd": {"options": {"strs": {"grid": "0.4 0.9", "windows": 1}}, "target": THREE},
    "cap": {
        "options": {"cap": {"iterations": 1, "samples": 2, "buckets": 16}},
        "target": THREE,
    },
    "two-sided-sparse": {
        "options": {"two-sided-sparse": {"densities": "0 0.3", "steps": 2}},
        "target": THREE,
    },
}
"""Fields for fewer trials, by method."""
REFINEMENT = {"epochs": 2, "batches": 1, "learning_rate": 2e-4}
TRAINING = {"epochs": 2, "batches": 1, "every": 1, "learning_rate": 2e-4, "top_k": 24}
OF_EXPERTS = ("expert-sharing", "merge-experts", "reap")
FORMS = {
    "low_rank": {},
    "pivoted": {"storage": "pivoted"},
    "sparse": {"method": "wanda"},
    "low_rank_sparse": {"method": "two-sided-sparse", **FEW["two-sided-sparse"]},
    "shared basis": {
        "method": "basis-sharing",
        "options": {"basis-sharing": {"refit": "never"}},
    },
}
STEPS = {f"models/training/{name}.py" for name in ("distill", "refine", "train")}
"""Files whose code runs for each step, and in it for each parameter and slice of tokens."""
PASSES = {
    "models/forms/low_rank.py",
    "models/forms/low_rank_sparse.py",
    "models/forms/pivoted.py",
    "models/forms/sparse.py",
    "models/shards/chunk.py",
    "models/shards/shard.py",
    "models/statistics/calibration.py",
    "models/statistics/residual_cosines.py",
}
"""Files whose code runs for each chunk or each linear in it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Llamas of two blocks, by dtype."""
    root = tmp_path_factory.mktemp("models")

    def write(dtype):
        config = LlamaConfig(**_llama(num_hidden_layers=2))
        directory = root / dtype
        write_model(lambda: LlamaForCausalLM(config), directory, dtype=getattr(torch, dtype))
        return add_tokenizer(directory)

    return {dtype: write(dtype) for dtype in DTYPES}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Two documents, one of them shorter than a sequence."""
    path = tmp_path_factory.mktemp("documents") / "text.jsonl"
    texts = [SENTENCES[:24], SENTENCES[30:47]]
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory for run directories by form, shared by the modes of a stage."""
    return tmp_path_factory.mktemp("runs")


def with_options(fields, **options):
    """Fields of a recipe with tables of options added."""
    return fields | {"options": fields.get("options", {}) | options}


def assert_same_files(one, other):
    """Assert that two checkpoints have equal files, and equal reports except for timings."""
    one, other = contents(one), contents(other)
    assert one.keys() == other.keys()
    assert not [name for name in one if one[name] != other[name]]


def compress_on_both(model, text, out, *, runs=None, **fields):
    """Compress on the CPU and on the simulated device; asserts equal files, returns the device.

    Sums whose order CUDA does not fix are errors: their bits would differ between calls.

    Args:
        runs: A directory for the run directories, to share them with other recipes.
    """
    fields, runs = SMALL | fields, runs or out
    run(model, out / "cpu", text, run_dir=str(runs / "cpu.run"), **fields)
    with pretended_device() as device:
        run(model, out / "cuda", text, run_dir=str(runs / "cuda.run"), **fields)
    assert any(copy.direction == TO_HOST for copy in device.copies)
    assert_same_files(out / "cpu", out / "cuda")
    assert not device.unordered
    return device


def assert_a_step_is_read_once(device):
    """Assert one read per step, for two epochs of one step and three evaluations of two blocks.

    The backward pass of a sparse linear does not search for its entries either.
    """
    assert not [each for each in device.reads if each.operation.startswith("masked")]
    waits = Counter(
        each.site
        for each in device.reads
        # positions of entries are read when a shard is opened
        if each.site.file in STEPS and each.operation != "bincount"
    )
    assert waits
    assert all(count <= 2 * 3 for count in waits.values()), waits


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *((name, "bfloat16") for name in METHODS if name not in OF_EXPERTS),
        *((method, "float32") for method in ("svd-llm", "cap", "two-sided", "two-sided-sparse")),
    ],
)
def test_methods(method, dtype, model, text, tmp_path):
    """Every method writes the CPU's files; no line of a pass reads more than once a sequence."""
    fields = FEW.get(method, {})
    device = compress_on_both(model[dtype], text, tmp_path, method=method, **fields)
    if method not in ("asvd", "cap"):  # each of their trials is a pass
        passes = 2 if METHODS[method].label_draws else 1
        waits = Counter(each.site for each in device.reads if each.site.file in PASSES)
        assert all(count <= 2 * 2 * passes for count in waits.values()), waits


@pytest.mark.parametrize("method", ["two-sided", *OF_EXPERTS])
def test_methods_of_experts(method, moe_checkpoint, text, tmp_path):
    """Statistics of routed tokens, and methods for experts, give the CPU's files."""
    dense = with_tokenizer(moe_checkpoint("qwen3_moe"), tmp_path / "dense")
    compress_on_both(dense, text, tmp_path, method=method)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "falcon", "phi3", "opt"])
def test_families(family, text, tmp_path, monkeypatch):
    """Other families give the CPU's files, with their masks, norms, biases and weight layouts."""
    monkeypatch.setattr(families, "BLOCKS", 2)
    dense = add_tokenizer(write_checkpoint(family, tmp_path / "dense"))
    compress_on_both(dense, text, tmp_path, samples=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pivoting(dtype, model, text, tmp_path):
    """Pivoted storage of two-sided factors gives the CPU's files."""
    compress_on_both(model[dtype], text, tmp_path, method="two-sided", storage="pivoted")


@pytest.mark.parametrize("method", ["svd-llm", "basis-sharing"])
def test_refits(method, model, text, tmp_path):
    """Left factors that are fitted again to the compressed inputs are the CPU's."""
    options = {method: {"refit": "always"}}
    compress_on_both(model["float32"], text, tmp_path, method=method, options=options)


@pytest.mark.parametrize(
    ("mode", "basis"),
    [
        ("input", "new"),
        ("anchored", "kept"),
        ("blend", "new"),
    ],
)
def test_compensation(mode, basis, model, text, tmp_path, runs):
    """Every objective gives the CPU's files, with the left factor kept or with a new one."""
    fields = {"runs": runs / "low_rank", "options": {"compensation": {"basis": basis}}}
    fields["compensate"] = mode
    compress_on_both(model["float32"], text, tmp_path, **fields)


@pytest.mark.parametrize("form", ["pivoted", "low_rank_sparse"])
def test_compensation_of_forms(form, model, text, tmp_path):
    """Compensation of pivoted factors, and of factors with entries, gives the CPU's files."""
    compress_on_both(model["float32"], text, tmp_path, compensate="blend", **FORMS[form])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["blocks", "in_order"])
def test_refinement(mode, model, text, tmp_path, runs):
    """Blocks trained separately or in order give the CPU's files; both are in the whole recipe."""
    fields = {"runs": runs / "low_rank", "options": {"refinement": REFINEMENT}}
    device = compress_on_both(model["float32"], text, tmp_path, refine=mode, **fields)
    assert_a_step_is_read_once(device)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "mode"),
    [
        *((form, "all") for form in FORMS),
        *((form, "light") for form in ("pivoted", "low_rank_sparse")),
        ("low_rank", "lean"),
    ],
)
def test_training(form, mode, model, text, tmp_path, runs):
    """Every form trained whole, and forms of each kind in the other modes, in two shards, give the
    CPU's files; dense linears are beside those of the form."""
    fields = with_options(FORMS[form], training=TRAINING) | {"runs": runs / f"{form} trained"}
    fields |= {"train": mode, "target": THREE}
    device = compress_on_both(model["float32"], text, tmp_path, **fields)
    assert_a_step_is_read_once(device)


def test_training_towards_targets_that_pass_by(model, text, tmp_path):
    """Targets that the dense model recomputes during training give the CPU's files."""
    options = {"training": TRAINING | {"targets": "recomputed", "cross_entropy": 0.1}}
    fields = {"train": "all", "options": options, "target": THREE}
    compress_on_both(model["float32"], text, tmp_path, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"method": "svd-llm"}, id="svd-llm"),
        pytest.param({"method": "wanda"}, id="wanda"),
        pytest.param({"method": "two-sided", "storage": "pivoted"}, id="two-sided"),
        pytest.param({"compensate": "blend"}, id="compensate"),
        pytest.param({"refine": "swept", "options": {"refinement": REFINEMENT}}, id="refine"),
        pytest.param({"train": "all", "options": {"training": TRAINING}}, id="train"),
    ],
)
def test_padded_text(fields, model, documents, tmp_path):
    """Sequences with padding give the CPU's files, through passes, gradients and training."""
    fields = fields | {"layout": "padded", "target": THREE}
    compress_on_both(model["float32"], documents, tmp_path, **fields)


@pytest.mark.slow
def test_the_whole_recipe_in_bfloat16(model, text, tmp_path):
    """Every stage after the plan in one run of a 16-bit model gives the CPU's files."""
    fields = {"method": "two-sided", "storage": "pivoted", "compensate": "anchored"}
    fields |= {"refine": "swept", "train": "lean", "target": THREE}
    options = {"refinement": REFINEMENT, "training": TRAINING}
    compress_on_both(model["bfloat16"], text, tmp_path, options=options, **fields)


@pytest.fixture(scope="module", params=DTYPES)
def compressed(request, model, text, tmp_path_factory):
    """A dense model and its compressed one."""
    dense, out = model[request.param], tmp_path_factory.mktemp("compressed") / "out"
    run(dense, out, text, method="two-sided", storage="pivoted", **SMALL)
    return dense, out


@pytest.mark.parametrize(("compares", "padded"), [(True, False), (False, True)])
def test_evaluation(compares, padded, compressed, text, documents, tmp_path):
    """Perplexity, alone and against the dense model, has the CPU's figures."""
    dense, out = compressed
    fields = SMALL | {"executor": "local", "layout": "padded" if padded else "packed"}
    fields |= {"text": str(documents if padded else text)}
    if compares:
        fields["against"] = dense

    def figures(place):
        found = evaluate(out, run_dir=tmp_path / place, **fields)
        perplexities = {name: each["perplexity"] for name, each in found["models"].items()}
        return {name: found.get(name) for name in ("kl", "top1_agreement")} | perplexities

    on_cpu = figures("cpu")
    with pretended_device() as device:
        assert figures("cuda") == on_cpu
    assert any(copy.direction == TO_HOST for copy in device.copies)


def test_verification_and_export(compressed, tmp_path):
    """Verification finds the same with a GPU as without, and exports have the same bytes."""
    dense, out = compressed
    found = verify(out, against=dense)
    export(out, tmp_path / "cpu")
    with pretended_device():
        assert verify(out, against=dense) == found
        export(out, tmp_path / "cuda")
    assert not found["problems"]
    assert found["logits"]["finite"]
    for path in (tmp_path / "cpu").iterdir():
        assert path.read_bytes() == (tmp_path / "cuda" / path.name).read_bytes()


@pytest.mark.slow
def test_search(model, text, tmp_path):
    """The same candidate wins with the same figures."""
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("The bridge past the inn carried 42 ships; nobody could say when.\n" * 2)
    fields = {"model": str(model["float32"]), "calibration": str(text), "executor": "local"}
    fields |= SMALL | {"keep": 0.5, "method": "svd-llm"}

    def found(place):
        recipe = Recipe(out=str(tmp_path / place), **fields)
        vary = {"storage": ["plain", "pivoted"]}
        return search(recipe, vary, text=str(held_out), samples=2, sequence_length=24)

    on_cpu = found("cpu")
    with pretended_device():
        on_device = found("cuda")
    assert on_device.candidates == on_cpu.candidates
    assert_same_files(tmp_path / "cpu", tmp_path / "cuda")
