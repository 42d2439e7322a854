"""Tiny random checkpoints of every supported family, made from configs without downloads."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 96
BLOCKS = 4


def _llama(**changes: object) -> dict[str, object]:
    """Return common arguments of Llama-like configs: 4 query heads and 2 key-value heads of 8."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_llama())),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**_llama(tie_word_embeddings=True))),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_llama(sliding_window=6))),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_llama())),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_llama(head_dim=16))),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_llama(head_dim=8, sliding_window=6, query_pre_attn_scalar=8))
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_llama(
                head_dim=8,
                sliding_window=6,
                query_pre_attn_scalar=8,
                layer_types=["sliding_attention", "full_attention"] * (BLOCKS // 2),
            )
        )
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_llama())),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=BLOCKS,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}
"""Random models of every family, float32, by name."""


def write_checkpoint(
    family: str, directory: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB"
) -> Path:
    """Write the family's checkpoint to `directory`; always the same bytes."""
    return write_model(FAMILIES[family], directory, dtype=dtype, max_shard_size=max_shard_size)


def write_model(
    make: Callable[[], PreTrainedModel],
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a model made from fixed random numbers; biases and norms are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
