"""A forecast as text."""

from collections.abc import Mapping

from orchestrator.forecast.outcome import Forecast
from orchestrator.readable import counted, duration, size


def lines(found: Forecast) -> list[str]:
    """Sizes, a table of the stages, and reasons the run is infeasible."""
    model, rows = found.model, list(found.start_seconds)
    facts = {
        "model": f"{model['type']}, {model['values']:,} parameters in "
        f"{counted(model['blocks'], 'block')}, {size(model['bytes'])}",
        "machine": f"{counted(found.workers, 'worker')} on {found.machine}",
        "shards": f"{found.shards} of at most {counted(found.blocks_a_shard, 'block')}, in "
        f"{counted(found.waves, 'wave')}",
        **_experts(found),
        **_memory(found),
        "run directory": f"{size(found.run_bytes)}, in {found.run_peak}: "
        + _parts(found.run[found.run_peak].parts),
        "resuming": _resuming(found),
        "chunks moved": size(found.moved_bytes),
        "result": _result(found),
    }
    table = [["stage", "FLOPs", *map(_words, rows)]]
    table.append(["start", "", *(duration(found.start_seconds[row]) for row in rows)])
    for stage in found.stages:
        times = [duration(stage.seconds[row]) for row in rows]
        table.append([stage.name, f"{stage.flops:.2g}" if stage.flops else "", *times])
    total = sum(stage.flops for stage in found.stages)
    table.append(["together", f"{total:.2g}", *(duration(found.seconds[row]) for row in rows)])
    if found.money is not None:
        table.append(["money", "", *(f"{found.money[row]:.2f}" for row in rows)])
    facts |= _float64(found)
    width = max(map(len, facts))
    shown = [f"{name:<{width}}  {text}" for name, text in facts.items()]
    shown += ["", *_aligned(table), "", *(f"rates: {source}" for source in found.sources)]
    return shown + [f"infeasible: {reason}" for reason in found.infeasible]


def _result(found: Forecast) -> str:
    """Values and bytes of the result, with those of its indices."""
    index = f", with {size(found.index_bytes)} of indices" if found.index_bytes else ""
    return f"{found.final['values']:,} parameters, {size(found.result_bytes)}{index}"


def _memory(found: Forecast) -> dict[str, str]:
    """Rows of a worker's peak memory: of its GPU and of the host, or of the host alone."""
    peak, usable = found.peak, found.limits["usable"]
    of = f" of {size(usable)} usable" if usable is not None else ""
    held = f"{size(peak.device.total)}{of}, in {peak.name}: {_parts(peak.device.parts)}"
    if not found.is_gpu:
        return {"host memory of a worker": held}
    host = f"{size(found.host.total)}: {_parts(found.host.parts)}"
    return {"device memory of a worker": held, "host memory of a worker": host}


def _experts(found: Forecast) -> dict[str, str]:
    """Row about the statistics of a block's experts, if it has some."""
    if not found.experts:
        return {}
    about, groups = found.experts, found.expert_groups
    parts = {"inputs of gate and up as rows": about["rows"], "Grams": about["grams"]}
    held = ", ".join(f"{name} {size(each)}" for name, each in parts.items() if each)
    of = f"in {groups} groups, each with passes of its own" if groups > 1 else "all at once"
    held = held or "no Grams"
    return {"expert statistics": f"{counted(about['count'], 'expert')} of a block {of}: {held}"}


def _float64(found: Forecast) -> dict[str, str]:
    """Rows of the time of eigendecompositions and of products in float64, by rates."""
    said = {
        kind: ", ".join(f"{duration(each)} ({_words(row)})" for row, each in rows.items())
        for kind, rows in found.float64.items()
    }
    remark = f"; {found.float64_remark}" if found.float64_remark else ""
    return {
        "eigendecompositions": said["eigen"],
        "products in float64": f"{said['double']}{remark}",
    }


def _resuming(found: Forecast) -> str:
    """Work that a resumed run repeats."""
    repeated = ["the units in progress"]
    if found.segments > 1:
        repeated.append(f"the forward pass of at most one of {found.segments} segments")
    if not found.keeps_states:
        repeated.append("all steps of a training that has not ended")
    return "repeats " + ", and ".join(filter(None, [", ".join(repeated[:-1]), repeated[-1]]))


def _words(row: str) -> str:
    """Name of a row of rates, `data_sheet`, as text."""
    return row.replace("_", " ")


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
