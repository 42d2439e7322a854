"""Llama-like checkpoint of random bfloat16 weights, written block by block."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ."


def config_of(*, blocks: int, hidden: int, intermediate: int) -> LlamaConfig:
    """Make a config with heads of 128 channels, four per key-value head."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=len(CHARACTERS),
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a block, by their names within it."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, intermediate),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
    }


def write_model(directory: Path, config: LlamaConfig) -> None:
    """Write one file per block, so that only one block is in memory."""
    directory.mkdir(parents=True)
    hidden = config.hidden_size
    outer = {"embed_tokens.weight": (len(CHARACTERS), hidden), "norm.weight": (hidden,)}
    files = {"model-outer.safetensors": {f"model.{name}": shape for name, shape in outer.items()}}
    for block in range(config.num_hidden_layers):
        files[f"model-block-{block:05d}.safetensors"] = {
            f"model.layers.{block}.{name}": shape for name, shape in block_shapes(config).items()
        }
    generator = torch.Generator().manual_seed(0)
    total = sum(_write(directory / file, shapes, generator) for file, shapes in files.items())
    places = {name: file for file, shapes in files.items() for name in shapes}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(directory)
    vocabulary = {character: number for number, character in enumerate(CHARACTERS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=".").save_pretrained(directory)


def write_text(path: Path, characters: int) -> Path:
    line = "the same few words again and again, a model of noise is not choosy. "
    path.write_text((line * (characters // len(line) + 1))[:characters])
    return path


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> int:
    """Write a file of normal weights with deviation 0.02 and norms of one; returns its size."""
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = torch.ones(shape)
        if len(shape) == 2:
            tensor.normal_(std=0.02, generator=generator)
        tensors[name] = tensor.bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(tensor.numel() * 2 for tensor in tensors.values())
