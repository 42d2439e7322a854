"""Status, pages and removal of run directories."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.store.places import Place

if TYPE_CHECKING:
    from orchestrator.store.cleaning import Cleaning


def status(run_dir: str | Path) -> dict[str, Any]:
    """Return the status of a run, and its finished `outputs`, from its directory alone.

    Raises:
        InputError: The directory has no run.
    """
    from orchestrator.store.places import parse_place
    from orchestrator.store.run import RunDirectory

    run = RunDirectory(parse_place(run_dir))
    return {**run.status(), "outputs": run.outputs()}


def report(run_dir: str | Path, output: str | Path | None = None) -> Place:
    """Write one HTML page about a run: recipe, result and losses.

    The page is self-contained. Of an unfinished run it shows the results so far. It includes
    evaluations beside the checkpoint (`OUT.evaluation`, or any run directory that names it).

    Args:
        run_dir: A run directory, or a compressed checkpoint; for a run directory with several
            results, the page is about the last one.
        output: The file; None means `report.html` in the run directory, or `OUT.report.html` beside
            a checkpoint.

    Raises:
        InputError: The place is neither a run nor a checkpoint, or one of its files is damaged.
    """
    from orchestrator.pages import write_report
    from orchestrator.store.places import parse_place

    return write_report(parse_place(run_dir), None if output is None else parse_place(output))


def compare(run_dirs: Sequence[str | Path], output: str | Path | None = None) -> Place:
    """Write one HTML page that compares runs.

    Args:
        run_dirs: Two or more, as for `report`.
        output: The file; None means `comparison.html` in the working directory.

    Raises:
        InputError: A place is neither a run nor a checkpoint, or one of its files is damaged.
        UsageError: Fewer than two runs are given.
    """
    from orchestrator.pages import write_comparison
    from orchestrator.store.places import parse_place

    runs = [parse_place(run_dir) for run_dir in run_dirs]
    return write_comparison(runs, None if output is None else parse_place(output))


def clean(run_dir: str | Path, *, dry_run: bool = False) -> "Cleaning":
    """Remove the files of a run from its directory, and the directory once it is empty.

    Args:
        dry_run: Only list; no file is removed.

    Returns:
        The removed files and directories, and those that are left because others wrote them.

    Raises:
        InputError: The directory has no run.
        UsageError: A driver is using it.
    """
    from orchestrator.store.places import parse_place
    from orchestrator.store.run import RunDirectory

    return RunDirectory(parse_place(run_dir)).remove(dry_run=dry_run)
