"""Forecast of a run: shapes and formulas, against the code that they describe."""

import json

import pytest
from forecast_shapes import recipe, shapes_of
from large_models import CONFIGS
from pipeline import contents, run, with_tokenizer, write_llama, write_text

from orchestrator.api import measure, plan
from orchestrator.cli.main import main
from orchestrator.errors import InfeasibleError, InputError, UsageError
from orchestrator.forecast import memory
from orchestrator.forecast.rates import ROWS
from orchestrator.forecast.room import USABLE
from orchestrator.forecast.shapes import read_shapes
from orchestrator.methods import METHODS
from orchestrator.models.evaluation import machine
from orchestrator.plan.cut import cut_blocks
from orchestrator.recipe.recipe import make_recipe


@pytest.mark.parametrize("preset", ["fast", "best"])
@pytest.mark.parametrize("name", CONFIGS)
def test_more_machines_take_less_time_and_hold_no_more(name, preset, config):
    """For any rates; the total computation stays the same except for the order of truncations."""
    path = config(name, dtype="bfloat16", tie_word_embeddings=False)
    found = [plan(recipe(model=path, preset=preset), gpus=gpus) for gpus in (1, 8, 64)]
    for row in ROWS:
        seconds = [each.seconds[row] for each in found]
        assert sorted(seconds, reverse=True) == seconds
    assert len({each.final["values"] for each in found}) == 1
    assert found[0].seconds["data_sheet"] < found[0].seconds["pessimistic"]
    calibrating = [each.stages[0].device.total for each in found]
    assert sorted(calibrating, reverse=True) == calibrating
    training = [each.stages[-2].device.total for each in found]
    assert preset == "fast" or sorted(training, reverse=True) == training


def needs_experts(method):
    return method.expert_activations or method.grouping.experts


# those of experts alone refuse a model without any
@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if not needs_experts(m)])
def test_every_method_and_stage_has_a_forecast(method, config):
    """Positive times and bytes; longer sequences and more blocks take more memory."""
    path = config("Llama-3-8B", dtype="bfloat16")
    options = {"model": path, "method": method}
    if method in ("svd-llm", "two-sided"):
        options |= {"refine": "swept", "train": "light", "compensate": "anchored"}
    found = plan(recipe(**options), gpus=4, gpu="A10G", price=2.0)
    assert all(stage.seconds[row] > 0 for stage in found.stages for row in ROWS)
    assert found.run_bytes > 0
    assert found.money["pessimistic"] == pytest.approx(found.seconds["pessimistic"] / 3600 * 8)
    about = {"sequences": 32, "itemsize": 2, "pivoted": False}
    shapes = shapes_of("Llama-3-8B")
    sizes = [
        memory.calibration(shapes, METHODS[method], blocks, tokens=tokens, **about).total
        for blocks, tokens in ((1, 512), (1, 65536), (2, 65536))
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


def test_only_targeted_linears_are_counted(config):
    """Attention only: no statistic of the MLP is held, and untargeted linears keep their values."""
    path = config("Llama-3-8B", dtype="bfloat16")
    whole, part = (
        plan(recipe(model=path, preset="fast", target=target), gpus=8)
        for target in (("*",), ("*.self_attn.*",))
    )
    assert part.model["linears"] == 4 * 32
    assert part.stages[0].device.total < whole.stages[0].device.total
    attention = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
    lost = part.model["values"] - part.final["values"]
    assert lost == pytest.approx(0.2 * attention, rel=1e-6)
    assert all(part.seconds[row] < whole.seconds[row] for row in ROWS)


def test_a_selector_that_covers_nothing_is_refused(config):
    path = config("Llama-3-8B", dtype="bfloat16")
    with pytest.raises(UsageError, match="matches none of 224 linears"):
        plan(recipe(model=path, ignore=("*.experts.*",)), gpus=8)


def test_what_does_not_fit_is_said_with_what_would(config, capsys):
    """Exit code 3 after the whole forecast; one line each, with the part that is too large."""
    path = config("Llama-3-70B", dtype="bfloat16", tie_word_embeddings=False)
    flags = ["--keep=0.8", "--preset=best", "--gpus=8", "--gpu-memory=80GB"]
    assert main(["plan", path, *flags]) == 3
    said = capsys.readouterr().out.splitlines()
    (reason,) = [line for line in said if line.startswith("infeasible")]
    assert "train: a worker holds" in reason
    assert "training state" in reason
    fits = dict(
        reversed(each.split(" with ")) for each in reason.split("what fits: ")[1].split(", ")
    )
    for workers, mode in fits.items():
        count = workers.removesuffix(" workers")
        more = ["--gpus", count, "--train", mode.split()[-1]]
        assert main(["plan", path, *flags, *more]) == 0
    assert main(["plan", path, "--keep=0.8", "--preset=fast", "--gpu-memory=16GB"]) == 3
    assert "of memory a worker would hold a block" in capsys.readouterr().out
    small = ["--keep=0.8", "--method=svd-llm", "--gpu=A10G", "--gpu-memory=13GB", "--json"]
    small.append("--calibration=of-another-machine.txt")  # not looked up beside a config alone
    assert main(["plan", path, *small]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["blocks_a_shard"], shown["waves"]) == (1, 80)


@pytest.mark.parametrize("gpu", ["RTX-4090", "A10G"])
def test_one_gpu_of_24_gb_is_enough_for_the_closed_form_of_70b(gpu, config):
    """A fifth of its memory stays free; the peak is the backward pass, with Grams on the GPU."""
    path = config("Llama-3-70B", dtype="bfloat16", tie_word_embeddings=False)
    asked = {"model": path, "preset": "fast", "samples": 256, "sequence_length": 2048}
    found = plan(recipe(**asked), gpus=1, gpu=gpu)
    assert not found.infeasible
    assert found.peak.device.total < 0.8 * found.limits["usable"]
    assert "activations" in found.peak.device.parts


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The rates of this process in a file, not to be changed; by small products and files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "SIZES", {"cpu": (256, 192)})
        patch.setattr(machine, "FILE_BYTES", 2**24)
        # seconds that the test of the wheel spends
        patch.setattr(machine, "IMPORTS", "import json")
        return measure(tmp_path_factory.mktemp("rates") / "rates.json", dtype="float32")


