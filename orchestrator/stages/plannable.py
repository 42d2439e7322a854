"""Shapes of a model for `plan`, if a run would accept it."""

from orchestrator.errors import InputError
from orchestrator.forecast.known_architectures import check_bare_config, has_known_architecture
from orchestrator.forecast.shapes import FAMILIES, Shapes, from_checkpoint, from_config
from orchestrator.forecast.surveyed import surveyed_shapes
from orchestrator.models.checkpoint.headers import Headers, has_weights, read_json
from orchestrator.models.checkpoint.other_formats import check_format
from orchestrator.models.inputs.tokenizer import check_tokenizer
from orchestrator.store.places import Place


def plannable_shapes(model: Place) -> Shapes:
    """The shapes of a checkpoint that a run accepts, or of a config.json alone.

    A checkpoint or a config that is exactly what the formulas of its family describe is accepted by
    them, in milliseconds and without torch. Any other is surveyed, a checkpoint as in a run, which
    takes seconds. A checkpoint has a tokenizer; a config alone needs none.

    Raises:
        InputError: It is neither; a number in the config is missing or not allowed; a header is
            damaged; weights are not safetensors; or a run would refuse the model.
    """
    check_format(model)
    if not model.is_dir():
        if not model.is_file():
            raise InputError(
                f"{model}: no such directory or file; give a checkpoint's directory, or a "
                "config.json"
            )
        if not model.name.endswith(".json"):
            raise InputError(f"{model}: is a file; give its directory, or a config.json")
        return _shapes_of_config(model, model)
    if not has_weights(model):
        return _shapes_of_config(model, model / "config.json")
    headers = Headers.open(model)
    if has_known_architecture(headers):
        check_tokenizer(model)
        return from_checkpoint(headers)
    from orchestrator.models.shards.lazy_model import LazyModel

    survey = LazyModel.open(model).survey()
    check_tokenizer(model)
    return surveyed_shapes(survey)


def _shapes_of_config(model: Place, path: Place) -> Shapes:
    """The shapes of a model from its config alone, by formulas or by a survey of its class.

    Args:
        path: The config, which `model` is, or in which it is.
    """
    config = read_json(path)
    check_bare_config(path, config)
    if config.get("model_type") in FAMILIES:
        return from_config(config, str(path))
    from orchestrator.models.survey.config_alone import survey_config

    return surveyed_shapes(survey_config(model))
