"""Common parts of whole-run tests: models with a tokenizer, a text, runs and their bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from families import VOCABULARY, _llama, write_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orchestrator import Recipe, Result, compress
from orchestrator.models.inputs.text import load_tokens
from orchestrator.models.inputs.tokenizer import load_tokenizer
from orchestrator.models.shards.chunk import Chunk

SENTENCES = (
    "The river ran past seven mills before it came to the sea.\n"
    "Nobody at the inn could say who had built the bridge, or when.\n"
    "She counted 42 ships; the last of them carried salt & rope.\n"
)


def add_tokenizer(directory: Path) -> Path:
    """Add a tokenizer of single characters to a tiny model with a vocabulary of 96."""
    characters = [chr(code) for code in range(32, 32 + VOCABULARY - 1)]
    vocabulary = {character: n for n, character in enumerate([*characters, "\n"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?").save_pretrained(directory)
    return directory


def with_tokenizer(checkpoint: Path, directory: Path) -> Path:
    """Copy a checkpoint and add a tokenizer."""
    return add_tokenizer(Path(shutil.copytree(checkpoint, directory)))


def write_llama(directory: Path, *, blocks: int = 10, hidden: int = 64) -> Path:
    """Write a Llama with more blocks, slow enough to be interrupted if it is wide."""
    config = _llama(num_hidden_layers=blocks, hidden_size=hidden, intermediate_size=3 * hidden)
    write_model(lambda: LlamaForCausalLM(LlamaConfig(**config)), directory)
    return add_tokenizer(directory)


def write_text(path: Path, characters: int = 4000) -> Path:
    path.write_text((SENTENCES * (characters // len(SENTENCES) + 1))[:characters])
    return path


def run(model: Path, out: Path, text: Path, *, on_event: Any = None, **fields: Any) -> Result:
    """Compress with small defaults and the cheapest method, in this process by default."""
    small: dict[str, Any] = {"keep": 0.5, "samples": 6, "sequence_length": 48, "executor": "local"}
    if "method" not in fields:
        small["method"] = "svd-llm"
    recipe = Recipe(model=str(model), out=str(out), calibration=str(text), **(small | fields))
    return compress(recipe, on_event)


def contents(out: Path) -> dict[str, Any]:
    """Return every file of a checkpoint as bytes, the report without timings."""
    files: dict[str, Any] = {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }
    report = json.loads(files["orchestrator_report.json"])
    del report["timings"]
    return files | {"orchestrator_report.json": report}


def token_chunks(model: Path, text: Path, layout: str = "packed") -> list[Chunk]:
    """Read the calibration sequences of `run`."""
    tokens = load_tokens(
        str(text),
        field="text",
        samples=6,
        sequence_length=48,
        sampling="first",
        layout=layout,
        tokenizer=load_tokenizer(model),
    )
    pairs = zip(tokens.ids, tokens.mask, strict=True)
    return [
        Chunk(index, torch.from_numpy(ids)[None].long(), torch.from_numpy(mask)[None])
        for index, (ids, mask) in enumerate(pairs)
    ]
