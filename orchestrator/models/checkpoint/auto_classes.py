"""Auto classes of transformers by which a model is loaded."""

CAUSAL, IMAGE_TEXT = "AutoModelForCausalLM", "AutoModelForImageTextToText"


def auto_classes(reads_images: bool) -> tuple[str, ...]:
    """Names of the auto classes for whole models; the last is the one that reads all inputs.

    Programs for text ask for `AutoModelForCausalLM`, also for a model of images and text.
    """
    return (CAUSAL, IMAGE_TEXT) if reads_images else (CAUSAL,)
