"""Files of a compressed checkpoint, and their directory."""

import hashlib
import json
import resource
import weakref
from dataclasses import replace

import pytest
import torch
from compressed import compress, half_plan, logits, plan_of
from families import write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM

import orchestrator.hf  # noqa: F401 # the checkpoints written here are loaded
from orchestrator.errors import InputError, OrchestratorError, UsageError
from orchestrator.models.checkpoint.layout import FileSpec, TensorSpec, layout
from orchestrator.models.checkpoint.output import (
    LEASE_FILE,
    MARKER_FILE,
    check_out,
    claim_out,
)
from orchestrator.models.checkpoint.write import finish, write_file
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.plan.plan import Assignment
from orchestrator.version import __version__

BLOCK_BYTES = 19_000  # a little above a compressed block of the tiny Llama, in fp32


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """A tiny Llama in several files, with its companion files."""
    directory = write_checkpoint("llama", tmp_path_factory.mktemp("dense"), max_shard_size="60KB")
    companions = {
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b'{"a":  1}\r\n',
        "chat_template.jinja": "{{ é }}".encode(),
        "LICENSE.md": b"a licence\n",
        "Notice": b"\xff a notice",
        "README.md": b"---\nlicense: apache-2.0\nlicense_link: x\ntags: [a]\n---\nlicense: no\n",
        "training_args.bin": b"not wanted",
    }
    for name, content in companions.items():
        (directory / name).write_bytes(content)
    config = json.loads((directory / "config.json").read_bytes())
    config["unknown_field"] = {"kept": [1, None]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def made(dense, tmp_path_factory):
    return compress(dense, tmp_path_factory.mktemp("made") / "out", max_shard_bytes=2 * BLOCK_BYTES)


def files_of(dense, **changes):
    lazy_model = LazyModel.open(dense)
    survey = lazy_model.survey()
    arguments = {"output_dtype": None, "max_shard_bytes": 10**9, **changes}
    return layout(survey, lazy_model.tensors(), half_plan(survey), **arguments)


def blocks_of(file):
    names = [tensor.name.split(".") for tensor in file.tensors]
    return sorted({int(parts[2]) for parts in names if parts[1] == "layers"})


@pytest.mark.parametrize("limit", [1, 12_000, BLOCK_BYTES, 30_000, 2 * BLOCK_BYTES, 10**9])
def test_files_hold_whole_blocks_in_model_order(dense, limit):
    """For any file size the same tensors are listed in the same order, block by block."""
    whole, files = files_of(dense), files_of(dense, max_shard_bytes=limit)
    tensors = [tensor for file in files for tensor in file.tensors]
    assert tensors == list(whole[0].tensors)
    assert [block for file in files for block in blocks_of(file)] == [0, 1, 2, 3]
    assert all(file.size_bytes <= limit or len(blocks_of(file)) == 1 for file in files)
    assert files[0].tensors[0].name == "model.embed_tokens.weight"
    assert files[-1].tensors[-1].name == "lm_head.weight"


def test_a_file_contains_every_block_that_fits(dense):
    """No file has room for the first block of the next one."""
    files = files_of(dense, max_shard_bytes=2 * BLOCK_BYTES)
    assert [blocks_of(file) for file in files] == [[0], [1, 2], [3]]
    assert files[0].size_bytes + BLOCK_BYTES - 1000 > 2 * BLOCK_BYTES


def test_one_file_has_the_plain_name(dense):
    """A single file is model.safetensors; several are numbered from 1."""
    assert [file.name for file in files_of(dense)] == ["model.safetensors"]
    names = [file.name for file in files_of(dense, max_shard_bytes=1)]
    assert names == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]


def test_a_compressed_linear_becomes_two_tensors(dense):
    """Factors have the linear's shapes and rank; a dense linear is copied unchanged."""
    tensors = {tensor.name: tensor for tensor in files_of(dense)[0].tensors}
    name = "model.layers.1.self_attn.k_proj"
    up, down = tensors[f"{name}.weight"], tensors[f"{name}.down.weight"]
    assert (up.part, up.shape, up.rank) == ("weight", (16, 5), 5)
    assert (down.part, down.shape, down.rank) == ("down", (5, 32), 5)
    kept = tensors["model.layers.3.mlp.down_proj.weight"]
    assert (kept.part, kept.shape) == ("copy", (32, 48))


