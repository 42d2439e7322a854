"""All forms from the plan to a checkpoint that stock transformers loads, and back to dense."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from compressed import (
    TOKENS,
    affine_plan,
    close_to,
    compress,
    dense_reference,
    half_plan,
    logits,
    plan_of,
)
from families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.errors import InputError
from orchestrator.hf.export import export_dense
from orchestrator.methods.kinds.sparse import SPARSE
from orchestrator.models.checkpoint.layout import layout
from orchestrator.models.checkpoint.stored_tensor import StoredTensor
from orchestrator.models.forms.index_codes import INDEX_CODES, materialize
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.plan.codecs import CODECS
from orchestrator.plan.forms import LOW_RANK, PIVOTED
from orchestrator.plan.forms.index_sizes import index_code
from orchestrator.plan.linear import Linear, ModelSizes, Survey
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.stages.context.worker.stored import StoredFile, coded

FORMS = ("low_rank", "affine", "pivoted", "sparse", "low_rank_sparse", "shared")


def one_form(form):
    """Plan with the same form for every linear; the first linears of the blocks share a basis."""

    def make_plan(survey):
        if form == "shared":
            first, *others = [survey.of_block(block)[0] for block in range(survey.num_blocks)]
            low_rank = Assignment(form="low_rank", rank=LOW_RANK.break_even(first))
            assignments = {first.name: low_rank}
            assignments |= {each.name: replace(low_rank, basis=first.name) for each in others}
            return plan_of(survey, assignments)
        if form == "low_rank":
            return half_plan(survey)
        if form == "affine":
            return affine_plan(survey)
        if form == "pivoted":
            # the largest rank that saves values
            assignments = {
                linear.name: Assignment(form=form, rank=PIVOTED.break_even(linear) - 1)
                for linear in survey.linears
            }
            return plan_of(survey, assignments)
        assignments = {
            linear.name: Assignment(
                form=form,
                rank=3 if form == "low_rank_sparse" else 0,
                nonzeros=linear.values // 4,
            )
            for linear in survey.linears
        }
        return plan_of(survey, assignments)

    return make_plan


@pytest.fixture(scope="module")
def made_with(checkpoint, tmp_path_factory):
    """A tiny Llama with one form in several files, by the form; not to be changed."""
    root = tmp_path_factory.mktemp("one form")

    @cache
    def make(form):
        dense = checkpoint("llama")
        return compress(dense, root / form, make_plan=one_form(form), max_shard_bytes=20_000)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_computes_the_same_as_its_dense_weight(family, made_of):
    """In every family the logits equal those of the dense model with the weights replaced."""
    made = made_of(family)
    assert len(made.files) == 4
    found = logits(AutoModelForCausalLM.from_pretrained(made.directory))
    reference = logits(dense_reference(made))
    torch.testing.assert_close(found, reference, **close_to(reference))


def test_all_forms_and_codes_are_covered(made):
    """The test checkpoint contains all forms and codes."""
    modules = json.loads((made.directory / "config.json").read_bytes())["quantization_config"][
        "modules"
    ]
    assert {entry["form"] for entry in modules.values()} == {
        "low_rank",
        "pivoted",
        "sparse",
        "low_rank_sparse",
    }
    assert {entry.get("index") for entry in modules.values()} == {None, *INDEX_CODES}
    assert sum("basis" in entry for entry in modules.values()) == 2
    assert made.plan.stored_values == sum(
        tensor.values
        for file in made.files
        for tensor in file.tensors
        if tensor.part != "copy" or tensor.source in made.plan.assignments
    ) + sum(
        linear.values
        for linear in made.survey.linears
        if made.plan.assignments[linear.name].form == "dense"
    )


def test_a_plan_goes_to_json_and_back(made):
    """All fields of all forms cross processes as plain JSON."""
    assert Plan.from_json(json.loads(json.dumps(made.plan.to_json()))) == made.plan


@pytest.mark.parametrize("form", FORMS)
def test_a_form_loads_saves_and_generates(form, made_with, tmp_path):
    """Saved and reloaded in files of another size, all tensors and logits are the same."""
    made = made_with(form)
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    model.save_pretrained(tmp_path / "again", max_shard_size="9KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 4
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values())
    state, state_again = model.state_dict(), again.state_dict()
    assert list(state) == list(state_again)
    for name, tensor in state.items():
        assert torch.equal(tensor, state_again[name]), name
        assert tensor.dtype == state_again[name].dtype
    assert torch.equal(logits(again), logits(model))
    stored = [name for path in made.directory.glob("*.safetensors") for name in load_file(path)]
    stored_again = [
        name for path in (tmp_path / "again").glob("*.safetensors") for name in load_file(path)
    ]
    assert sorted(stored_again) == sorted(stored)
    generated = again.generate(TOKENS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert generated[0, TOKENS.shape[1]] == logits(model)[0, -1].argmax()
    assert again.num_parameters() == sum(t.values for file in made.files for t in file.tensors)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_bias_of_factors_takes_the_place_of_the_dense_one(family, checkpoint, tmp_path):
    """With a dense bias and without one: it is stored once, the plan counts it where it is new, and
    the logits are those of the dense model with weight and bias replaced."""
    made = compress(checkpoint(family), tmp_path / "out", make_plan=affine_plan)
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    reference = logits(dense_reference(made))
    torch.testing.assert_close(logits(model), reference, **close_to(reference))
    linears = made.survey.linears
    new = sum(each.out_features for each in linears if not each.has_bias)
    ranks = sum(made.plan.assignments[each.name].rank * each.rank_cost for each in linears)
    assert made.plan.stored_values == ranks + new
    dense = sum(each.values for each in linears)
    expected = made.survey.total_parameters - dense + made.plan.stored_values
    assert model.num_parameters() == LazyModel.open(made.directory).total_parameters == expected


def test_a_bias_is_exported_where_the_class_has_one(checkpoint, tmp_path):
    """A dense GPT-2 has biases, and the exported model the same logits; a Llama has none, so that
    the export stops before it writes."""
    made = compress(checkpoint("gpt2"), tmp_path / "gpt2", make_plan=affine_plan)
    export_dense(made.directory, tmp_path / "dense")
    reference = logits(AutoModelForCausalLM.from_pretrained(made.directory))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    torch.testing.assert_close(found, reference, **close_to(reference))
    made = compress(checkpoint("llama"), tmp_path / "llama", make_plan=affine_plan)
    with pytest.raises(InputError, match=r"q_proj: its bias has no place in a dense LlamaFor"):
        export_dense(made.directory, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("form", FORMS)
def test_without_the_package_no_form_loads(form, made_with):
    """Read as a dense model by transformers, the weights have wrong shapes, and loading stops."""
    made = made_with(form)
    config = AutoConfig.from_pretrained(made.directory)
    del config.quantization_config
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(made.directory, config=config)


def test_no_weight_has_the_dense_shape(made, llama):
    """Every linear stored in a form fails on its own, independently of the others."""
    for each in (made, llama):
        dense = AutoModelForCausalLM.from_pretrained(each.dense).state_dict()
        shapes = {t.name: t.shape for file in each.files for t in file.tensors}
        for name in each.parts:
            assert shapes[f"{name}.weight"] != tuple(dense[f"{name}.weight"].shape)


def test_a_basis_is_one_parameter(llama):
    """Members share the tensor of the first; it is stored once and trained as one."""
    model = AutoModelForCausalLM.from_pretrained(llama.directory)
    one, two = (model.model.layers[block].self_attn.q_proj for block in (0, 1))
    assert one.down.weight is two.down.weight
    assert model.model.layers[2].self_attn.q_proj.down.weight is not one.down.weight
    names = [tensor.name for file in llama.files for tensor in file.tensors]
    assert "model.layers.0.self_attn.q_proj.down.weight" in names
    assert "model.layers.1.self_attn.q_proj.down.weight" not in names
    model(TOKENS, labels=TOKENS).loss.backward()
    assert one.down.weight.grad.abs().sum() > 0
    model.tie_weights()
    assert one.down.weight is two.down.weight


def test_a_lazy_model_counts_parameters_as_the_plan_does(llama, made):
    """A basis counts once, and an index does not count."""
    for each in (llama, made):
        dense = sum(linear.values for linear in each.survey.linears)
        expected = each.survey.total_parameters - dense + each.plan.stored_values
        assert LazyModel.open(each.directory).total_parameters == expected
        index = json.loads((each.directory / "model.safetensors.index.json").read_bytes())
        assert index["metadata"]["total_parameters"] == expected
        sizes = [path.stat().st_size for path in each.directory.glob("*.safetensors")]
        assert 0 < sum(sizes) - index["metadata"]["total_size"] < 20_000  # the headers


@pytest.mark.parametrize("nonzeros", [1, 7, 40, 119])
def test_any_number_of_entries_is_a_prefix_of_a_unit(tmp_path, nonzeros):
    """The first entries of a unit, sorted by position, form the sparse weight."""
    linear = Linear(
        name="a", block=0, role="a", site="a", out_features=8, in_features=15, has_bias=False
    )
    positions_N = torch.randperm(120, generator=torch.Generator().manual_seed(0)).int()
    values_N = torch.arange(120.0)
    path = tmp_path / "a.safetensors"
    save_file({"values": values_N, "positions": positions_N}, path)
    code = index_code(8, 15, nonzeros)
    assignment = Assignment(form="sparse", nonzeros=nonzeros)
    survey = Survey(
        fingerprint="",
        architecture="",
        config_class="",
        model_type="",
        dtype="float32",
        num_blocks=1,
        linears=(linear,),
        total_parameters=120,
        sizes=ModelSizes(front=0, block=120, tail=0, total=120, hidden=15, vocabulary=0),
    )
    tensor = StoredTensor(
        name="a.weight",
        disk_name="a.weight",
        shape=(8, 15),
        dtype="float32",
        block=0,
        place="block",
    )
    plan = plan_of(survey, {"a": assignment})
    (file,) = layout(survey, [tensor], plan, output_dtype=None, max_shard_bytes=1)
    stored = StoredFile(path, torch.device("cpu"))
    entries = SPARSE.entries(stored, rank=0, nonzeros=nonzeros)
    parts = {spec.part: coded(spec, linear, entries) for spec in file.tensors}
    assert {spec.part: spec.shape for spec in file.tensors} == {
        part: tuple(each.shape) for part, each in parts.items()
    }
    weight_OI = materialize(code, parts, parts["values"], out_features=8, in_features=15)
    expected_E = torch.zeros(120)
    for value, position in zip(values_N[:nonzeros], positions_N[:nonzeros], strict=True):
        expected_E[position] = value
    assert torch.equal(weight_OI.flatten(), expected_E)


def test_stored_bytes_are_those_of_the_files(made):
    """The plan's bytes, indices included, equal those in the files."""
    linears = {linear.name: linear for linear in made.survey.linears}
    for name in made.parts:
        found = sum(
            tensor.size_bytes
            for file in made.files
            for tensor in file.tensors
            if tensor.source == name and tensor.part != "copy"
        )
        assert found == made.plan.assignments[name].stored_bytes(linears[name], CODECS["float32"])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_is_exported_dense(family, made_of, tmp_path):
    """The exported weights equal those of the forms, in native names and shapes."""
    made = made_of(family)
    export_dense(made.directory, tmp_path / "export")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(info.values())
    found, expected = model.state_dict(), dense_reference(made).state_dict()
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_the_card_counts_the_forms(made):
    """The model card states the number of linears in each form."""
    card = (made.directory / "README.md").read_text(encoding="utf-8")
    rows = [row.strip("| ").rpartition(" | ") for row in card.splitlines() if row[:2] == "| "]
    found = {words: int(count) for words, _, count in rows if count.isdigit()}
    forms = [assignment.form for assignment in made.plan.assignments.values()]
    assert found == {
        "dense": forms.count("dense"),
        "low-rank": forms.count("low_rank") - 2,
        "low-rank, on the basis of another": 2,
        "low-rank, pivoted": forms.count("pivoted"),
        "sparse": forms.count("sparse"),
        "low-rank plus sparse": forms.count("low_rank_sparse"),
    }
    assert "- low-rank\n- sparse\n---" in card


