"""Dense tensors of experts that are dropped: zeros, or a model of the class with fewer experts.

A router that lost the rows of dropped experts is that of a smaller model. If every block has as
many experts, the config of the class says so, and the model is an ordinary one.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.layout import FileSpec, TensorSpec
from orchestrator.models.experts.module import Experts
from orchestrator.models.survey.architecture import Architecture

ZEROS = "zeros"
"""Part of a tensor of a dropped expert."""
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names of the number of experts in configs."""


def experts_modules(model: PreTrainedModel) -> dict[str, Experts]:
    """Return the experts modules of a model by name."""
    return {name: each for name, each in model.named_modules() if isinstance(each, Experts)}


def zeros_of(name: str, experts: Experts, dtype: str) -> Iterator[TensorSpec]:
    """Yield the tensors of dropped experts whose rows the router still has."""
    layout = experts.layout
    for number in experts.numbers:
        if experts.is_dropped(number):
            for part in layout.parts:
                inputs, outputs = layout.features(part)
                shapes = {"weight": (outputs, inputs), "bias": (outputs,)}
                for kind in layout.kinds:
                    linear = f"{name}.{number}.{part}"
                    yield TensorSpec(
                        name=f"{linear}.{kind}",
                        dtype=dtype,
                        shape=shapes[kind],
                        part=ZEROS,
                        source=linear,
                    )


def fewer_experts(
    dense: Architecture, config: dict[str, Any], modules: Mapping[str, Experts]
) -> tuple[Architecture, dict[str, Any]]:
    """Return architecture and config.json of the model with as many experts as routers have rows.

    Raises:
        InputError: Blocks have different numbers of experts.
    """
    wholes = {each.num_experts for each in modules.values()}
    counts = sorted({len(each.numbers) for each in modules.values()})
    if {*counts} == wholes:
        return dense, config
    if len(counts) > 1 or len(wholes) > 1:
        raise InputError(
            f"{dense.directory}: its blocks have {counts[0]} to {counts[-1]} experts, as no dense "
            "model has; compress with an equal number in all of them (reap.scope block), or keep "
            "routers as they are (reap.router zero, threshold.drop zero)"
        )
    (whole,), (count,) = wholes, counts
    smaller = copy.deepcopy(dense.config)
    for part in (smaller, smaller.get_text_config()):
        for key in COUNT_KEYS:
            if getattr(part, key, None) == whole:
                setattr(part, key, count)
    return replace(dense, config=smaller), _recounted(config, whole, count)


def _recounted(config: Mapping[str, Any], whole: int, count: int) -> dict[str, Any]:
    """Copy of a config, and of those in it, with another number of experts."""
    inner = {
        key: _recounted(each, whole, count)
        for key, each in config.items()
        if isinstance(each, Mapping)
    }
    counts = {key: count for key in COUNT_KEYS if config.get(key) == whole}
    return {**config, **inner, **counts}


def renumbered(files: Sequence[FileSpec], modules: Mapping[str, Experts]) -> tuple[FileSpec, ...]:
    """Return files whose experts are numbered by the rows of their routers."""
    names = {
        f"{name}.{number}.": f"{name}.{row}."
        for name, each in modules.items()
        for row, number in enumerate(each.numbers)
    }

    def renamed(spec: TensorSpec) -> TensorSpec:
        prefix = ".".join(spec.name.split(".")[:-2]) + "."
        if prefix not in names:
            return spec
        return replace(spec, name=names[prefix] + spec.name.removeprefix(prefix))

    return tuple(replace(file, tensors=tuple(map(renamed, file.tensors))) for file in files)
