"""Linears of a vision tower under the budget of the language model, from calibration to loading."""

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from image_text.inputs import image_chunk, image_inputs
from image_text.processors import add_processor, add_qwen_processor, write_records
from pipeline import contents, run, with_tokenizer
from transformers import AutoModelForImageTextToText

import orchestrator
from orchestrator import retarget
from orchestrator.cli.main import main
from orchestrator.hf.export import export_dense
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.calibration import Calibration
from orchestrator.models.survey.select import select
from orchestrator.pages.linears import place

pytest.importorskip("PIL")
TOWER = "model.vision_tower.*"
TEXTS = ("a <image> b and more", "text alone", "two <image> and <image>.")


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    dense = with_tokenizer(checkpoint("llava"), tmp_path_factory.mktemp("dense") / "llava")
    return add_processor("llava", dense)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    given = [
        {"text": text, "images": [f"pictures/{n + k}.png" for k in range(text.count("<image>"))]}
        for n, text in enumerate(TEXTS)
    ]
    return write_records(tmp_path_factory.mktemp("records") / "a.jsonl", given, 4)


METHOD = ("--method", "svd-llm", "--allocation", "threshold")
FIELDS = {"target": ("*", TOWER), "samples": 3, "allocation": "threshold"}


@pytest.fixture(scope="module")
def result(model, records, tmp_path_factory):
    """Tower and language model under one budget, in two shards; not to be changed."""
    return run(model, tmp_path_factory.mktemp("result") / "out", records, shards=2, **FIELDS)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3_vl"])
def test_linears_of_a_tower_are_called_once_for_the_images_of_a_chunk(checkpoint, family):
    """Input Grams of the first shard are those of the rows that the whole model's hooks see."""
    lazy_model, chunk = LazyModel.open(checkpoint(family)), image_chunk(family)
    tower = lazy_model.survey().tower
    assert len(tower) >= 8
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint(family)).eval()
    rows: dict[str, list[torch.Tensor]] = {each.name: [] for each in tower}
    for name, given in rows.items():
        whole.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, given=given: given.append(inputs[0].flatten(0, -2).double())
        )
    with torch.no_grad():
        whole(input_ids=chunk.tokens, attention_mask=chunk.mask.long(), **chunk.inputs)
    with lazy_model.shard(range(0, 1)) as shard:
        calibration = Calibration(shard, tower, lambda linear, beside: "input")
        calibration.forward(chunk)
        calibration.flush_writes()
        for linear in tower:
            (rows_NI,) = rows[linear.name]
            found = calibration.statistic(linear).matrix_II
            torch.testing.assert_close(found, rows_NI.T @ rows_NI, rtol=1e-5, atol=1e-5)
        calibration.close()


def test_a_tower_is_compressed_only_where_it_is_named():
    """A selector that matches a linear of the language model means no other."""
    names, tower = ["model.a.0.q", "model.a.0.k"], ["model.tower.0.q", "model.tower.0.fc"]
    assert select(names, ["*"], tower=tower) == names
    assert select(names, ["*.q"], tower=tower) == names[:1]
    assert select(names, ["model.tower.*"], ["*.fc"], tower=tower) == tower[:1]
    assert select(names, ["*", "*.fc"], ["*.k"], tower=tower) == [names[0], tower[1]]


def test_one_shard_and_two_give_the_same_bytes(model, records, result, tmp_path):
    """The tower's linears follow the plan of the whole, and all shards give the same bytes."""
    one = run(model, tmp_path / "one", records, shards=1, **FIELDS)
    assert contents(one.out) == contents(result.out)
    plan = result.plan.assignments
    cut = [name for name, each in plan.items() if each.form != "dense"]
    assert {name.startswith("model.vision_tower.") for name in cut} == {True, False}
    assert result.report["kept"]["linears"] <= 0.5