def test_a_gpu_has_a_context_and_an_allocator_and_a_cpu_has_a_process(llama_dir, measured):
    """They are added to the same tensors; tensors to be written count for the host."""
    asked = {"samples": 4, "sequence_length": 32}
    on_cpu = plan(recipe(model=str(llama_dir), **asked), rates=measured)
    on_gpu = plan(recipe(model=str(llama_dir), **asked), gpu="A10G")
    assert on_cpu.limits["usable"] == USABLE * on_cpu.limits["device"]
    assert on_gpu.limits["usable"] == on_gpu.limits["device"]
    for ours, theirs in zip(on_cpu.stages, on_gpu.stages, strict=True):
        tensors = {n: s for n, s in theirs.device.parts.items() if n in ours.device.parts}
        assert theirs.device.parts == {
            "context": memory.CONTEXT_BYTES,
            **tensors,
            "fragmentation": int(memory.FRAGMENTATION * sum(tensors.values())),
        }
        assert ours.device.parts["process"] == memory.PROCESS_BYTES
        assert not tensors.keys() & {"process", "written"}


def test_a_machine_that_was_measured(llama_dir, measured, tmp_path):
    """`measure` writes the file that `plan` reads; its rates are of this process."""
    found = plan(recipe(model=str(llama_dir), samples=4, sequence_length=32), rates=measured)
    assert list(found.seconds) == ["measured"]
    assert 0 < found.seconds["measured"] < 600
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps(json.loads(measured.read_text()) | {"half": "fast"}))
    with pytest.raises(UsageError, match="half is 'fast'"):
        plan(recipe(model=str(llama_dir)), rates=rates)


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama4") / "dense", blocks=4)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama2") / "dense", blocks=2, hidden=32)


