"""Tables of the live page: stages, workers, failures and runs."""

from collections.abc import Mapping

from orchestrator.pages import tables
from orchestrator.pages.live.files import RunFiles
from orchestrator.pages.live.state import RunState, StageState, WorkerState
from orchestrator.pages.markup import Markup, element, section
from orchestrator.pages.tables import DASH, cell, head, number, row_head
from orchestrator.readable import duration, size
from orchestrator.usage import Usage

MOST_ROWS = 40
"""Number of failures and of runs shown, the last ones."""
MOST_WORKERS = 40
"""Number of workers up to which each has a row; of more, each node has one."""


def clock(name: str, time: float) -> Markup:
    """Make an element that the script fills with the time since, or until, a moment."""
    return element("time", DASH, **{f"data_{name}": round(time, 3)})


def done_text(stage: StageState) -> str:
    """Describe the completed parts of a stage; empty if none are known."""
    parts = stage.parts
    return f"{parts.done:,} of {parts.total:,} {parts.of}" if parts else ""


def usage_of(said: object) -> Usage | None:
    """Read a usage; None if it is none, as in a damaged file."""
    if not isinstance(said, dict):
        return None
    device = said.get("device")
    figures = [said.get("host"), *(device.values() if isinstance(device, dict) else ())]
    if not all(type(each) is int and 0 <= each < 2**63 for each in figures):
        return None
    try:
        return Usage.from_json(said)
    except TypeError:
        return None


def memory_of(usage: Usage | None) -> int | None:
    """Bytes to show for a worker: those of its GPU, else of its host."""
    if usage is None:
        return None
    return usage.host if usage.device is None else usage.device.total


def stages(state: RunState, files: RunFiles) -> Markup | None:
    """One row per stage, those ahead included."""
    names = [*state.stages, *(name for name in state.ahead if name not in state.stages)]
    if not names:
        return None
    kinds = {"wall time": "n", "workers busy": "n", "memory of a worker": "n", "": "bar"}
    heads = [
        head(name, kinds.get(name, ""))
        for name in ("stage", "done", "", "wall time", "workers busy", "memory of a worker")
    ]
    rows = [_stage(name, state.stages.get(name, StageState()), files) for name in names]
    return section("Stages", tables.table(heads, rows, label="stages"))


def _stage(name: str, stage: StageState, files: RunFiles) -> list[Markup]:
    is_open = stage.state == "running"
    said, took = done_text(stage), duration(stage.seconds) if stage.state == "done" else DASH
    memory = stage.memory
    if stage.state == "ahead":
        said = "ahead"
    elif is_open and files.state != "running":
        said = f"not finished, {said}" if said else "not finished"
    elif is_open and stage.since is not None:
        took, memory = clock("since", stage.since - stage.seconds), files.status.get("memory")
    most = memory_of(usage_of(memory))
    return [
        row_head(name),
        cell(said, "word"),
        tables.bar(stage.share or 0.0),
        number(took),
        number(DASH if stage.busy is None else f"{stage.busy:.0%}"),
        number(DASH if most is None else size(most)),
    ]


def workers(state: RunState) -> Markup | None:
    """One row per worker, or per node if there are many: its process, and units of the stage."""
    if not (state.workers or state.nodes):
        return None
    groups: dict[tuple[str, int], dict[int, WorkerState]] = {}
    for (node, pid), each in state.workers.items():
        row = pid if len(state.workers) <= MOST_WORKERS else 0
        groups.setdefault((node, row), {})[pid] = each
    for node in state.nodes.keys() - {node for node, _ in groups}:
        groups[node, 0] = {}
    rows = [_worker(state, node, groups[node, row]) for node, row in sorted(groups)]
    stage = state.stages.get(state.stage)
    of = stage.units.of if stage and stage.units else "units"
    heads = [
        head("node"),
        head("process"),
        head("finishing"),
        head(f"{of} in {state.stage}" if state.stage else of, "n"),
        head("per minute", "n"),
        head(""),
    ]
    return section("Workers and nodes", tables.table(heads, rows, label="workers"))


def _worker(state: RunState, node: str, there: Mapping[int, WorkerState]) -> list[Markup]:
    """Row of a worker, or of the workers of a node, with their sums."""
    name, stage = state.stage, state.stages.get(state.stage)
    begun = stage.since if stage and stage.since is not None else 0.0
    rates = [each.rate(name, begun) for each in there.values()]
    rate = sum(filter(None, rates))
    done = sum(each.units.get(name, 0) for each in there.values())
    doing = ", ".join(each.doing for each in there.values() if each.doing)
    process = ", ".join(map(str, there)) if len(there) < 2 else f"{len(there)} workers"
    return [
        row_head(node, "word"),
        cell(process, "word"),
        cell(doing, "wide"),
        number(f"{done:,}"),
        number(f"{60 * rate:,.3g}" if rate else DASH),
        cell(state.nodes.get(node, "")),
    ]


def failures(state: RunState) -> Markup | None:
    if not state.failures:
        return None
    rows = []
    for each in state.failures[-MOST_ROWS:]:
        where = f"process {each.get('pid')} on {each.get('node')}"
        rows.append(
            [
                row_head(tables.breakable(str(each.get("unit")))),
                cell(str(each.get("cause")), "word"),
                cell(str(each.get("why")), "wide"),
                cell(where, "wide"),
                cell(str(each.get("decided")), "wide"),
                cell(str(each.get("record", "")), "id word"),
            ]
        )
    heads = map(head, ("unit", "cause", "message", "worker", "decision", "log"))
    more = len(state.failures) - len(rows)
    said = f"The last {len(rows)} of {len(state.failures):,}." if more else None
    return section(
        "Failures",
        element("p", said) if said else None,
        tables.table([*heads], rows, label="failures"),
    )


def runs(state: RunState) -> Markup | None:
    """Beginnings and ends of the runs, if there are several."""
    if len(state.runs) < 2:
        return None
    rows = []
    for n, each in enumerate(state.runs, 1):
        took = "" if each.ended is None else duration(max(each.ended - each.begun, 0.0))
        how = each.state + (f", exit code {each.exit_code}" if each.exit_code else "")
        rows.append(
            [
                row_head(str(n)),
                cell(clock("at", each.begun), "word"),
                number(took),
                cell(how, "word"),
                cell(each.stage),
                cell(each.error, "wide"),
            ]
        )
    heads = [
        head("run"),
        head("begun"),
        head("wall time", "n"),
        head("end"),
        head("stage"),
        head("message"),
    ]
    return section("Runs", tables.table(heads, rows[-MOST_ROWS:], label="runs"))
