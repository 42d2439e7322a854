"""Models and texts of the golden record, with bytes that do not depend on libraries or processors.
Weights are sums of hashed bytes and not random numbers of torch, whose vectorised generators give
other bits on other processors; configs, tokenizer and text are written out. Shapes and names are
those of the model class, which is built on the meta device."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY = 96
TEXT = (
    "The river ran past seven mills before it came to the sea.\n"
    "Nobody at the inn could say who had built the bridge, or when.\n"
    "She counted 42 ships; the last of them carried salt & rope.\n"
)
HELD_OUT = "At noon the miller's daughter closed 19 sluices, and the valley fell silent.\n"

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    # the last group of blocks that share a basis is a shorter one
    "llama_three": {**_LLAMA, "num_hidden_layers": 3},
    "llama_bf16": {**_LLAMA, "dtype": "bfloat16"},
    # inputs wide enough for all three index codes
    "llama_wide": {**_LLAMA, "intermediate_size": 192},
    "gemma2": {
        **_LLAMA,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 4,
        "query_pre_attn_scalar": 4,
        "sliding_window": 6,
        "tie_word_embeddings": True,
    },
    "phi3": {
        **_LLAMA,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "pad_token_id": 0,
    },
    "qwen3_moe": {
        **_LLAMA,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 4,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    },
}
LARGE: dict[str, Any] = {
    **_LLAMA,
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
"""The shapes of Llama 8B, for forecasts; no weights."""


def write_models(directory: Path) -> None:
    """Write every model into a subdirectory of its name, and the texts."""
    for name, config in CONFIGS.items():
        write_model(config, directory / name)
    (directory / "text.txt").write_text(TEXT * 4)
    lines = [json.dumps({"text": line}) for line in TEXT.splitlines()]
    (directory / "text.jsonl").write_text("\n".join(lines * 2) + "\n")
    (directory / "held_out.txt").write_text(HELD_OUT * 3)


def write_model(config: dict[str, Any], directory: Path) -> None:
    """Write a checkpoint with a tokenizer; the same bytes on every machine."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    _write_tokenizer(directory)
    tensors = {
        name: values(name, shape).to(getattr(torch, config["dtype"]))
        for name, shape in _shapes(directory).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _shapes(directory: Path) -> dict[str, torch.Size]:
    """Names and shapes of a checkpoint's tensors; of a tied group the first."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def values(name: str, shape: torch.Size) -> torch.Tensor:
    """Values of mean 0 and deviation 0.18, those of norms around 1; exact in float32. Columns of
    matrices are scaled by powers of 2, so that inputs and outputs have unequal weight."""
    count = shape.numel()
    content = hashlib.shake_256(name.encode()).digest(4 * count)
    octets = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    values = (octets.view(count, 4).sum(dim=1, dtype=torch.int64) - 510).float() / 1024
    values = values.reshape(shape)
    if len(shape) == 1:
        is_scale = "norm" in name or ".ln_" in name
        return 1.0 + values if is_scale and name.endswith("weight") else values
    return values * 2.0 ** -(torch.arange(shape[-1]) % 3)


def _write_tokenizer(directory: Path) -> None:
    """Write a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    characters = [*(chr(code) for code in range(32, 32 + VOCABULARY - 1)), "\n"]
    vocabulary = {character: number for number, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
