"""Live page of a run: sections of HTML, a function of the run's state and of its small files."""

from collections.abc import Mapping

from orchestrator.pages.happened import happened
from orchestrator.pages.live.drawings import block_map
from orchestrator.pages.live.files import RunFiles
from orchestrator.pages.live.loss_section import losses
from orchestrator.pages.live.rows import (
    clock,
    done_text,
    failures,
    runs,
    stages,
    usage_of,
    workers,
)
from orchestrator.pages.live.state import CALIBRATED, RunState, StageState
from orchestrator.pages.live.style import LIVE_SCRIPT, LIVE_STYLE
from orchestrator.pages.markup import Markup, element, joined, page, scrolling, section
from orchestrator.pages.style import STYLE
from orchestrator.pages.tables import DASH
from orchestrator.readable import duration, size
from orchestrator.recipe.recipe import SIZE_FIELDS
from orchestrator.version import __version__

RESUMES = "The same command resumes it; what is committed stays."
ENDS = {
    "done": "Done",
    "failed": "Failed",
    "stopped": "Stopped",
    "lost": "The driver has ended without a word: it was killed, or its machine is gone",
}
"""Sentences about a run that has ended, by the state in its status."""
ROWS = {
    "calibrate": "decomposed",
    "refit": "refitted",
    "pivot": "pivoted",
    "walk": "walked",
    "refine": "refined",
    "sweep": "swept",
    "train": "trained",
}
"""Names of the rows of blocks, by stage; stages of other packages have their own name."""
LEGEND = {
    "done": "committed",
    "earlier": "by an earlier run",
    "busy": "in its last call",
    "lost": "failed",
    "empty": "not reached",
}
"""Levels of a block, as explained below the map."""


def live_page(sections: Mapping[str, Markup], *, title: str, mark: str) -> Markup:
    """Make the document.

    Args:
        sections: Result of `live_sections`.
        mark: Position from which the stream of changes continues.
    """
    places = (element("div", each, id=f"live-{name}") for name, each in sections.items())
    return page(
        title,
        element("p", "The connection is lost; trying again.", class_="said cut", hidden=""),
        element("div", *places, id="live", data_mark=mark),
        style=STYLE + LIVE_STYLE,
        script=LIVE_SCRIPT,
        policy=None,
    )


def live_sections(state: RunState, files: RunFiles) -> dict[str, Markup]:
    """Compose the sections by name, in the order of the page; empty ones too."""
    found = {
        "head": _head(state, files),
        "key": _key_figures(state, files),
        "blocks": _blocks(state, files),
        "stages": stages(state, files),
        "losses": losses(state.losses),
        "workers": workers(state),
        "failures": failures(state),
        "runs": runs(state),
        "happened": happened(state.told),
        "foot": _foot(files),
    }
    return {name: joined([each]) for name, each in found.items()}


def page_title(state: RunState, files: RunFiles) -> str:
    """Title of the window: what a tab has room for."""
    stage = state.stages.get(state.stage)
    share = f" {stage.share:.0%}" if stage and stage.share is not None else ""
    at = f"{state.stage}{share}" if files.state == "running" else files.state
    return f"{at} – {files.name}"


def _head(state: RunState, files: RunFiles) -> Markup:
    recipe = files.recipe
    model = str(files.description.get("model") or recipe.get("model", "")).rstrip("/")
    about = [model.rpartition("/")[2]] if model else []
    if "method" in recipe:
        sizes = [
            f", {name.replace('_', ' ')} {recipe[name]}" for name in SIZE_FIELDS if recipe.get(name)
        ]
        about.append(f"compressed with {recipe['method']}" + "".join(sizes))
    badge = element("span", files.state, class_=f"badge {files.state}")
    said = [files.problem, str(files.status.get("error", ""))]
    return joined(
        [
            element("h1", files.name, data_title=page_title(state, files)),
            element("p", ", ".join(about), class_="soft") if about else None,
            element("p", badge, " ", _sentence(state, files), class_="state", aria_live="polite"),
            *(element("p", each, class_="said error") for each in said if each),
            _further(files),
        ]
    )


def _sentence(state: RunState, files: RunFiles) -> str:
    """Describe what the run does, or how it has ended."""
    status = files.status
    if files.state == "new":
        return f"Nothing has happened in {files.place} yet; the page begins with the run."
    if files.state == "running":
        waits = f"Waiting for {state.waiting}." if state.waiting else ""
        return waits or f"In stage {state.stage or 'survey'}."
    said = ENDS.get(files.state, files.state)
    if files.state == "done" and files.is_candidate:
        return "A combination of a search is done; it is evaluated, and the next one follows."
    if files.state == "done":
        out = files.description.get("out")
        return f"{said}. The result is in {out}." if out else f"{said}."
    if files.state == "failed":
        said += f" with exit code {status.get('exit_code')}"
    return f"{said}, in stage {status['stage']}." if status.get("stage") else f"{said}."