@pytest.mark.parametrize("rank", [0, 16])
def test_a_rank_without_savings_is_refused(dense, rank):
    """Such a plan must have the linear dense."""
    lazy_model = LazyModel.open(dense)
    survey = lazy_model.survey()
    plan = replace(
        half_plan(survey),
        assignments={survey.linears[0].name: Assignment(form="low_rank", rank=rank)},
    )
    with pytest.raises(ValueError, match="keep it dense"):
        layout(survey, lazy_model.tensors(), plan, output_dtype=None, max_shard_bytes=1)


def test_a_file_goes_to_json_and_back(dense):
    """A file's description crosses processes as plain JSON."""
    for file in files_of(dense, max_shard_bytes=1):
        assert FileSpec.from_json(json.loads(json.dumps(file.to_json()))) == file


def spec_of(tensors, part="copy"):
    specs = [
        TensorSpec(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            part=part,
            source=name,
        )
        for name, tensor in tensors.items()
    ]
    return FileSpec(name="model.safetensors", tensors=tuple(specs))


def test_a_file_has_the_bytes_of_the_safetensors_library(tmp_path):
    """For all dtypes, shapes and names the file equals the library's."""
    dtypes = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    tensors = {f"t{i}": torch.arange(3 + i).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        'a "é"': torch.randn(2, 5, 7),
        "b": torch.randn(5, 4).T,
    }
    path = tmp_path / "model.safetensors"
    entry = write_file(spec_of(tensors), path, lambda spec: tensors[spec.source])
    content = path.read_bytes()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert content == save(contiguous, {"format": "pt"})
    digest = hashlib.blake2b(content, digest_size=32).hexdigest()
    assert entry == {"name": path.name, "bytes": len(content), "blake2b": digest}


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """All earlier tensors have been freed by the request of the next."""
    living = weakref.WeakSet()

    def read(spec):
        assert not living
        tensor = torch.ones(spec.shape)
        living.add(tensor)
        return tensor

    write_file(spec_of({name: torch.ones(3) for name in "abc"}), tmp_path / "f", read)


