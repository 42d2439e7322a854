"""Models and texts that several files compress."""

import json

import pytest
from pipeline import SENTENCES, write_llama, write_text
from pools import warm_workers


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Six documents, some of them shorter than a sequence."""
    path = tmp_path_factory.mktemp("documents") / "text.jsonl"
    lengths = (48, 20, 48, 33, 40, 12)
    texts = [(SENTENCES * 2)[7 * i : 7 * i + length] for i, length in enumerate(lengths)]
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return path


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama2") / "dense", blocks=2)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama3") / "dense", blocks=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama4") / "dense", blocks=4)


@pytest.fixture(scope="package")
def ray_workers(ray_address):
    """Let the runs of this folder on the session's Ray take over each other's workers."""
    with warm_workers():
        yield
