"""Two thousand hostile inputs to all readers: only documented errors are raised."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed import mixed_plan
from fuzzing import documented, garbled, many, mutated, to_bytes
from hypothesis import given
from hypothesis import strategies as st
from pipeline import run, with_tokenizer, write_text
from safetensors.torch import save_file

from orchestrator.hf.export import export_dense
from orchestrator.models.checkpoint.weights import Weights
from orchestrator.models.forms.config import misfits, read_forms
from orchestrator.models.forms.index_codes import (
    INDEX_CODES,
    decode,
    encode,
    index_tensors,
    is_sound,
)
from orchestrator.models.inputs.documents import read_documents
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.survey.architecture import Architecture
from orchestrator.pages.report import report_page
from orchestrator.pages.sources import read_source, whole
from orchestrator.plan.curve import Curve
from orchestrator.plan.plan import Plan
from orchestrator.store.chunks import Chunks
from orchestrator.store.files import digest_json
from orchestrator.store.lease import is_forsaken
from orchestrator.store.run import RunDirectory
from orchestrator.store.units import Units


@pytest.fixture(scope="module")
def dense(checkpoint, tmp_path_factory):
    return with_tokenizer(checkpoint("llama"), tmp_path_factory.mktemp("fuzz") / "dense")


def put(directory: Path, **files: bytes) -> Path:
    """Directory with only these files."""
    directory.mkdir(exist_ok=True)
    for path in directory.iterdir():
        path.unlink()
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_bytes(content)
    return directory


def drawn(data, sound):
    """Bytes of a JSON value, with some parts or some bytes replaced."""
    if data.draw(st.integers(0, 3)):
        return to_bytes(data.draw(mutated(sound)))
    return data.draw(garbled(to_bytes(sound)))


# ---- models


SMALL = {"matrix": torch.arange(12.0).reshape(3, 4), "half": torch.ones(6).bfloat16()}


def small_file():
    header = {
        "__metadata__": {"format": "pt"},
        "matrix": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
        "half": {"dtype": "BF16", "shape": [6], "data_offsets": [48, 60]},
        "none": {"dtype": "I64", "shape": [0, 7], "data_offsets": [60, 60]},
    }
    return header, bytes(60)


def read_all(directory):
    """Open a checkpoint and read all of its tensors."""
    weights = Weights.open(directory)
    found = weights.fingerprint, {name: weights.read(name) for name in weights.names}
    assert sum(each.nbytes for each in found[1].values()) <= 2**20
    return found


@many(max_examples=350)
@given(data=st.data())
def test_headers(data, room):
    """A header with invalid fields, and a file with invalid bytes."""
    header, tensors = small_file()
    if data.draw(st.integers(0, 2)):
        text = to_bytes(data.draw(mutated(header)))
        content = struct.pack("<Q", len(text)) + text + tensors
    else:
        text = to_bytes(header)
        content = data.draw(garbled(struct.pack("<Q", len(text)) + text + tensors))
    documented(read_all, put(room / "m", config__json=b"{}", model__safetensors=content))


@many(max_examples=200)
@given(data=st.data())
def test_indexes(data, room):
    """An index that names missing files, or files elsewhere."""
    index = {
        "metadata": {"total_size": 60},
        "weight_map": {"matrix": "a.safetensors", "half": "b.safetensors"},
    }
    directory = put(room / "m", config__json=b"{}")
    save_file({"matrix": SMALL["matrix"]}, directory / "a.safetensors")
    save_file({"half": SMALL["half"]}, directory / "b.safetensors")
    (directory / "model.safetensors.index.json").write_bytes(drawn(data, index))
    documented(read_all, directory)


@many(max_examples=250)
@given(data=st.data())
def test_configs(data, room, dense, compressed):
    """Invalid configs of a dense and of a compressed model."""
    which = data.draw(st.sampled_from([dense, compressed("llama"), compressed("gpt2")]))
    config = json.loads((which / "config.json").read_bytes())
    documented(Architecture.read, put(room / "m", config__json=drawn(data, config)))


@many(max_examples=60)
@given(data=st.data())
def test_models(data, room, dense, compressed):
    """A whole model is surveyed without its weights, for any config."""
    which = data.draw(st.sampled_from([dense, compressed("llama"), compressed("gpt2")]))
    config = json.loads((which / "config.json").read_bytes())
    directory = put(room / "m", config__json=to_bytes(data.draw(mutated(config))))
    for path in which.glob("model*.safetensors*"):
        shutil.copy(path, directory)
    found = documented(LazyModel.open, directory)
    if isinstance(found, LazyModel):
        documented(found.survey)


@many(max_examples=300)
@given(data=st.data())
def test_forms(data, compressed):
    """Forms, ranks, nonzeros, codes and bases of a compressed checkpoint."""
    config = json.loads((compressed("llama") / "config.json").read_bytes())["quantization_config"]
    few = {**config, "modules": dict(list(config["modules"].items())[:9])}
    columns = {"form": ["low_rank", "", "sparse"], "rank": [3, 0, 0], "nonzeros": [0, 0, 9]}
    columns["index"] = ["", "", "bitmask"]
    gates = {"form": "low_rank", "rank": [2, 2, 0], "basis": ["", "m.0.gate", ""]}
    experts = {"format_version": 2, "experts": {"m": {"up": columns, "gate": gates}, "n": {}}}
    given_config = data.draw(st.sampled_from([few, {**few, **experts}]))
    found = documented(read_forms, data.draw(mutated(given_config)))
    if isinstance(found, dict):
        sizes = {name: data.draw(st.sampled_from([(32, 48), (16, 32), (1, 1)])) for name in found}
        sizes |= {form.basis: (32, 32) for form in found.values() if form.basis not in sizes}
        assert all(reason for _, reason in misfits(found, sizes))


@many(max_examples=250)
@given(data=st.data())
def test_index_codes(data):
    """A sound index names ascending positions of the weight; any other is refused."""
    code = data.draw(st.sampled_from(INDEX_CODES))
    out_features, in_features, nonzeros = 3, 5, data.draw(st.integers(1, 6))
    places = data.draw(
        st.lists(st.integers(0, 14), min_size=nonzeros, max_size=nonzeros, unique=True).map(sorted)
    )
    tensors = encode(code, torch.tensor(places), out_features, in_features)
    for name in tensors:
        values = tensors[name].clone()
        for _ in range(data.draw(st.integers(0, 2))):
            limits = torch.iinfo(values.dtype)
            wrong = st.integers(limits.min, limits.max) | st.integers(0, 15)
            at = data.draw(st.integers(0, len(values) - 1))
            values[at] = min(data.draw(wrong), limits.max)
        tensors[name] = values
    shapes = index_tensors(code, out_features, in_features, nonzeros)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == shapes
    if is_sound(code, tensors, out_features, in_features, nonzeros=nonzeros):
        found = decode(code, tensors, out_features, in_features).tolist()
        assert found == sorted(set(found))
        assert len(found) == nonzeros
        assert 0 <= found[0] <= found[-1] < 15


@many(max_examples=20)
@given(data=st.data())
def test_exports(data, room, compressed):
    """An export reads all of a checkpoint whose files and config have invalid bytes."""
    source = compressed("llama")
    shutil.rmtree(room / "m", ignore_errors=True)
    directory = Path(shutil.copytree(source, room / "m"))
    shutil.rmtree(room / "out", ignore_errors=True)
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = (source / name).read_bytes()
    if name == "config.json":
        content = to_bytes(data.draw(mutated(json.loads(content))))
    (directory / name).write_bytes(data.draw(garbled(content)))
    documented(export_dense, directory, room / "out")
    shutil.rmtree(room / "m")


# ---- what is asked


@pytest.fixture(scope="module")
def plan(dense):
    return mixed_plan(LazyModel.open(dense).survey())


@many(max_examples=200)
@given(data=st.data())
def test_plans(data, plan):
    """An accepted plan goes to JSON and back."""
    value = plan.to_json()
    value["assignments"] = dict(list(value["assignments"].items())[:8])
    found = documented(Plan.from_json, data.draw(mutated(value)))
    if isinstance(found, Plan):
        assert Plan.from_json(json.loads(json.dumps(found.to_json()))) == found
    curve = {"name": "q", "energies": [3.0, 2.0, 1.0], "total": 7.0}
    documented(Curve.from_json, data.draw(mutated(curve)))


# ---- runs


@pytest.fixture(scope="module")
def ran(dense, tmp_path_factory):
    """A run with everything that a page shows."""
    root = tmp_path_factory.mktemp("ran")
    text = write_text(root / "text.txt")
    result = run(dense, root / "out", text, samples=2, sequence_length=32, method="mgaa")
    return Path(result.run_dir)


@many(max_examples=150)
@given(data=st.data())
def test_states(data, room):
    """run.json, status.json, hold.json and events.jsonl, with invalid fields and bytes."""
    about = {"format_version": 1, "recipe": {"model": "dense", "keep": 0.5}, "out": "/nowhere/out"}
    status = {"state": "running", "pid": 2**22 - 1, "host": "h", "updated": 1.5, "done": 3}
    status |= {"total": 9, "left": 3.5, "started": 1.0, "stage": "write", "error": "e"}
    status |= {"progress": {"done": 3, "total": 9, "of": "files", "fraction": 0.3}, "run_left": 4.0}
    event = {"time": 1.0, "event": "note", "text": "all is well"}
    hold = {"id": "a", "host": "h", "pid": 7, "since": 1.0, "renewed": 2.0, "renewals": 0}
    files = {"run__json": about, "status__json": status, "hold__json": hold}
    wrong = data.draw(st.sampled_from([*files, "events__jsonl"]))
    written = {name: drawn(data, v) if name == wrong else to_bytes(v) for name, v in files.items()}
    lines = b"\n".join([to_bytes(event), drawn(data, event), to_bytes(event)])
    written["events__jsonl"] = lines if wrong == "events__jsonl" else b""
    directory = RunDirectory(put(room / "r", **written))
    for action in (directory.description, directory.status, directory.check):
        documented(action)
    assert all(isinstance(event, dict) for event in directory.events())
    is_forsaken(directory.root / "hold.json")
    documented(page_of, directory.root)


def page_of(place):
    with whole(place):
        return report_page(read_source(place))


@many(max_examples=100)
@given(data=st.data())
def test_manifests(data, room, ran):
    """A manifest with invalid parts, its hash wrong or recomputed: it is committed, or it is
    not."""
    source = next(p for p in ran.rglob("manifest.json") if b'"curve"' in p.read_bytes())
    manifest = json.loads(source.read_bytes())
    del manifest["blake2b"]
    for result in manifest["facts"]["linears"]:
        result["curve"]["energies"] = result["curve"]["energies"][:4]
    found = data.draw(mutated(manifest))
    if isinstance(found, dict) and data.draw(st.booleans()):
        try:
            found["blake2b"] = digest_json(found)
        except ValueError:  # half of a surrogate pair has no bytes
            return
    place = room / "u" / source.parent.name[:2] / source.parent.name
    shutil.rmtree(room / "u", ignore_errors=True)
    shutil.copytree(source.parent, place)
    (place / "manifest.json").write_bytes(to_bytes(found))
    units, key = Units(room / "u"), source.parent.name
    assert type(units.verify(key)) is bool
    assert all(path.parent == place for path, _ in units.hashes(key))
    units.facts(key, {})


@many(max_examples=30)
@given(data=st.data())
def test_pages(data, room, ran):
    """Page of a run whose units have unexpected content."""
    if not (room / "p").exists():
        shutil.copytree(ran, room / "p")
        for path in (room / "p").rglob("*.safetensors"):
            path.unlink()
    sources = [p for p in sorted(ran.rglob("manifest.json")) if b'"curve"' in p.read_bytes()]
    source = data.draw(st.sampled_from(sources))
    manifest = json.loads(source.read_bytes())
    del manifest["blake2b"]
    manifest["files"] = {}
    manifest["facts"] = data.draw(mutated(manifest["facts"]))
    try:
        manifest["blake2b"] = digest_json(manifest)
    except ValueError:
        return
    path = room / "p" / source.relative_to(ran)
    before = path.read_bytes()
    path.write_bytes(to_bytes(manifest))
    documented(page_of, room / "p")
    path.write_bytes(before)


@many(max_examples=75)
@given(data=st.data())
def test_chunks(data, room):
    """A chunk with invalid bytes is missing, never another chunk."""
    chunks = Chunks(room / "c")
    record = {"hidden": np.arange(12, dtype=np.float32), "structure": np.zeros(3, np.uint8)}
    chunks.write(0, 0, record)
    path = chunks.path(0, 0)
    content = path.read_bytes()
    path.write_bytes(data.draw(garbled(content)))
    found = chunks.read(0, 0)
    if found is not None:
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: array.tobytes() for name, array in record.items()
        }


# ---- text


@many(max_examples=200)
@given(data=st.data())
def test_records(data, room):
    """Lines that are not records, or have no text."""
    record = {"text": "The river ran past seven mills.", "id": 7, "meta": {"url": "x"}}
    path = room / "text.jsonl"
    path.write_bytes(b"\n".join([to_bytes(record), drawn(data, record), drawn(data, record)]))
    found = documented(lambda: ["".join(each) for each in read_documents(str(path), "text")])
    if isinstance(found, list):
        "".join(found).encode()


@many(max_examples=75)
@given(data=st.data())
def test_tables(data, room):
    """Parquet files with invalid bytes."""
    import pyarrow
    from pyarrow import parquet

    path = room / "text.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"] * 9, "n": list(range(18))}), path)
    content = path.read_bytes()
    at = data.draw(st.integers(0, 1))
    front, back = content[: len(content) // 2], content[len(content) // 2 :]
    wrong = data.draw(garbled(back if at else front))
    path.write_bytes(front + wrong if at else wrong + back)
    documented(lambda: [list(each) for each in read_documents(str(path), "text")])
