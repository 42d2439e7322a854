"""Checkpoints with all forms."""

import pytest
from compressed import compress, logits, mixed_plan
from families import write_checkpoint
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A tiny GPT-2 in several files, with all forms, index codes and `Conv1D` layers."""
    root = tmp_path_factory.mktemp("forms")
    dense = write_checkpoint("gpt2", root / "dense")
    return compress(dense, root / "out", make_plan=mixed_plan, max_shard_bytes=20_000)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny Llama with all forms."""
    root = tmp_path_factory.mktemp("forms")
    dense = write_checkpoint("llama", root / "dense")
    return compress(dense, root / "out", make_plan=mixed_plan, max_shard_bytes=20_000)


@pytest.fixture(scope="session")
def expected(llama):
    return logits(AutoModelForCausalLM.from_pretrained(llama.directory))
