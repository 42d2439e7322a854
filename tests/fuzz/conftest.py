"""A directory for random inputs."""

import pytest


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Directory to which all inputs of the module are written, one after the other."""
    return tmp_path_factory.mktemp("room")
