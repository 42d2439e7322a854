"""Survey of a model from its config alone: names, sites and sizes of what its class builds.

The class builds the model on the meta device, with all experts of a block in one tensor. Of blocks
that are built equally only the first is given a linear for each matrix of an expert and traced;
the others take over its linears. So the cost is that of the kinds of blocks, not of their number:
DeepSeek-V3 has two kinds in 61 blocks.
"""

import torch
from transformers import PreTrainedModel

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.layout import dtype_name
from orchestrator.models.experts.replace import check_count, find_experts, replace_experts
from orchestrator.models.survey.architecture import (
    Architecture,
    find_blocks,
    mark_all_initialized,
)
from orchestrator.models.survey.discovery import discover
from orchestrator.models.survey.experts import survey_experts, with_routing
from orchestrator.models.survey.image_models import reads_images
from orchestrator.models.survey.linears import check_parameters
from orchestrator.models.survey.regions import find_regions, model_sizes
from orchestrator.models.survey.repeats import find_repeats, repeat_experts
from orchestrator.models.survey.tower import tower_linears
from orchestrator.plan.linear import Survey
from orchestrator.store.places import Place

PARAMETERS = 5_000
"""Number of tensors for which a model is built, with room for twice as many and more, so that a
damaged config does not build for hours; a block of a published model has 10 to 30."""
WIDEST = 2**20
"""Largest hidden size: a state of the traced pass has values up to the first block."""


def survey_config(place: Place) -> Survey:
    """Survey the model of a config.json, without a fingerprint.

    It equals the survey of the checkpoint (`LazyModel.survey`) that the class would save: a tied
    head is not stored again, and all stored tensors are those of the class.

    Cost: a build of the class on the meta device and a trace of each kind of block; seconds.

    Args:
        place: A directory with the config.json, or the file.

    Raises:
        InputError: As `Architecture.read`, `build_native` and `LazyModel.open`.
    """
    architecture = Architecture.read(place)
    if architecture.forms is not None:
        raise InputError(f"{place}: already compressed by orchestrator; a dense model is needed")
    dtype = _dtype(architecture)
    model = architecture.build_native(dtype, stored=PARAMETERS)
    where, tied = str(place), set(model.all_tied_weights_keys)
    hidden = model.config.get_text_config(decoder=True).hidden_size
    if hidden > WIDEST:
        raise InputError(f"{where}: hidden_size is {hidden}; at most {WIDEST} is supported")
    state = model.state_dict()
    sizes = {name: tensor.numel() for name, tensor in state.items() if name not in tied}
    parameters = sum(p.numel() for name, p in model.named_parameters() if name not in tied)
    prefix, blocks = find_blocks(model, place)
    first = find_repeats(blocks)
    _replace_experts(model, prefix, sorted(set(first)), where)
    experts = repeat_experts(survey_experts(model, prefix), prefix, first)
    mark_all_initialized(model)
    discovery = discover(model.eval(), prefix, blocks, where=where, is_dense=True, first=first)
    if not discovery.linears:
        raise InputError(f"{where}: no block has a linear")
    regions = find_regions(tuple(state), prefix, discovery)
    model_class = architecture.model_class
    return Survey(
        fingerprint="",
        architecture=model_class.__name__,
        config_class=model_class.config_class.__name__,
        model_type=architecture.config.model_type,
        dtype=dtype_name(dtype),
        num_blocks=len(blocks),
        linears=with_routing(discovery.linears, experts),
        total_parameters=parameters,
        sizes=model_sizes(
            ((*regions[name], count) for name, count in sizes.items()), architecture.config
        ),
        experts=experts,
        reads_images=reads_images(model_class.__name__),
        tower=tower_linears(model, prefix),
    )


def _dtype(architecture: Architecture) -> torch.dtype:
    """Return the dtype that a config says, else float32."""
    config = architecture.config
    named = (config.dtype, config.get_text_config(decoder=True).dtype)
    return next((each for each in named if isinstance(each, torch.dtype)), torch.float32)


def _replace_experts(model: PreTrainedModel, prefix: str, first: list[int], where: str) -> None:
    """Replace the experts of the first blocks of each kind, and check the matrices of these."""
    try:
        check_count(type(model).__name__, find_experts(model).values())
        for index in first:
            replace_experts(model.get_submodule(f"{prefix}.{index}"))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    for index in first:
        name = f"{prefix}.{index}"
        check_parameters(where, name, model.get_submodule(name))
