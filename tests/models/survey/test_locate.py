"""Location of a model: a directory, or a snapshot in the local hub cache."""

import pytest
from huggingface_hub import constants

from orchestrator.errors import InputError, UsageError
from orchestrator.models.survey.locate import locate

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Hub cache with two revisions of org/model, and a hub that must not be contacted."""
    repository = tmp_path / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in COMMITS.items():
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


def test_directory(tmp_path):
    """A directory is returned as it is, and accepts no revision."""
    assert locate(str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match="applies to hub ids only"):
        locate(str(tmp_path), revision="main")


def test_file(tmp_path):
    """A file is not a model."""
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(InputError, match="is a file"):
        locate(str(path))


def test_cached_snapshot(hub_cache):
    """A hub id resolves to its snapshot in the local cache, of the main or the given revision."""
    assert locate("org/model") == hub_cache / "snapshots" / COMMITS["main"]
    assert locate("org/model", revision="v2") == hub_cache / "snapshots" / COMMITS["v2"]


@pytest.mark.parametrize("revision", [None, "v3"])
@pytest.mark.parametrize("download", [False, True])
def test_not_cached(hub_cache, revision, download):
    """A model missing from the cache is invalid input; the message names the remedy."""
    hub_id = "org/other" if revision is None else "org/model"
    with pytest.raises(InputError, match="hub does not respond" if download else "--download"):
        locate(hub_id, revision=revision, download=download)


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./none", "a/b/c", "a\nb"])
def test_path_that_does_not_exist(model):
    """A name that can only be a path is not looked up on the hub; the message is one line."""
    with pytest.raises(InputError, match=r"no such directory$") as raised:
        locate(model)
    assert len(str(raised.value).splitlines()) == 1
