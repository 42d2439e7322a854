"""Configs, models and texts of the forecasts."""

import json

import pytest
from large_models import CONFIGS
from pipeline import write_llama, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama8") / "dense", blocks=8)


@pytest.fixture
def config(tmp_path):
    """Write a directory with only a config.json."""

    def write(name, **fields):
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(CONFIGS[name] | fields))
        return str(path)

    return write
