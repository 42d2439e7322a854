"""Models of images and text among the classes of transformers."""

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def reads_images(architecture: str) -> bool:
    """Test if a class, `LlavaForConditionalGeneration`, is a model of images and text."""
    return architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()


def image_token(config: PretrainedConfig) -> int | None:
    """Token that stands for a part of an image; None for a model of text."""
    found = getattr(config, "image_token_id", None)
    is_image_model = any(map(reads_images, config.architectures or ()))
    return found if is_image_model and isinstance(found, int) else None
