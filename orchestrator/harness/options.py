"""Request of an evaluation on tasks."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """Tasks to evaluate, and the part of them."""

    names: tuple[str, ...]
    directory: str | None
    """Directory with task files of the user; the tasks of the harness are known too."""
    limit: int | None
    """Number of documents of each task; None means all."""
    shots: int | None
    """Examples in front of each document; None means the number that the task states."""
