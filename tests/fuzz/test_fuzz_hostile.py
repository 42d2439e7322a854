"""Hostile models: code, sizes and shapes that must not be run or allocated."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from drivers import start
from pipeline import run, with_tokenizer, write_text

import orchestrator.hf
from orchestrator import api
from orchestrator.errors import InputError
from orchestrator.models.shards.lazy_model import LazyModel


class Planted:
    """Object whose unpickling writes the marker."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def plant(model, marker):
    """Put code into a model directory at all places where it might be run."""
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("evil.py", "tokenization_evil.py", "modeling_evil.py", "__init__.py", "setup.py"):
        (model / name).write_text(code)
    for name in ("pytorch_model.bin", "tokenizer.pkl", "model.pt", "training_args.bin"):
        (model / name).write_bytes(pickle.dumps(Planted(marker)))
    for name, auto in {
        "config.json": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_evil.T", "evil.F"]},
    }.items():
        content = json.loads((model / name).read_bytes()) | {"auto_map": auto}
        (model / name).write_text(json.dumps(content))


def test_no_code_of_a_model_is_run(checkpoint, tmp_path):
    """Compress, evaluate, export, report and load run no code of the directory."""
    marker = tmp_path / "marker"
    model = with_tokenizer(checkpoint("llama"), tmp_path / "m")
    plant(model, marker)
    text = write_text(tmp_path / "text.txt")
    result = run(model, tmp_path / "out", text, samples=2, sequence_length=32)
    plant(tmp_path / "out", marker)
    asked = {"text": str(text), "samples": 2, "sequence_length": 32, "executor": "local"}
    api.evaluate(tmp_path / "out", against=model, **asked)
    api.export(tmp_path / "out", tmp_path / "dense")
    (Path(result.run_dir) / "report.pkl").write_bytes(pickle.dumps(Planted(marker)))
    api.report(result.run_dir)
    for directory in (model, tmp_path / "out"):
        orchestrator.hf.load(directory)
    (model / "model.safetensors").unlink()
    for read in (LazyModel.open, orchestrator.hf.load):
        with pytest.raises(InputError, match="pickled weights are not read"):
            read(model)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Planted(marker)))
    assert marker.exists()


def test_an_adapter_in_a_model_is_not_loaded(checkpoint, tmp_path):
    """transformers would add it to the model, from a pickle."""
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "m"))
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(InputError, match="adapter"):
        orchestrator.hf.load(model)


def test_a_kernel_of_a_hub_is_not_downloaded(checkpoint, tmp_path):
    """It would be native code; a survey ignores it, a load refuses it."""
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "m"))
    config = json.loads((model / "config.json").read_bytes())
    asks = {"attn_implementation": "someone/kernel"}
    (model / "config.json").write_text(json.dumps(config | asks))
    assert LazyModel.open(model).attention == "sdpa"
    with pytest.raises(InputError, match="kernel someone/kernel"):
        orchestrator.hf.load(model)


WORST = """
import json, resource, struct, sys, time
from pathlib import Path
import torch
import orchestrator.hf
from orchestrator.errors import InputError
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.checkpoint.weights import Weights

dense, compressed, room = map(Path, sys.argv[1:])
LazyModel.open(dense)
orchestrator.hf.load(compressed)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))

def entry(shape, offsets, dtype="F32"):
    text = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    return struct.pack("<Q", len(text)) + text

HEADERS = {
    "length": struct.pack("<Q", 2**63) + b"{}",
    "signed length": struct.pack("<q", -1) + b"{}",
    "large": entry([10**15], [0, 4 * 10**15]),
    "beyond": entry([16], [10**15, 10**15 + 64]) + bytes(64),
    "product": entry([2**32, 2**32], [0, 0]),
    "dimensions": entry([2**62] * 70_000, [0, 0]),
    "negative": entry([-1, -16], [0, 64]) + bytes(64),
    "backwards": entry([16], [64, 0]) + bytes(64),
}
CONFIGS = [
    {"num_hidden_layers": 10**9},
    {"num_labels": 10**9},
    {"vocab_size": 10**12},
    {"hidden_size": 2**40, "head_dim": 2**36},
    {"intermediate_size": 10**15},
]
SPARSE = {"form": "sparse", "nonzeros": 10**15, "index": "bitmask"}
FORMS = [{"rank": 10**15}, {"rank": 2**62}, SPARSE]

def refuse(label, read, directory):
    begun = time.monotonic()
    try:
        read(directory)
    except InputError as error:
        print("refused", label, flush=True)
    assert time.monotonic() - begun < 30, label

room.mkdir()
(room / "config.json").write_text("{}")
for label, content in HEADERS.items():
    (room / "model.safetensors").write_bytes(content)
    refuse(label, Weights.open, room)
for source, changes in ((dense, CONFIGS), (compressed, CONFIGS), (compressed, FORMS)):
    (room / "model.safetensors").unlink()
    (room / "model.safetensors").symlink_to(source / "model.safetensors")
    for change in changes:
        config = json.loads((source / "config.json").read_bytes())
        if changes is FORMS:
            modules = config["quantization_config"]["modules"]
            name = next(name for name, form in modules.items() if form["form"] == "low_rank")
            modules[name] = ({} if "form" in change else modules[name]) | change
        else:
            config |= change
        (room / "config.json").write_text(json.dumps(config))
        refuse(f"{change} survey", LazyModel.open, room)
        refuse(f"{change} load", orchestrator.hf.load, room)
# two seconds each, so not of both models in both ways
for source, read in ((dense, LazyModel.open), (compressed, orchestrator.hf.load)):
    (room / "model.safetensors").unlink()
    (room / "model.safetensors").symlink_to(source / "model.safetensors")
    config = json.loads((source / "config.json").read_bytes())
    (room / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9_999}))
    refuse("many layers", read, room)
print("end")
"""


def test_huge_buffers(checkpoint, tmp_path):
    """Buffers are computed and have no stored shape to compare with; 40 GB were allocated for
    one."""
    model = Path(shutil.copytree(checkpoint("gpt_neox"), tmp_path / "m"))
    config = json.loads((model / "config.json").read_bytes())
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e10}
    (model / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    for read in (LazyModel.open, orchestrator.hf.load):
        with pytest.raises(InputError, match="bytes of buffers"):
            read(model)


def test_hostile_sizes_end_before_an_allocation(checkpoint, compressed, tmp_path):
    """With half a GiB of address space left, each ends in an InputError within seconds."""
    arguments = [checkpoint("llama"), compressed("llama"), tmp_path / "room"]
    said, error = start("-c", WORST, *map(str, arguments)).communicate()
    lines = said.splitlines()
    assert lines[-1:] == ["end"], error[-2000:]
    assert len(lines) == 1 + 8 + 2 * 5 + 2 * 5 + 2 * 3 + 2
