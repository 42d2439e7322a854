"""Models of images and text among the classes of transformers."""

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def reads_images(architecture: str) -> bool:
    """Test if a class, `LlavaForConditionalGeneration`, is a model of images and text."""
    return architecture in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