def _further(files: RunFiles) -> Markup | None:
    """Remark about the resumption of a run that is not finished, and its report."""
    if files.state not in ("failed", "stopped", "lost"):
        return None
    # an evaluation has no results before its end
    link = element("a", "Report of its results so far", href="/report") if files.recipe else None
    return element("p", RESUMES, " ", link)


def _key_figures(state: RunState, files: RunFiles) -> Markup | None:
    if files.state == "new":
        return None
    status, stage = files.status, state.stages.get(state.stage)
    is_running = files.state == "running"
    shown: list[tuple[str, str | Markup, str]] = []
    if stage is not None and stage.share is not None:
        shown.append((f"{state.stage}", f"{stage.share:.0%}", done_text(stage)))
    elif state.stage:
        shown.append(("stage", state.stage, ""))
    if is_running:
        run_left = state.run_left
        of_run = f"{duration(run_left)} of the run" if run_left is not None else ""
        left = stage.left if stage and stage.left is not None else _number(status, "left")
        shown.append(("left of the stage", f"about {duration(left)}" if left else DASH, of_run))
    begun = state.runs[-1].begun if state.runs else _number(status, "started")
    if begun is not None:
        ended = _number(status, "updated")
        took = clock("since", begun) if is_running else duration(max((ended or begun) - begun, 0))
        shown.append(("time of this run", took, _number_of_runs(state)))
    if is_running:
        nodes = len({node for node, _ in state.workers})
        on = f"on {nodes} {'node' if nodes == 1 else 'nodes'}" if nodes else "none has started"
        shown.append(("workers", str(len(state.workers)), on))
        shown.append(("throughput", *_throughput(stage)))
    if (used := usage_of(status.get("memory"))) is not None:
        is_device = used.device is not None
        name = "memory of a worker, on its GPU" if is_device else "memory of a worker"
        most = used.device.total if used.device else used.host
        shown.append((name, size(most), f"host {size(used.host)}" if is_device else "peak"))
    items = (
        element("div", element("dt", name), element("dd", value, element("small", said)))
        for name, value, said in shown
    )
    return element("dl", *items, class_="key")


def _number_of_runs(state: RunState) -> str:
    earlier = len(state.runs) - 1
    return f"after {earlier:,} earlier" if earlier > 0 else ""


def _throughput(stage: StageState | None) -> tuple[str, str]:
    """Describe the speed of a stage: number and unit."""
    if stage is None or stage.state != "running":
        return DASH, ""
    if stage.tokens_per_second:
        return f"{stage.tokens_per_second:,.0f}", "tokens per second"
    rate, parts = stage.rate, stage.parts
    if rate is None or parts is None:
        return DASH, ""
    if rate < 1:
        return f"{60 * rate:,.3g}", f"{parts.of} per minute"
    return f"{rate:,.3g}", f"{parts.of} per second"


def _blocks(state: RunState, files: RunFiles) -> Markup | None:
    """Map of all blocks by the stages that commit them one by one."""
    is_running = files.state == "running"
    reached = [block for cells in state.cells.values() for block in cells]
    blocks = state.blocks or max(reached, default=-1) + 1
    others = [name for name, cells in state.cells.items() if cells and name not in ROWS]
    names = [name for name in (*ROWS, *others) if name in (state.ahead or state.cells)]
    if not (blocks and names):
        return None
    rows: dict[str, Mapping[int, str]] = {}
    shares: dict[str, float] = {}
    for name in names:
        if name == "calibrate":
            rows[CALIBRATED] = state.cells.get(CALIBRATED, {})
        row = ROWS.get(name, name)
        levels = state.cells.get(name, {})
        # a call ends with its run
        rows[row] = {b: level for b, level in levels.items() if level != "busy" or is_running}
        stage = state.stages.get(name)
        if name == "train" and stage is not None:
            # all blocks at once
            shares[row] = stage.share or 0.0
    drawn = block_map(rows, blocks, shares, label="blocks by stage")
    keys = [
        joined([element("span", element("i", class_=f"sample {level}"), f" {says}"), " "])
        for level, says in LEGEND.items()
    ]
    legend = element("p", *keys, class_="legend soft")
    return section("Blocks", scrolling(drawn, "blocks by stage"), legend)


def _foot(files: RunFiles) -> Markup:
    return element("footer", f"orchestrator {__version__}; run directory {files.place}.")


def _number(values: Mapping[str, object], name: str) -> float | None:
    value = values.get(name)
    return value if isinstance(value, int | float) else None
