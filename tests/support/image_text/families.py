"""Tiny random checkpoints of models that read images and text, made from configs."""

from collections.abc import Callable

from families import BLOCKS, VOCABULARY, _llama
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
)

IMAGE = 90
"""Placeholder of one image token."""
IMAGE_START, IMAGE_END = 92, 93
SIDE, PATCH = 28, 7
"""Pixels of an image and of a patch along a side: 16 patches an image."""
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def _tower(**changes: object) -> dict[str, object]:
    """Arguments of CLIP and SigLIP configs."""
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        **changes,
    }


def _qwen_tower(**changes: object) -> dict[str, object]:
    return {
        "depth": 2,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **changes,
    }


def _rotary(*sections: int, **changes: object) -> dict[str, object]:
    """Arguments of a text config with three rotary positions: time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return _llama(rope_parameters=rope, **changes)


def _llava() -> PreTrainedModel:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**_tower(projection_dim=16)),
            text_config=LlamaConfig(**_llama()),
            image_token_index=IMAGE,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )


def _llava_next() -> PreTrainedModel:
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**_tower(projection_dim=16)),
            text_config=LlamaConfig(**_llama()),
            image_token_index=IMAGE,
            image_grid_pinpoints=_PINPOINTS,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )


def _llava_onevision() -> PreTrainedModel:
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**_tower()),
            text_config=Qwen2Config(**_llama()),
            image_token_index=IMAGE,
            video_token_index=91,
            image_grid_pinpoints=_PINPOINTS,
        )
    )


def _qwen2_vl() -> PreTrainedModel:
    tower = _qwen_tower(embed_dim=16, hidden_size=32, mlp_ratio=2, in_channels=3)
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=_rotary(1, 1, 2), vision_config=tower, **_QWEN_TOKENS)
    )


def _qwen2_5_vl() -> PreTrainedModel:
    tower = _qwen_tower(
        hidden_size=16,
        intermediate_size=24,
        out_hidden_size=32,
        window_size=SIDE,
        fullatt_block_indexes=[1],
    )
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=_rotary(1, 1, 2), vision_config=tower, **_QWEN_TOKENS)
    )


def _qwen3_tower() -> dict[str, object]:
    return _qwen_tower(
        depth=3,
        hidden_size=16,
        intermediate_size=24,
        out_hidden_size=32,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1, 2],
    )


def _qwen3_vl() -> PreTrainedModel:
    text = _rotary(2, 1, 1, head_dim=8)
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=_qwen3_tower(), **_QWEN_TOKENS)
    )


def _qwen3_vl_moe() -> PreTrainedModel:
    text = _rotary(2, 1, 1, head_dim=8, **_EXPERTS)
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config=_qwen3_tower(), **_QWEN_TOKENS)
    )


def _gemma3() -> PreTrainedModel:
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=_llama(
                head_dim=8,
                sliding_window=16,
                query_pre_attn_scalar=8,
                layer_types=["sliding_attention", "full_attention"] * (BLOCKS // 2),
            ),
            vision_config=_tower(),
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=IMAGE_START,
            eoi_token_index=IMAGE_END,
        )
    )


IMAGE_FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3_vl": _gemma3,
}
"""Random models of every family, float32, by name; their text part has the sizes of `families`."""

IMAGE_MOE_FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {"qwen3_vl_moe": _qwen3_vl_moe}
"""The same with experts in the text part; their rows are multiplied in another order."""

assert VOCABULARY > IMAGE_END
