"""Smallest cases found by fuzzing, worst cases for memory, links, pickles and code."""

import json
import shutil
import struct
from pathlib import Path

import pyarrow
import pytest
import torch
from pipeline import with_tokenizer, write_text
from pyarrow import parquet
from safetensors.torch import save_file

import orchestrator.hf
from orchestrator import api
from orchestrator.cli.main import main
from orchestrator.errors import InputError, UsageError
from orchestrator.models.checkpoint.output import copy_companions
from orchestrator.models.checkpoint.weights import Weights
from orchestrator.models.forms.config import misfits, read_forms
from orchestrator.models.forms.index_codes import is_sound
from orchestrator.models.inputs.documents import read_documents
from orchestrator.models.inputs.text import load_tokens
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.survey.architecture import Architecture
from orchestrator.models.survey.locate import locate
from orchestrator.models.survey.select import select
from orchestrator.plan.curve import Curve
from orchestrator.plan.plan import Plan
from orchestrator.recipe.recipe import make_recipe
from orchestrator.recipe.recipe_file import read_recipe_fields
from orchestrator.store.files import digest_json, parse_json
from orchestrator.store.lease import is_alive
from orchestrator.store.places import parse_place
from orchestrator.store.run import RunDirectory
from orchestrator.store.units import Units, unit_key