BAD = {
    "another family, without a class": ({"model_type": "mamba"}, "architectures is None"),
    "no number": ({"hidden_size": "wide"}, "hidden_size is 'wide'; a whole number from 1"),
    "too many blocks": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; the limit"),
    "nothing": ({"vocab_size": None}, "vocab_size is None"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_says_too_little_is_refused(name, config):
    """One line with the value found and the value needed; no tensor is allocated for it."""
    fields, says = BAD[name]
    with pytest.raises(InputError, match=says):
        plan(recipe(model=config("Llama-3-8B", **fields)))


def test_wrong_words_are_usage_errors(config, capsys):
    """An unknown GPU, no GPUs, a negative price, rates together with a GPU."""
    path = config("Llama-3-8B")
    for flags, says in {
        "--gpu=H1000": "gpu is 'H1000'; it must be one of H100",
        "--gpus=0": "gpus is 0",
        "--price=-1": "price is -1",
        "--gpu=H100 --rates=x.json": "give one",
        "--gpu-memory=much": "size is 'much'",
    }.items():
        assert main(["plan", path, "--keep=0.8", *flags.split()]) == 2
        assert says in capsys.readouterr().err


def test_with_tokenizer_is_a_checkpoint_too(checkpoint, tmp_path):
    """A directory is read by its headers: their dtype is used, not the config's."""
    directory = with_tokenizer(checkpoint("llama"), tmp_path / "dense")
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | {"dtype": "float64"}))
    assert read_shapes(directory).itemsize == 4


@pytest.mark.ray
def test_what_cannot_fit_this_machine_is_refused_on_ray_too(
    llama_dir, tmp_path, monkeypatch, ray_address
):
    """If its only node is the driver's machine; the run starts on an equal machine with room for
    it."""
    text = write_text(tmp_path / "text.txt")
    fields = {"executor": "ray", "workers": 1}
    with monkeypatch.context() as small:
        small.setattr("orchestrator.stages.admission.host_bytes", lambda: 100_000)
        with pytest.raises(InfeasibleError, match=r"^calibrate: a worker holds .*usable"):
            run(llama_dir, tmp_path / "out", text, **fields)
    run(llama_dir, tmp_path / "out", text, **fields)
    run(llama_dir, tmp_path / "local", text)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_a_run_that_does_not_fit_is_refused(llama_dir, tmp_path, monkeypatch):
    """Before a worker starts, with exit code 3; unless the recipe asks to try."""
    text = write_text(tmp_path / "text.txt")
    monkeypatch.setattr("orchestrator.stages.admission.host_bytes", lambda: 100_000)
    events = []
    with pytest.raises(InfeasibleError, match=r"^calibrate: a worker holds .*--allow-infeasible"):
        run(llama_dir, tmp_path / "out", text, on_event=events.append)
    assert not [event for event in events if event.get("stage") == "calibrate"]
    run(llama_dir, tmp_path / "out", text, on_event=events.append, allow_infeasible=True)
    assert [e["text"] for e in events if e["event"] == "note" and "forecast: " in e["text"]]


def test_a_run_is_cut_as_its_forecast_says(llama_dir, tmp_path, monkeypatch):
    """If two blocks do not fit at once, all shards have one block; the bytes are the same."""
    text, cuts = write_text(tmp_path / "text.txt"), []

    def note(*about):
        cuts.append(cut_blocks(*about))
        return cuts[-1]

    monkeypatch.setattr("orchestrator.runtime.workers.cut_blocks", note)
    outs = [tmp_path / "two", tmp_path / "one"]
    run(llama_dir, outs[0], text)
    sizes = [
        memory.calibration(
            *(read_shapes(llama_dir), METHODS["svd-llm"], blocks),
            tokens=48,
            sequences=6,
            itemsize=4,
            pivoted=False,
        ).total
        for blocks in (1, 2)
    ]
    room = sum(sizes) / 2 / USABLE
    monkeypatch.setattr("orchestrator.stages.admission.host_bytes", lambda: room)
    run(llama_dir, outs[1], text)
    assert [[len(blocks) for blocks in cut] for cut in cuts] == [[2, 2], [1, 1, 1, 1]]
    assert contents(outs[0]) == contents(outs[1])


def test_a_model_that_cannot_be_foreseen_is_compressed_all_the_same(
    llama_dir, tmp_path, monkeypatch
):
    """Headers with too little information end a plan, but not a run."""

    def refuse(model):
        raise InputError("the first block stores no matrix of its own")

    monkeypatch.setattr("orchestrator.stages.admission.read_shapes", refuse)
    events = []
    run(llama_dir, tmp_path / "out", write_text(tmp_path / "t.txt"), on_event=events.append)
    assert any("no forecast" in event.get("text", "") for event in events)


