"""All forms from the plan to a checkpoint that stock transformers loads, and back to dense."""

import json
from dataclasses import replace

import pytest
import torch
from compressed import TOKENS, compress, dense_reference, half_plan, logits, mixed_plan, plan_of
from families import FAMILIES, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import orchestrator.hf
from orchestrator.errors import InputError
from orchestrator.hf.export import export_dense
from orchestrator.methods.kinds.sparse import SPARSE
from orchestrator.models.checkpoint.layout import layout
from orchestrator.models.checkpoint.stored_tensor import StoredTensor
from orchestrator.models.forms.index_codes import INDEX_CODES, materialize
from orchestrator.models.forms.pivoted import PivotedLinear
from orchestrator.models.forms.sparse import SparseLinear
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.plan.codecs import CODECS
from orchestrator.plan.forms import LOW_RANK, PIVOTED
from orchestrator.plan.forms.index_sizes import index_code
from orchestrator.plan.linear import Linear, Survey
from orchestrator.plan.plan import Assignment, Plan
from orchestrator.stages.context.worker.stored import StoredFile, coded

FORMS = ("low_rank", "pivoted", "sparse", "low_rank_sparse", "shared")


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


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A tiny GPT-2 in several files, with all forms, index codes and `Conv1D` layers."""
    root = tmp_path_factory.mktemp("forms")
    dense = write_checkpoint("gpt2", root / "dense")
    return compress(dense, root / "out", make_plan=mixed_plan, max_shard_bytes=20_000)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny Llama with all forms."""
    root = tmp_path_factory.mktemp("forms")
    dense = write_checkpoint("llama", root / "dense")
    return compress(dense, root / "out", make_plan=mixed_plan, max_shard_bytes=20_000)


@pytest.fixture(scope="session")
def expected(llama):
    return logits(AutoModelForCausalLM.from_pretrained(llama.directory))


def changed(made, tmp_path, change):
    """Copy of the checkpoint with other modules in its config."""
    for path in made.directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((made.directory / "config.json").read_bytes())
    change(config["quantization_config"]["modules"])
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def close_to(reference):
    return {"rtol": 0, "atol": 1e-5 * float(reference.abs().max())}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_computes_the_same_as_its_dense_weight(family, tmp_path):
    """In every family the logits equal those of the dense model with the weights replaced."""
    dense = write_checkpoint(family, tmp_path / "dense")
    made = compress(dense, tmp_path / "out", make_plan=mixed_plan, max_shard_bytes=20_000)
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
def test_a_form_loads_saves_and_generates(form, tmp_path):
    """Saved and reloaded in files of another size, all tensors and logits are the same."""
    dense = write_checkpoint("llama", tmp_path / "dense")
    made = compress(dense, tmp_path / "out", make_plan=one_form(form), max_shard_bytes=20_000)
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


@pytest.mark.parametrize("form", FORMS)
def test_without_the_package_no_form_loads(form, tmp_path):
    """Read as a dense model by transformers, the weights have wrong shapes, and loading stops."""
    dense = write_checkpoint("llama", tmp_path / "dense")
    made = compress(dense, tmp_path / "out", make_plan=one_form(form))
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


def test_values_can_be_trained_and_indices_cannot(llama):
    """All parameters of all forms have gradients; indices stay integers in any dtype."""
    model = AutoModelForCausalLM.from_pretrained(llama.directory)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    before = {name: index.clone() for name, index in model.named_buffers() if "inv" not in name}
    model.bfloat16()
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], index) for name, index in before.items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_output_dtype_changes_only_values(dtype, tmp_path):
    """Values are rounded once; indices are stored as integers, unchanged."""
    dense = write_checkpoint("gpt2", tmp_path / "dense")
    wide = compress(dense, tmp_path / "wide", make_plan=mixed_plan)
    narrow = compress(dense, tmp_path / "narrow", make_plan=mixed_plan, output_dtype=dtype)
    before = load_file(wide.directory / "model.safetensors")
    after = load_file(narrow.directory / "model.safetensors")
    assert list(before) != []
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.to(dtype) if tensor.is_floating_point() else tensor)
    assert AutoModelForCausalLM.from_pretrained(narrow.directory).dtype == dtype
    export_dense(narrow.directory, tmp_path / "export")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == dtype


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_changes_nothing(llama, expected, device_map):
    """All forms are dispatched, and give the same logits."""
    model = AutoModelForCausalLM.from_pretrained(llama.directory, device_map=device_map)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("on_disk", [(0, 1), (2, 3), (0, 1, 2, 3)])
