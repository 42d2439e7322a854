"""Shapes of a model for `plan`, if a run would accept it."""

from orchestrator.errors import InputError
from orchestrator.forecast.experts import with_experts
from orchestrator.forecast.known_architectures import check_bare_config, has_known_architecture
from orchestrator.forecast.shapes import Shapes, from_checkpoint, read_shapes
from orchestrator.models.checkpoint.headers import Headers, has_weights, read_json
from orchestrator.models.checkpoint.other_formats import check_format
from orchestrator.models.inputs.tokenizer import check_tokenizer
from orchestrator.store.places import Place


def plannable_shapes(model: Place) -> Shapes:
    """The shapes of a checkpoint that a run accepts, or of a config.json alone.

    A checkpoint that is exactly what the formulas of its family describe is accepted by them, in
    milliseconds and without torch. Any other is surveyed as in a run, which takes seconds. A
    checkpoint has a tokenizer; a config alone needs none.

    Raises:
        InputError: As `read_shapes`, or a run would refuse the model.
    """
    check_format(model)
    if not model.is_dir():
        if model.is_file():
            if not model.name.endswith(".json"):
                raise InputError(f"{model}: is a file; give its directory, or a config.json")
            check_bare_config(model, read_json(model))
        return read_shapes(model)
    if not has_weights(model):
        check_bare_config(model / "config.json", read_json(model / "config.json"))
        return read_shapes(model)
    headers = Headers.open(model)
    if has_known_architecture(headers):
        check_tokenizer(model)
        return from_checkpoint(headers)
    from orchestrator.models.shards.lazy_model import LazyModel

    survey = LazyModel.open(model).survey()
    check_tokenizer(model)
    return with_experts(from_checkpoint(headers), survey, headers.config)