def test_no_space_leaves_no_file(tmp_path):
    """A refused write names the path, and leaves neither the file nor temporary files."""
    tensors = {"a": torch.zeros(100_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OrchestratorError, match=r"model\.safetensors: cannot be written"):
            write_file(spec_of(tensors), tmp_path / "model.safetensors", lambda spec: tensors["a"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_factor_must_be_finite_in_its_dtype(tmp_path, value):
    """NaN, infinity and overflow by the cast are refused by name."""
    wrong = torch.tensor([1.0, value])
    spec = spec_of({"a": wrong.half()}, part="weight")
    with pytest.raises(InputError, match="a has NaN or infinity in float16"):
        write_file(spec, tmp_path / "f", lambda spec: wrong)
    assert not list(tmp_path.iterdir())


def test_a_finished_directory_has_the_expected_files(made, dense):
    """Companions equal the dense model's byte for byte, and there are no other files."""
    copied = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE.md")
    for name in (*copied, "Notice", "generation_config.json"):
        assert (made.directory / name).read_bytes() == (dense / name).read_bytes()
    written = {"modeling_orchestrator.py", "recipe.toml", "orchestrator_report.json", "README.md"}
    weights = {file.name for file in made.files} | {"model.safetensors.index.json"}
    expected = {*copied, "Notice", "generation_config.json", "config.json"} | written | weights
    assert {path.name for path in made.directory.iterdir()} == expected


def test_the_config_is_the_dense_one_with_two_more_fields(made, dense):
    """Unknown fields are kept; the ranks are explicit."""
    before = json.loads((dense / "config.json").read_bytes())
    after = json.loads((made.directory / "config.json").read_bytes())
    assert after.pop("auto_map") == {
        "AutoConfig": "modeling_orchestrator.LlamaConfig",
        "AutoModelForCausalLM": "modeling_orchestrator.LlamaForCausalLM",
    }
    forms = after.pop("quantization_config")
    assert list(after.items()) == list(before.items())
    assert forms["modules"]["model.layers.0.mlp.up_proj"] == {"form": "low_rank", "rank": 9}
    assert forms["modules_to_not_convert"] == ["model.layers.3.mlp.down_proj"]
    assert forms["base_model"] == "someone/tiny"
    assert forms["base_fingerprint"] == made.survey.fingerprint
    # vLLM reads the name of the producer in the config of any method
    assert forms["producer"] == {"name": "orchestrator", "version": __version__}


def test_the_index_lists_every_tensor(made):
    """The index matches the files, in names and in bytes."""
    index = json.loads((made.directory / "model.safetensors.index.json").read_bytes())
    held = {file.name: load_file(made.directory / file.name) for file in made.files}
    assert index["weight_map"] == {
        tensor: name for name, tensors in held.items() for tensor in tensors
    }
    tensors = [tensor for file in held.values() for tensor in file.values()]
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in tensors),
        "total_parameters": sum(tensor.numel() for tensor in tensors),
    }
    with safe_open(made.directory / made.files[0].name, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_card_names_base_model_licence_and_sizes(made):
    """The front matter has the fields read by hubs; the licence is that of the dense card."""
    card = (made.directory / "README.md").read_text(encoding="utf-8")
    front = card.split("---")[1].splitlines()
    assert {'base_model: "someone/tiny"', "license: apache-2.0", "license_link: x"} <= set(front)
    stored = sum(tensor.values for file in made.files for tensor in file.tensors)
    assert f"({stored:,} of {made.survey.total_parameters:,})" in card


def test_the_same_plan_gives_the_same_bytes(made, dense, tmp_path):
    """Two directories written from the same plan are equal file by file."""
    again = compress(dense, tmp_path / "again", max_shard_bytes=2 * BLOCK_BYTES)
    for path in made.directory.iterdir():
        assert (again.directory / path.name).read_bytes() == path.read_bytes(), path.name


def test_tied_embeddings_are_written_once(tmp_path):
    """The head of a tied model has no tensor of its own, and is tied on loading."""
    made = compress(write_checkpoint("llama_tied", tmp_path / "dense"), tmp_path / "out")
    names = [tensor.name for file in made.files for tensor in file.tensors]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_a_config_ties_wrongly_stays_another_one(tmp_path):
    """The written config ties nothing, so that any program loads both; the logits are the same."""
    dense = write_checkpoint("llama_tied", tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    assert "tie_word_embeddings" in json.loads((dense / "config.json").read_text())
    made = compress(dense, tmp_path / "out", make_plan=lambda survey: plan_of(survey, {}))
    assert json.loads((made.directory / "config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    expected_BTV = logits(AutoModelForCausalLM.from_pretrained(dense))
    assert torch.equal(logits(model), expected_BTV)


def test_an_output_dtype_applies_to_every_tensor(dense, tmp_path):
    """Weights and config agree on the dtype, so that loading casts no tensor."""
    made = compress(dense, tmp_path / "out", output_dtype=torch.bfloat16)
    tensors = load_file(made.directory / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(made.directory)
    assert model.dtype == torch.bfloat16
    assert logits(model).isfinite().all()


def test_a_directory_is_complete_only_with_its_config(made, dense, tmp_path):
    """A finish that fails on a missing file leaves no loadable model."""
    out = tmp_path / "out"
    claim_out(out)
    arguments = {
        "dense": dense,
        "survey": made.survey,
        "plan": made.plan,
        "files": made.files,
        "base_model": "x",
        "output_dtype": None,
        "recipe": "",
        "report": {},
        "bootstrap": "",
    }
    for file in made.files[1:]:
        (out / file.name).write_bytes((made.directory / file.name).read_bytes())
    with pytest.raises(InputError, match=r"model-00001-of-00003\.safetensors: missing"):
        finish(out, **arguments)
    assert not (out / "config.json").exists()
    assert not check_out(out)
    (out / made.files[0].name).write_bytes((made.directory / made.files[0].name).read_bytes())
    (out / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier attempt")
    leftover, lease = out / ".model.safetensors.0.tmp", out / f".{LEASE_FILE}.0.tmp"
    for path in (leftover, lease):
        path.write_bytes(b"")
    finish(out, **arguments)
    assert not leftover.exists()
    # a renewal of the lease, in another thread, is about to rename it
    assert lease.exists()
    assert check_out(out)
    assert not (out / MARKER_FILE).exists()
    assert len(list(out.glob("*.safetensors"))) == len(made.files)


def test_only_a_new_empty_or_own_directory_is_written_to(made, dense, tmp_path):
    """Other directories are refused and not changed; finished ones are recognised."""
    assert not check_out(tmp_path / "new")
    assert not check_out(tmp_path)
    assert check_out(made.directory)
    with pytest.raises(UsageError, match="finished checkpoint"):
        claim_out(made.directory)
    with pytest.raises(UsageError, match="contains other files"):
        check_out(dense)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_out(tmp_path / "file")
    with pytest.raises(UsageError, match=r"contains other files \(file\)"):
        claim_out(tmp_path)


def test_a_damaged_result_is_not_accepted_as_finished(dense, tmp_path):
    """A finished directory with a truncated file is an error, not a finished run."""
    made = compress(dense, tmp_path / "out")
    path = made.directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        check_out(made.directory)