def test_blocks_can_be_offloaded_to_disk(llama, expected, tmp_path, on_disk, offload_buffers):
    """Values, indices and bases are offloaded like any weight, and fetched on demand."""
    places = {f"model.layers.{i}": "disk" if i in on_disk else "cpu" for i in range(4)}
    names = ("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb")
    places |= dict.fromkeys(names, "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        llama.directory,
        device_map=places,
        offload_folder=tmp_path,
        offload_buffers=offload_buffers,
    )
    assert model.model.layers[on_disk[0]].self_attn.k_proj.weight.is_meta
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kilobytes", [30, 70])
def test_offloaded_weights_are_saved(llama, expected, tmp_path, kilobytes):
    """An automatic map keeps a group together; saving reads back what is on disk."""
    model = AutoModelForCausalLM.from_pretrained(
        llama.directory,
        device_map="auto",
        max_memory={"cpu": kilobytes * 1000},
        offload_folder=tmp_path / "offload",
    )
    first, second = (model.model.layers[block].self_attn.q_proj for block in (2, 3))
    assert first.down.weight.is_meta
    assert first.down.weight is second.down.weight
    assert torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("cut", [(4,), (1, 3), (1, 1, 2), (1, 1, 1, 1)])
def test_shards_may_be_cut_within_a_group(llama, expected, cut):
    """A shard without the basis' owner reads the owner's tensor; logits equal the whole model's."""
    lazy_model = LazyModel.open(llama.directory)
    chunk, start = Chunk(0, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool)), 0
    for size in cut:
        with lazy_model.shard(range(start, start + size)) as shard:
            start += size
            if shard.is_last:
                assert torch.equal(shard.logits(chunk), expected)
            else:
                chunk = shard.forward(chunk)


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
        model_type="",
        dtype="float32",
        num_blocks=1,
        linears=(linear,),
        total_parameters=120,
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
def test_every_form_is_exported_dense(family, tmp_path):
    """The exported weights equal those of the forms, in native names and shapes."""
    dense = write_checkpoint(family, tmp_path / "dense")
    made = compress(dense, tmp_path / "out", make_plan=mixed_plan, max_shard_bytes=20_000)
    export_dense(made.directory, tmp_path / "export")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(info.values())
    found, expected = model.state_dict(), dense_reference(made).state_dict()
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_the_body_loads_without_the_head(llama):
    """AutoModel finds modules and bases although their names lack the prefix."""
    whole = AutoModelForCausalLM.from_pretrained(llama.directory).model
    body = AutoModel.from_pretrained(llama.directory)
    assert (
        body.layers[0].self_attn.q_proj.down.weight is body.layers[1].self_attn.q_proj.down.weight
    )
    with torch.no_grad():
        assert torch.equal(body(TOKENS).last_hidden_state, whole(TOKENS).last_hidden_state)


def test_it_compiles_in_one_graph(made):
    """No form breaks a compiled graph: no shape in them depends on data."""
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    expected = logits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), expected)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (SparseLinear, "index"),
        (SparseLinear, "rows"),
        (SparseLinear, "weight"),
        (PivotedLinear, "index"),
        (PivotedLinear, "weight"),
    ],
)
def test_missing_tensors_stop_the_load(made, tmp_path, kind, part):
    """A missing index stops every loader; missing values stop the package's own."""
    for path in made.directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    name = next(
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, kind) and hasattr(module, part)
    )
    path = next(p for p in tmp_path.glob("*.safetensors") if name in load_file(p))
    tensors = load_file(path)
    del tensors[name]
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    del index["weight_map"][name]
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"not stored|the checkpoint is damaged"):
        orchestrator.hf.load(tmp_path)
    with pytest.raises(InputError, match=f"1 of .* are not stored: {name}"):
        LazyModel.open(tmp_path)
    if part != "weight":
        with pytest.raises(InputError, match="the checkpoint is damaged"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_config_cannot_contradict_the_tensors(made, tmp_path):
    """A code or number of nonzeros other than the stored one is an error."""

    def other_code(modules):
        entry = next(entry for entry in modules.values() if entry.get("index") == "bitmask")
        entry["index"] = "positions"

    directory = changed(made, tmp_path, other_code)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(InputError, match="has shape"):
        export_dense(directory, tmp_path / "export")


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
        ({Q: Assignment(form="pivoted", rank=3, basis=K)}, "only low_rank has one"),
        ({Q: Assignment(form="sparse")}, "found nonzeros 0 for sparse"),
        ({Q: Assignment(form="sparse", nonzeros=-1)}, "found nonzeros -1 for sparse"),
        ({Q: Assignment(form="sparse", nonzeros=1024)}, "which store 1024 values"),
        ({Q: Assignment(form="sparse", rank=1, nonzeros=3)}, "found rank 1 for sparse"),
        ({Q: Assignment(form="sparse", nonzeros=3, basis=K)}, "only low_rank has one"),
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