BEHIND = {"score", "refit", "pivot", "walk", "refine", "sweep", "train", "write"}
FEW = {"strs": {"grid": "0.4 0.9", "windows": 1}}
REFINED = {"refinement": {"epochs": 1, "batches": 2}}
SHORT = {**REFINED, "training": {"epochs": 1, "batches": 2}}


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "svd-llm"},
        {"method": "svd-llm", "allocation": "strs", "options": FEW},
        {"method": "asvd", "options": FEW},
        {"method": "asvd", "allocation": "uniform"},
        {"method": "cap", "options": {"cap": {"iterations": 1, "samples": 2, "buckets": 16}}},
        {"method": "basis-sharing"},
        {"method": "basis-sharing", "keep": 0.8},
        {
            "method": "basis-sharing",
            "storage": "pivoted",
            "options": {"basis-sharing": {"group": 1, "refit": "always"}},
        },
        {"method": "two-sided", "storage": "pivoted", "refine": "swept", "options": REFINED},
        {"method": "svd-llm", "compensate": "anchored", "refine": "in_order", "options": REFINED},
        {"method": "svd-llm", "refine": "blocks", "train": "light", "options": SHORT},
    ],
    ids=lambda fields: " ".join(str(each) for each in fields.values() if isinstance(each, str)),
)
def test_its_stages_are_those_of_the_run(fields, tiny_dir, tmp_path):
    """For all choices of a recipe: the stages equal those of the run, in its order."""
    events = []
    fields = {"keep": 0.5, **fields}
    text = write_text(tmp_path / "text.txt")
    run(tiny_dir, tmp_path / "out", text, on_event=events.append, **fields)
    begun = [e["stage"] for e in events if e["event"] == "stage" and e["state"] == "begin"]
    asked = {"model": str(tiny_dir), "out": "o", "samples": 6, "sequence_length": 48}
    expected = plan(make_recipe({**asked, **fields}))
    assert [each.name for each in expected.stages][1:] == [e for e in begun if e in BEHIND]


def test_a_basis_for_several_blocks_holds_them_together(config):
    """Grams are summed and the weights stacked, and no shard has fewer blocks than a group."""
    path = config("Llama-3-70B", dtype="bfloat16", tie_word_embeddings=False)
    sizes, shards = [], []
    for group in (1, 2, 8):
        options = {"basis-sharing": {"group": group, "refit": "never"}}
        found = plan(recipe(model=path, method="basis-sharing", options=options), gpus=8)
        sizes.append(found.stages[0].device.total)
        shards.append(found.blocks_a_shard)
    assert sizes[0] < sizes[1] < sizes[2] / 2
    assert shards == [2, 2, 8]


def test_options_that_cost_are_counted(config):
    """More draws need more backward passes, and float32 has another rate than 16 bits."""
    path = config("Llama-3-8B", dtype="bfloat16")

    def seconds(**fields):
        return plan(recipe(model=path, **fields), gpus=8).stages[0].seconds["data_sheet"]

    once = seconds(method="two-sided")
    four = seconds(method="two-sided", options={"two-sided": {"draws": 4}})
    assert 2 * once < four < 4 * once
    assert seconds(method="two-sided", dtype="float32") > 2 * once


def test_compensation_holds_the_moments_of_the_widest_site(config):
    """46 GB for a block of 70B; the advice refers to the requested options."""
    path = config("Llama-3-70B", dtype="bfloat16", tie_word_embeddings=False)
    found = plan(recipe(model=path, compensate="anchored"), gpus=8, gpu_memory="48GB")
    walk = next(stage for stage in found.stages if stage.name == "walk")
    assert walk.device.parts["moments"] == 56 * 28672**2
    (reason,) = found.infeasible
    assert "--compensate none" in reason
    assert "--refine" not in reason


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allocation": "nosuch"}, "allocation is 'nosuch'"),
        ({"method": "cap", "storage": "pivoted"}, "storage is 'pivoted'"),
        ({"method": "two-sided", "options": {"two-sided": {"draws": 0}}}, "draws is 0"),
    ],
)
def test_what_no_run_would_take_has_no_forecast(fields, message, config):
    with pytest.raises(UsageError, match=message):
        plan(recipe(model=config("Llama-3-8B", dtype="bfloat16"), **fields), gpus=8)