Q, K, DOWN = (
    f"model.layers.0.{role}" for role in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ({"x": Assignment(form="dense")}, "no linear 'x'"),
        ({Q: Assignment(form="dense", rank=3)}, "a dense linear has nothing else"),
        ({Q: Assignment(form="low_rank")}, "found rank 0 for low_rank"),
        ({Q: Assignment(form="low_rank", rank=16)}, "takes 1 to 15"),
        ({Q: Assignment(form="low_rank", rank=3, nonzeros=3)}, "found nonzeros 3 for low_rank"),
        ({Q: Assignment(form="pivoted")}, "found rank 0 for pivoted"),
        ({Q: Assignment(form="pivoted", rank=32)}, r"pivoted a \[32, 32\] linear takes 1 to 31"),
        (
            {Q: Assignment(form="pivoted", rank=3, basis=K)},
            "only low_rank, output_basis, tied have",
        ),
        ({Q: Assignment(form="sparse")}, "found nonzeros 0 for sparse"),
        ({Q: Assignment(form="sparse", nonzeros=-1)}, "found nonzeros -1 for sparse"),
        ({Q: Assignment(form="sparse", nonzeros=1024)}, "which store 1024 values"),
        ({Q: Assignment(form="sparse", rank=1, nonzeros=3)}, "found rank 1 for sparse"),
        (
            {Q: Assignment(form="sparse", nonzeros=3, basis=K)},
            "only low_rank, output_basis, tied have",
        ),
        ({Q: Assignment(form="low_rank_sparse", rank=3)}, "found nonzeros 0 for low_rank_sparse"),
        ({Q: Assignment(form="low_rank_sparse", nonzeros=3)}, "found rank 0 for low_rank_sparse"),
        (
            {Q: Assignment(form="low_rank_sparse", rank=8, nonzeros=512)},
            "found rank 8 and 512 nonzeros, which store 1024 values",
        ),
        ({Q: Assignment(form="low_rank", rank=3, basis=K)}, "need a low_rank linear with its own"),
        ({Q: Assignment(form="low_rank", rank=3, basis=Q)}, "need a low_rank linear with its own"),
        (
            {
                Q: Assignment(form="low_rank", rank=3),
                K: Assignment(form="low_rank", rank=4, basis=Q),
            },
            "found rank 4 of 32 inputs, its basis",
        ),
        (
            {
                Q: Assignment(form="low_rank", rank=3),
                DOWN: Assignment(form="low_rank", rank=3, basis=Q),
            },
            "found rank 3 of 48 inputs, its basis",
        ),
        (
            {
                Q: Assignment(form="low_rank", rank=19),
                K: Assignment(form="low_rank", rank=19, basis=Q),
            },
            r"found rank 19, a \[48, 32\] linear takes 1 to 18",
        ),
    ],
)
def test_a_plan_that_cannot_be_stored_is_refused(llama, assignments, message):
    """Missing and surplus parts, foreign bases, and forms without savings are refused by name."""
    lazy_model = LazyModel.open(llama.dense)
    plan = Plan(assignments=assignments, budget_values=0, stored_values=0)
    with pytest.raises(ValueError, match=message):
        layout(
            lazy_model.survey(), lazy_model.tensors(), plan, output_dtype=None, max_shard_bytes=1
        )
