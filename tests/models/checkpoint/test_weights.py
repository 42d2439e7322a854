"""Reading of checkpoints from disk, and damage that is refused."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.weights import DTYPES, Weights

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.arange(6).to(torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False]),
}


@pytest.fixture
def directory(tmp_path):
    """A checkpoint in one file."""
    (tmp_path / "config.json").write_text('{"a": 1, "b": [2, 3]}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def cut_directory(tmp_path):
    """The same tensors in two files under an index."""
    (tmp_path / "config.json").write_text('{"a": 1, "b": [2, 3]}')
    weight_map = {}
    for number, names in enumerate([["matrix", "empty"], ["half", "scalar", "mask"]], start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in names}, tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def read_header(path):
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("layout", ["directory", "cut_directory"])
def test_reading_agrees_with_safetensors(layout, request):
    """Names, shapes, dtypes and bits equal those read by the safetensors library."""
    weights = Weights.open(request.getfixturevalue(layout))
    assert set(weights.names) == set(TENSORS)
    for name, tensor in TENSORS.items():
        read = weights.read(name)
        assert (weights.dtype(name), weights.shape(name)) == (tensor.dtype, tuple(tensor.shape))
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read, tensor)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_is_read(dtype, tmp_path):
    """A tensor of each allowed dtype is read bit for bit."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"x": torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)}, tmp_path / "model.safetensors")
    read, expected = (
        Weights.open(tmp_path).read("x"),
        load_file(tmp_path / "model.safetensors")["x"],
    )
    assert read.dtype == expected.dtype
    assert torch.equal(read, expected)


def test_tensors_are_in_private_memory(directory):
    """Writing to a tensor changes neither the file nor later reads."""
    weights = Weights.open(directory)
    weights.read("matrix").zero_()
    assert torch.equal(weights.read("matrix"), TENSORS["matrix"])


def test_opening_reads_only_headers(tmp_path):
    """A checkpoint of half a terabyte in a sparse file opens."""
    (tmp_path / "config.json").write_text("{}")
    size = 2**39
    header = {"x": {"dtype": "BF16", "shape": [size // 2**21, 2**20], "data_offsets": [0, size]}}
    path = tmp_path / "model.safetensors"
    write_header(path, header, b"")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + size)
    assert Weights.open(tmp_path).shape("x") == (2**18, 2**20)


def test_the_fingerprint_depends_on_the_content(directory, tmp_path_factory):
    """A copy with a reformatted config has the same fingerprint, a changed model another."""
    fingerprint = Weights.open(directory).fingerprint
    copy = shutil.copytree(directory, tmp_path_factory.mktemp("copy") / "moved")
    (copy / "config.json").write_text('{"b":[2,3],\n "a":1}')
    assert Weights.open(copy).fingerprint == fingerprint
    (copy / "config.json").write_text('{"b":[2,3],\n "a":2}')
    assert Weights.open(copy).fingerprint != fingerprint
    (copy / "config.json").write_bytes((directory / "config.json").read_bytes())
    save_file({**TENSORS, "matrix": torch.zeros(4, 3)}, copy / "model.safetensors")
    assert Weights.open(copy).fingerprint != fingerprint


def remove_config(directory):
    (directory / "config.json").unlink()


def break_config(directory):
    (directory / "config.json").write_text('{"a": ')


def list_config(directory):
    (directory / "config.json").write_text("[1]")


def remove_weights(directory):
    (directory / "model.safetensors").unlink()


def leave_pickles(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def lose_index(directory):
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def truncate_header(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def empty_file(directory):
    (directory / "model.safetensors").write_bytes(b"")


def append(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"1234")


def flip_header_bit(directory):
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)


def flip_length_bit(directory):
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[6] ^= 1
    path.write_bytes(content)


def list_header(directory):
    write_header(directory / "model.safetensors", b"[]", b"")


def change_entry(change):
    def damage(directory):
        header, data = read_header(directory / "model.safetensors")
        change(header)
        write_header(directory / "model.safetensors", header, data)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such directory"),
        (remove_config, r"no config\.json"),
        (break_config, r"config\.json: not valid JSON"),
        (list_config, r"config\.json: holds a list"),
        (remove_weights, "no weights"),
        (leave_pickles, r"no safetensors, only pytorch_model\.bin"),
        (lose_index, r"several files need an index"),
        (truncate, r"model\.safetensors: \d+ bytes, .*truncated"),
        (truncate_header, r"truncated"),
        (empty_file, r"0 bytes, .*truncated"),
        (append, r"describes \d+; the file is damaged"),
        (flip_header_bit, "damaged header"),
        (flip_length_bit, r"truncated or not safetensors"),
        (list_header, r"damaged header, holds a list"),
        (change_entry(lambda h: h["matrix"].update(shape=[3, 5])), "takes 60 bytes.* has 48"),
        (change_entry(lambda h: h["matrix"].update(shape=[3, -4])), "damaged header, entry of mat"),
        (change_entry(lambda h: h["matrix"].update(shape=None)), "damaged header, entry of matrix"),
        (change_entry(lambda h: h["matrix"].pop("dtype")), "damaged header, entry of matrix"),
        (change_entry(lambda h: h["matrix"].update(dtype="F8_E4M3")), "dtype 'F8_E4M3'; allowed"),
        (change_entry(lambda h: h.update(x=h["matrix"])), "starts at byte"),
        (change_entry(lambda h: h.pop("matrix")), "starts at byte|describes"),
    ],
)
def test_damage_is_refused(directory, damage, message):
    """A damaged directory raises InputError, in one line with the place and the value found."""
    damage(directory)
    with pytest.raises(InputError, match=message) as caught:
        Weights.open(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def change_index(change):
    def damage(directory):
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def lose_file(directory):
    (directory / "model-00002-of-00002.safetensors").unlink()


def empty_index(directory):
    (directory / "model.safetensors.index.json").write_text('{"metadata": {}}')


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_file, rf"names {SECOND}, which does not exist"),
        (empty_index, "no weight_map"),
        (
            change_index(lambda m: m.update(matrix=SECOND)),
            f"places matrix in {SECOND}, which lacks it",
        ),
        (
            change_index(lambda m: m.update(ghost=SECOND)),
            f"places ghost in {SECOND}, which lacks it",
        ),
        (change_index(lambda m: m.pop("half")), "holds half, which .* lacks"),
        (change_index(lambda m: m.update(matrix="../x.safetensors")), "same directory is allowed"),
        (change_index(lambda m: m.update(matrix="/x.safetensors")), "same directory is allowed"),
        (change_index(lambda m: m.update(matrix="sub/x.safetensors")), "same directory is allowed"),
        (change_index(lambda m: m.update(matrix="x.bin")), "same directory is allowed"),
        (change_index(lambda m: m.update(matrix=7)), "same directory is allowed"),
    ],
)
def test_an_index_that_does_not_match_is_refused(cut_directory, damage, message):
    """An index that does not match the files, or refers outside, raises InputError."""
    damage(cut_directory)
    with pytest.raises(InputError, match=message):
        Weights.open(cut_directory)


def test_a_truncated_file_is_detected(directory):
    """A file truncated after it was opened raises InputError when its tensor is read."""
    weights = Weights.open(directory)
    path = directory / "model.safetensors"
    header, data = read_header(path)
    first = min(entry["data_offsets"][0] for name, entry in header.items() if name == "matrix")
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) - len(data) + first + 10])
    with pytest.raises(InputError, match="ended after 10 of the 48 bytes of matrix"):
        weights.read("matrix")
