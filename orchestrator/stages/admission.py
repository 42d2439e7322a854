"""Check of a compression's memory before it starts, by a forecast for the machines at hand."""

from collections.abc import Collection
from dataclasses import replace

import torch

from orchestrator.errors import InfeasibleError, InputError, UsageError
from orchestrator.forecast.expected import expected
from orchestrator.forecast.forecast import forecast
from orchestrator.forecast.outcome import Forecast, Resources
from orchestrator.forecast.rates import Machine, largest_memory, nominal_rates
from orchestrator.forecast.shapes import FAMILIES, read_shapes
from orchestrator.forecast.surveyed import surveyed_shapes
from orchestrator.models.evaluation.machine import host_bytes
from orchestrator.plan.linear import Survey
from orchestrator.readable import size
from orchestrator.recipe.execution import Execution
from orchestrator.recipe.recipe import Recipe
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.runtime.scaling import Bounds
from orchestrator.runtime.workers import WorkerGroup
from orchestrator.store.places import Place


def check_memory(
    recipe: Recipe,
    model: Place,
    monitor: RunMonitor,
    *,
    survey: Survey | None = None,
    measured: int | None = None,
) -> Forecast | None:
    """Report the peak memory of a worker, and refuse a run that cannot fit.

    The monitor gets the expected times of stages and calls.

    Device memory is known for a local run, for GPUs that Ray names, and for a single-machine CPU
    run; at least one device must fit the peak stage. A run is not refused if memory is unknown, or
    if the model's headers do not suffice for a forecast.

    Args:
        survey: Survey of the model, for linears that its headers do not show.
        measured: Memory of a worker's GPU as started workers report it, in bytes.

    Raises:
        InfeasibleError: A stage does not fit on the largest known device.
    """
    there = _in_this_process() if recipe.executor == "local" else _on_ray(recipe)
    workers, room, kind = there
    is_gpu = kind is not None
    machine = Machine("", room, (nominal_rates(kind),), is_gpu)
    resources = Resources(workers=workers, machine=machine, memory_bytes=room)
    if measured is not None:
        resources = replace(resources, memory_bytes=float(measured))
    try:
        if survey is None or survey.model_type in FAMILIES:
            shapes = read_shapes(model)
        else:
            shapes = surveyed_shapes(survey)
        found = forecast(shapes, recipe, resources)
        monitor.progress.expected = expected(found, shapes, recipe, resources)
    except (InputError, UsageError) as error:
        # headers may lack what it needs, or name linears otherwise than the model does
        monitor.note(f"no forecast: {error}")
        return None
    peak = found.peak
    what = f"a worker holds up to {size(peak.device.total)}, in {peak.name}"
    of = f" of {size(room)} assumed from its GPU's type" if room and _is_assumed(recipe) else ""
    of = f" of {size(measured)}" if measured is not None else of
    groups = found.expert_groups
    in_groups = f", with the experts of a block in {groups} groups" if groups > 1 else ""
    monitor.note(f"forecast: {what}{of}{in_groups}; the run directory {size(found.run_bytes)}")
    if found.infeasible and not recipe.allow_infeasible:
        raise InfeasibleError(
            f"{found.infeasible[0]}; `orchestrator plan` says more, and --allow-infeasible tries "
            "it nevertheless"
        )
    return found


def recheck_memory(
    found: Forecast | None,
    recipe: Recipe,
    model: Place,
    *,
    workers: WorkerGroup,
    monitor: RunMonitor,
    survey: Survey | None = None,
) -> Forecast | None:
    """Repeats the forecast with the GPU memory that the started workers report.

    Before a worker starts, only Ray's name of the GPU type is known: the larger size is assumed of
    a card that is sold in two sizes, and the whole card for a slice of it (MIG).

    Raises:
        InfeasibleError: As `check_memory`.
    """
    measured = workers.device_bytes
    if found is None or measured is None or measured == found.limits["device"]:
        return found
    assumed = found.limits["device"]
    before = "it was unknown" if assumed is None else f"{size(assumed)} were assumed from its type"
    monitor.note(f"a worker's GPU has {size(measured)}; {before}")
    return check_memory(recipe, model, monitor, survey=survey, measured=measured)


def _in_this_process() -> tuple[int, float, str | None]:
    """Workers, the memory of one, and the name of its GPU; None if it has none."""
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        return 1, float(about.total_memory), str(about.name)
    return 1, float(host_bytes()), None


def _is_assumed(execution: Execution) -> bool:
    """True if the known memory is assumed from the GPU type, since Ray reports no more."""
    if execution.executor == "local":
        return False
    from orchestrator.runtime.ray import connect

    return not connect.is_this_machine()


def _largest_memory(kinds: Collection[str]) -> float | None:
    """Most memory of a GPU of these types; None without GPUs or if a type is unknown.

    The memory that workers report later takes precedence.
    """
    known = [memory for kind in kinds if (memory := largest_memory(kind)) is not None]
    return max(known) if known and len(known) == len(kinds) else None


def _on_ray(execution: Execution) -> tuple[int, float | None, str | None]:
    from orchestrator.runtime.ray import connect

    there, kinds = connect.worker_room(execution), connect.gpu_kinds()
    room, kind = _largest_memory(kinds), min(kinds, default=None)
    bounds = Bounds.of(execution.workers)
    if room is None and not bounds.is_growing and connect.is_this_machine():
        room = float(host_bytes())
    most = bounds.most if bounds.is_growing and bounds.most else max(there, 1)
    return max(1, min(most, bounds.most or most)), room, kind
