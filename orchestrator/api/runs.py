"""Status, pages and removal of run directories."""

from collections.abc import Callable, Sequence
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
    evaluations beside the checkpoint (`OUT.evaluation`, or any run directory that names it). The
    page of a run of `evaluate` has its results.

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


def watch(
    run_dir: str | Path,
    *,
    port: int = 8270,
    host: str = "127.0.0.1",
    say: Callable[[str], None] = print,
) -> None:
    """Serve a live page of a run until a KeyboardInterrupt; writes no file.

    The page shows stages, blocks, workers, failures, throughput, memory and losses, and becomes the
    report when the run is done. The run need not have begun. A directory is read twice a second
    while a page is open, an object store every five seconds.

    Args:
        port: 0 means any free port.
        host: Address to listen at. Other ones than those of this machine alone let everyone who
            reaches the port read the names, messages and results of the run.
        say: Receives the address of the page, and a warning if `host` is open to others.

    Raises:
        InputError: The place is a file, or a directory with other content than a run.
        UsageError: The port is in use or is none, or the address is not one of this machine.
    """
    from orchestrator.errors import UsageError
    from orchestrator.pages.live import check_watchable, is_loopback, live_server, url_of
    from orchestrator.store.places import parse_place

    if not 0 <= port < 2**16:
        raise UsageError(f"port is {port}; it must be 0 (any) to 65535")
    place = parse_place(run_dir).absolute()
    check_watchable(place)
    with live_server(place, host, port) as server:
        if not is_loopback(host):
            say(
                f"warning: everyone who reaches {host} can read the names, messages and results "
                "of this run; without --host the page is for this machine alone"
            )
        say(f"live page of {run_dir}: {url_of(server)} (Ctrl-C ends)")
        server.serve_forever()


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
