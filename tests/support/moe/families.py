"""Tiny random mixture-of-experts models of every supported family, made without downloads."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

VOCABULARY = 96
BLOCKS = 4
EXPERTS = 4


def _sizes(**changes: object) -> dict[str, object]:
    """Return common arguments of the configs: 4 blocks, 4 query and 2 key-value heads of 8."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


MOE_FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_sizes(num_local_experts=EXPERTS))),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_sizes(num_experts=EXPERTS, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True)
        )
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**_sizes(num_experts=EXPERTS))),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_sizes(
                num_key_value_heads=4,
                moe_intermediate_size=24,
                n_routed_experts=EXPERTS,
                n_shared_experts=1,
                n_group=2,
                topk_group=1,
                first_k_dense_replace=1,
                kv_lora_rank=16,
                q_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
            )
        )
    ),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **_sizes(
                num_experts=EXPERTS, moe_intermediate_size=24, shared_expert_intermediate_size=24
            )
        )
    ),
    "qwen3_next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **_sizes(
                num_experts=EXPERTS,
                moe_intermediate_size=24,
                shared_expert_intermediate_size=24,
                head_dim=8,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                layer_types=["linear_attention", "full_attention"] * (BLOCKS // 2),
            )
        )
    ),
    "granitemoe": lambda: GraniteMoeForCausalLM(
        GraniteMoeConfig(**_sizes(num_local_experts=EXPERTS))
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **_sizes(
                num_local_experts=EXPERTS,
                head_dim=8,
                sliding_window=6,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            )
        )
    ),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **_sizes(
                intermediate_size_mlp=48,
                num_local_experts=EXPERTS,
                num_experts_per_tok=1,
                interleave_moe_layer_step=2,
                head_dim=8,
                attention_chunk_size=8,
            )
        )
    ),
}
"""Random models of every family, float32, by name."""


def make_moe(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Make a family's model in eval mode from fixed random numbers, its routers included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MOE_FAMILIES[family]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2)
                elif "norm" not in name:
                    parameter.normal_(std=0.1)
    return model.to(dtype).eval()


def write_moe(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the family's checkpoint to `directory`; always the same bytes."""
    make_moe(family, dtype).save_pretrained(directory)
    return directory