def test_a_result_is_loaded_verified_exported_and_retargeted(result, model, records, tmp_path):
    """Loading gives the logits of the dense export up to rounding; `verify` agrees, and `plan`
    forecasts; no two linears share a place on the page; another size needs no text."""
    chunk = image_chunk("llava")
    loaded = AutoModelForImageTextToText.from_pretrained(result.out)
    export_dense(result.out, tmp_path / "export")
    exported = orchestrator.load(tmp_path / "export")
    with torch.no_grad():
        found, expected = (
            each(input_ids=chunk.tokens, attention_mask=chunk.mask.long(), **chunk.inputs).logits
            for each in (loaded, exported)
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert main(["verify", str(result.out), "--against", str(model)]) == 0
    assert main(["plan", str(model), "--keep", "0.5", "--target", f"*,{TOWER}", *METHOD]) == 0
    roles = {place(name) for name in result.report["linears"]}
    assert len(roles) == len(result.report["linears"])
    small = retarget(str(result.run_dir), str(tmp_path / "small"), keep=0.3, executor="local")
    assert small.plan.assignments.keys() == result.plan.assignments.keys()
    scores = orchestrator.evaluate(
        result.out, text=records, samples=3, sequence_length=48, executor="local"
    )
    assert scores["models"]["model"]["perplexity"] > 1


@pytest.mark.parametrize("fields", [{"method": "wanda"}, {"storage": "pivoted"}])
def test_the_tower_alone_leaves_the_language_model(model, records, tmp_path, fields):
    """Every tensor outside of the named linears is the dense model's, in other forms too."""
    fields = {"shards": 2, "target": (TOWER,), "samples": 3} | fields
    out = run(model, tmp_path / "out", records, **fields).out
    before, after = (
        AutoModelForImageTextToText.from_pretrained(each).state_dict() for each in (model, out)
    )
    changed = {
        name for name in before if name not in after or before[name].shape != after[name].shape
    }
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - changed)
    modules = json.loads((out / "config.json").read_bytes())["quantization_config"]["modules"]
    assert {f"{name}.weight" for name in modules} == changed
    assert all(name.startswith("model.vision_tower.") for name in changed)


def test_experts_images_and_a_tower_in_one_model(checkpoint, records, tmp_path):
    """Qwen3-VL-MoE: two and three shards give the same bytes, and each part has factors."""
    dense = add_qwen_processor(Path(copytree(checkpoint("qwen3_vl_moe"), tmp_path / "dense")))
    target = ("*", "model.visual.*")
    two, three = (
        run(dense, tmp_path / f"{n}", records, shards=n, samples=3, target=target) for n in (2, 3)
    )
    assert contents(two.out) == contents(three.out)
    assert two.report["calibration"]["images"] == 3
    cut = {name for name, each in two.plan.assignments.items() if each.form != "dense"}
    for part in ("visual.blocks", "mlp.experts", "self_attn"):
        assert any(part in name for name in cut)
    loaded = AutoModelForImageTextToText.from_pretrained(two.out)
    tokens_BT, inputs = image_inputs("qwen3_vl_moe")
    made = loaded.generate(input_ids=tokens_BT, **inputs, max_new_tokens=2, do_sample=False)
    assert made.shape[1] == tokens_BT.shape[1] + 2


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        (["--method", "two-sided"], 2, "method two-sided, which needs gradients"),
        (["--method", "mgaa"], 2, "allocation mgaa, which needs residual cosines"),
        (["--method", "svd-llm", "--refine", "blocks"], 2, "stage refine"),
        (["--method", "basis-sharing"], 2, "with shared bases"),
        (["--method", "svd-llm", "--calibration", "TEXT"], 4, "has no images, and --target names"),
    ],
)
def test_what_a_tower_cannot_have_is_one_line(
    model, records, tmp_path, capsys, given, code, message
):
    """Refused before anything is computed; `plan` refuses the same, where no text is read."""
    text = write_records(tmp_path / "text.jsonl", [{"text": "words and more words " * 4}] * 3)
    source = text if "TEXT" in given else records
    given = [each for each in given if each not in ("--calibration", "TEXT")]
    asked = [
        *given,
        "--calibration",
        source,
        "--keep",
        "0.5",
        "--target",
        TOWER,
        "--executor",
        "local",
    ]
    asked += ["--sequence-length", "48"]
    assert main(["compress", str(model), str(tmp_path / "out"), *asked]) == code
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
    if code == 2:
        assert main(["plan", str(model), *given, "--keep", "0.5", "--target", TOWER]) == code
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
