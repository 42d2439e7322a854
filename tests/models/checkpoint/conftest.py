"""Checkpoints with all forms."""

from functools import cache

import pytest
from compressed import compress, logits, mixed_plan
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def made_of(checkpoint, tmp_path_factory):
    """A family's tiny checkpoint with all forms, in several files; not to be changed."""
    root = tmp_path_factory.mktemp("forms")

    @cache
    def make(family):
        dense = checkpoint(family)
        return compress(dense, root / family, make_plan=mixed_plan, max_shard_bytes=20_000)

    return make


@pytest.fixture(scope="session")
def made(made_of):
    """A tiny GPT-2 in several files, with all forms, index codes and `Conv1D` layers."""
    return made_of("gpt2")


@pytest.fixture(scope="session")
def llama(made_of):
    """A tiny Llama with all forms."""
    return made_of("llama")


@pytest.fixture(scope="session")
def expected(llama):
    return logits(AutoModelForCausalLM.from_pretrained(llama.directory))