def header(entry, data=b""):
    text = json.dumps({"x": entry}).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    "entry",
    [
        ENTRY | {"dtype": []},  # was a TypeError
        ENTRY | {"shape": [2**62] * 300},  # was a ValueError, of a number of 5400 digits
        ENTRY | {"shape": [0, 2**61]},  # was a ValueError of numpy when it was read
        ENTRY | {"shape": {}},  # was taken for a scalar
        ENTRY | {"shape": [0] * 65},
        [[[[0]]]],
    ],
)
def test_invalid_headers(tmp_path, entry):
    """Each raises InputError with one short line."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(header(entry))
    with pytest.raises(InputError, match="damaged header, entry of x is") as caught:
        Weights.open(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "a\0.safetensors"])
def test_file_names_too_long_for_a_disk(tmp_path, name):
    """A name too long for the disk (was an OSError) is a missing file."""
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"x": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="which does not exist"):
        Weights.open(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.²", "model.layers." + "9" * 5000])
def test_tensor_names_that_look_like_numbers(checkpoint, tmp_path, name):
    """A name that transformers wrongly reads as a number was a ValueError."""
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "m"))
    save_file({name: torch.zeros(1)}, model / "model.safetensors")
    with pytest.raises(InputError, match="name"):
        LazyModel.open(model)


@pytest.mark.parametrize(
    "text", ["[" * 101, "[" * 10**5, '"\\ud800"', b"\xff", b'"\xed\xa0\x80"', "1" * 5000]
)
def test_json_that_cannot_be_written_again(text, tmp_path):
    """Depth (was a RecursionError) and lone surrogates are refused on reading JSON."""
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
    content = text if isinstance(text, bytes) else text.encode()
    for name in ("config.json", "run.json", "records.jsonl"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="not valid JSON"):
        Weights.open(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        RunDirectory(tmp_path).description()
    with pytest.raises(InputError, match=r"line 1: not JSON|is not UTF-8"):
        list(read_documents(str(tmp_path / "records.jsonl"), "text"))


def test_ranks_too_large_to_print():
    """A product of more than 4300 digits was a ValueError while the message was formatted."""
    form = {"form": "low_rank_sparse", "rank": 10**4299, "nonzeros": 1, "index": "bitmask"}
    config = {"quant_method": "orchestrator", "format_version": 1, "modules": {"a": form}}
    with pytest.raises(InputError, match=r"need one below 2\^63"):
        read_forms(config)
    form["rank"] = 2**62
    assert dict(misfits(read_forms(config), {"a": (8, 8)})).keys() == {"a"}


def test_row_pointers_that_overflow():
    """Differences of 32-bit row pointers overflow; such an index reached the scatter."""
    tensors = {
        "index": torch.tensor([0, 1], dtype=torch.int16),
        "rows": torch.tensor([0, 2**31 - 1, -(2**31), 2], dtype=torch.int32),
    }
    assert not is_sound("columns", tensors, 3, 4, nonzeros=2)


@pytest.mark.parametrize(
    "content", ["a = [" * 5000, "seed = " + "9" * 5000, "a.b = 1\na = 2", "seed = 0x"]
)
def test_recipe_files_with_unbounded_values(tmp_path, content):
    """Unbounded arrays and numbers were a RecursionError and a ValueError."""
    (tmp_path / "recipe.toml").write_text(content)
    with pytest.raises(UsageError, match="not a TOML file"):
        read_recipe_fields(tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"preset": ["fast"]}, "preset is"),  # was a TypeError
        ({"keep": 10**400}, "keep is"),  # was an OverflowError
        ({"seed": 16**5000}, "seed is a number of thousands of digits"),  # was a ValueError
        ({"target": [16**5000]}, "target is a number"),
        ({"options": {"mgaa": {"t": 16**5000}}}, "mgaa.t is"),
        ({"options": {"mgaa": {"t": "\ud800"}}}, "valid Unicode"),
        ({"options": {"mgaa": {"a\nb": 1}}}, r"mgaa.'a\\nb'"),  # was an error of two lines
    ],
)
def test_invalid_recipe_fields(fields, says):
    """Each raises UsageError that names the field."""
    with pytest.raises(UsageError, match=says):
        make_recipe({"model": "m", "out": "o", "keep": 0.5} | fields)


def test_an_option_named_like_a_field(tmp_path, capsys):
    """`--option keep.x=1` with `keep = 0.5` in the file was a TypeError."""
    (tmp_path / "r.toml").write_text('model = "m"\nout = "o"\nkeep = 0.5\n')
    assert main(["compress", "--recipe", str(tmp_path / "r.toml"), "--option", "keep.x=1"]) == 2
    assert "not a table" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["re:" + "(" * 5000, "re:a{99999999999999999999}"])
def test_patterns_that_exhaust_regular_expressions(pattern):
    """Both were errors raised by the regular expressions."""
    with pytest.raises(UsageError, match="not a regular expression"):
        select(["a"], [pattern])


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-at-all/x", "a\0b"])
def test_invalid_paths(name, tmp_path):
    """They were an OSError, a RuntimeError and a ValueError."""
    with pytest.raises(InputError, match="no such"):
        locate(f"{name}/model")
    with pytest.raises(InputError, match="no such text"):
        list(read_documents(f"{name}.txt", "text"))
    if not name.startswith("~"):
        with pytest.raises(UsageError, match="a file name"):
            parse_place(f"/tmp/{name}")
        assert main(["status", f"/tmp/{name}"]) == 2


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_byte_order_mark_is_no_text(name, tmp_path):
    """Documents are those of the file without it, and offsets in errors count it."""
    content = b'{"text": "a river"}\n'

    def documents(written):
        (tmp_path / name).write_bytes(written)
        return ["".join(each) for each in read_documents(str(tmp_path / name), "text")]

    assert documents(b"\xef\xbb\xbf" + content) == documents(content)
    with pytest.raises(InputError, match="byte 0xff at offset 4 is not UTF-8"):
        documents(b"\xef\xbb\xbfa\xff" + content)


def test_a_truncated_parquet_file(tmp_path):
    """A damaged footer was an OSError."""
    path = tmp_path / "text.parquet"
    parquet.write_table(pyarrow.table({"text": ["one"] * 99}), path)
    content = bytearray(path.read_bytes())
    content[-60:-8] = b"\xff" * 52
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable parquet file"):
        list(read_documents(str(path), "text"))


def test_more_text_than_memory(tmp_path):
    """Random windows overlap, so any number of them could be requested: a MemoryError."""
    text = write_text(tmp_path / "text.txt")
    with pytest.raises(UsageError, match="the limit is 4294967296 tokens"):
        load_tokens(str(text), tokenizer=None, samples=10**15, sequence_length=8, sampling="random")


def test_an_invalid_tokenizer(checkpoint, tmp_path):
    """The library raises a bare Exception."""
    model = with_tokenizer(checkpoint("llama"), tmp_path / "m")
    (model / "tokenizer.json").write_text('{"model": {"type": "Nothing"}}')
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        load_tokenizer(model)


@pytest.mark.parametrize("value", [{}, {"assignments": []}, {"assignments": {"a": {"form": []}}}])
def test_invalid_plans(value):
    """They were a KeyError, an AttributeError, and a plan for no linear of the model."""
    with pytest.raises(InputError, match="plan: "):
        Plan.from_json({"budget_values": 1, "stored_values": 1} | value)
    with pytest.raises(InputError, match="curve: "):
        Curve.from_json(value)


# ---- runs


def make_run(directory, **status):
    found = RunDirectory(directory)
    found.claim({"recipe": {"model": "m"}, "out": "/nowhere/o"})
    if status:
        (directory / "status.json").write_text(json.dumps(status))
    return found


def test_invalid_process_numbers():
    """10^20 was an OverflowError; 0 and -1 are process groups, and always alive."""
    assert not any(map(is_alive, [10**20, -1, 0, True, "1", None, 1.0]))


@pytest.mark.parametrize(
    "status", [{"pid": 1}, {"state": []}, {"state": "done", "updated": 1e300}, {"state": 5}]
)
def test_invalid_states(tmp_path, status, capsys):
    """They were a KeyError, a TypeError and an OverflowError of `clean`, `status` and `report`."""
    make_run(tmp_path / "r", **status)
    for command in ("status", "clean", "report"):
        assert main([command, str(tmp_path / "r")]) == 4
        assert "status.json: is damaged" in capsys.readouterr().err


def test_a_run_of_another_format_is_left_alone(tmp_path):
    """Files that a later version may have written are neither read nor removed."""
    make_run(tmp_path / "r")
    (tmp_path / "r" / "run.json").write_text('{"format_version": 2}')
    with pytest.raises(InputError, match="format_version is 2"):
        api.clean(tmp_path / "r")
    assert (tmp_path / "r" / "run.json").exists()


def test_a_journal_that_is_not_text(tmp_path):
    """A byte that is not UTF-8 was a UnicodeDecodeError of `report`."""
    run = make_run(tmp_path / "r", state="done")
    (tmp_path / "r" / "events.jsonl").write_bytes(b'\xff\n{"event": "note", "text": "seen"}\n')
    assert [event["text"] for event in run.events()] == ["seen"]
    assert "seen" in Path(str(api.report(tmp_path / "r"))).read_text()


def commit(units, facts, files=None):
    """Unit whose manifest lists these files, with a valid hash."""
    key = unit_key("test", 1, [], facts=facts)
    manifest = {"format_version": 1, "files": files or {}, "environment": {}, "facts": facts}
    directory = units.directory(key)
    directory.mkdir(parents=True)
    manifest["blake2b"] = digest_json(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return key


@pytest.mark.parametrize("facts", [{"linears": [{"weight_energies": []}]}, {"linears": 5}])
def test_invalid_facts(tmp_path, facts):
    """A manifest with valid hash and invalid content was a KeyError of `report`."""
    run = make_run(tmp_path / "r", state="done")
    commit(run.units, facts)
    with pytest.raises(InputError, match=r"was not written by orchestrator|curve: "):
        api.report(tmp_path / "r")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..", ""])
def test_a_manifest_cannot_name_files_outside_its_unit(tmp_path, name):
    """A unit that names a file elsewhere is not committed, even if the file exists."""
    units = Units(tmp_path / "units")
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "secret").write_text("x")
    size = Path("/etc/hostname").stat().st_size if name.startswith("/") else 1
    key = commit(units, {}, {name: {"bytes": size, "blake2b": ""}})
    assert units.manifest(key) is None
    assert units.hashes(key) == []


# ---- links


def test_dropping_and_cleaning_follow_no_links(tmp_path):
    """Only links inside a run are removed, not their targets; a linked run is kept."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "manifest.json").write_text("mine")
    (mine / "thesis.tex").write_text("mine")
    run = make_run(tmp_path / "r", state="done")
    key = unit_key("test", 1, [])
    place = run.units.directory(key)
    place.parent.mkdir(parents=True)
    place.symlink_to(mine)
    run.units.drop(key)
    assert not place.exists()
    (tmp_path / "r" / "chunks").symlink_to(mine)
    (tmp_path / "r" / "units" / "00").symlink_to(mine)
    (tmp_path / "link").symlink_to(tmp_path / "r")
    with pytest.raises(InputError, match="is a link"):
        api.clean(tmp_path / "link")
    assert (tmp_path / "r" / "run.json").exists()
    api.clean(tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert sorted(path.name for path in mine.iterdir()) == ["manifest.json", "thesis.tex"]


def test_links_of_the_hub_cache(checkpoint, tmp_path):
    """A snapshot is links to blobs; they are read and copied."""
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    model = with_tokenizer(checkpoint("llama"), tmp_path / "m")
    for number, path in enumerate(model.iterdir()):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert LazyModel.open(snapshot).survey() == LazyModel.open(model).survey()
    copy_companions(snapshot, tmp_path / "out")
    same = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert same == (model / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("target", ["../secret", "{}/secret"])
def test_a_link_out_of_the_model_is_not_published(tmp_path, target):
    """A licence that is a link to another file, such as a key, would be copied next to the
    weights."""
    (tmp_path / "m").mkdir()
    (tmp_path / "secret").write_text("key")
    (tmp_path / "m" / "LICENSE").symlink_to(target.format(tmp_path))
    with pytest.raises(InputError, match="outside the model"):
        copy_companions(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_names_other_files(checkpoint, tmp_path):
    """transformers would read a config outside the directory, or a pickle in it."""
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "m"))
    config = json.loads((model / "config.json").read_bytes())
    elsewhere = {"configuration_files": ["../config.4.0.0.json"]}
    for more in (elsewhere, {"transformers_weights": "pytorch_model.bin"}):
        (model / "config.json").write_text(json.dumps(config | more))
        for read in (Architecture.read, LazyModel.open, orchestrator.hf.load):
            with pytest.raises(InputError, match="names other files"):
                read(model)


# ---- code


# ---- memory
