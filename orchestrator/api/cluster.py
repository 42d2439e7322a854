"""Jobs on a Ray cluster."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path


def submit(
    program: Sequence[str],
    *,
    address: str | None = None,
    retries: int = 3,
    working_dir: str | Path = ".",
    exclude: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    wait: bool = True,
    show: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> int:
    """Run a command line as a Ray job, with retries; returns its exit code.

    A retry, under another submission id, resumes the run. It follows if the driver was killed, its
    node or the head was lost, or the run was stopped or lost its workers, but not if the program
    ended with 2, 3 or 4. SIGINT and SIGTERM stop the job.

    Args:
        program: Arguments of `orchestrator`: `["compress", "/shared/dense", ...]`.
        address: The dashboard, http://HEAD:8265; None means the one that Ray finds.
        retries: Attempts after the first, each after a pause of 5 to 60 s.
        working_dir: Directory that is uploaded with the job and in which its program starts.
        exclude: Files not to upload, in the syntax of `.gitignore`, besides `.venv`, `.work`,
            `.git` and those in its `.gitignore`.
        env: Environment variables of the job. Secrets (the token of the cluster, keys of stores and
            hubs) are refused, because the job displays its variables.
        wait: If False, the job is only submitted, and 0 is returned.
        show, say: Receive the log of the job in pieces, and lines about it; None means stdout.

    Raises:
        UsageError: An argument is wrong, or the address denies access or does not respond.
        StoppedError: A signal was received, or the head did not respond for ten minutes.
    """
    from orchestrator.errors import UsageError
    from orchestrator.runtime.ray import submit as jobs
    from orchestrator.runtime.ray.submit_policy import SECRET

    if retries < 0:
        raise UsageError(f"retries is {retries}; it must be 0 or above")
    if not Path(working_dir).is_dir():
        raise UsageError(f"working_dir: {working_dir} is not a directory")
    for name in env or {}:
        if name.startswith("RAY_AUTH_TOKEN"):
            raise UsageError(f"env: {name} would be displayed with the job; the cluster has it")
        if SECRET.search(name):
            raise UsageError(f"env: {name} would be displayed with the job; set it on the nodes")
    return jobs.submit(
        program,
        address=address,
        retries=retries,
        working_dir=str(working_dir),
        exclude=exclude,
        env=env or {},
        wait=wait,
        show=show or partial(print, end="", flush=True),
        say=say or print,
    )
