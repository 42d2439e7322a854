"""Execution: the fields of a recipe and of an evaluation about place and parallelism."""

from dataclasses import dataclass

from orchestrator.recipe.field import option
from orchestrator.recipe.values import parse_workers


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Place and parallelism of a run: they change its duration, never its result.

    Exceptions: `threads` determines the order of sums in a matrix product, so bytes are equal for
    equal threads; `allow_mixed` permits the bits of different environments in one result.
    """

    executor: str = option(
        "ray",
        "ray, or local: the same units in this process, without Ray",
        choices=("ray", "local"),
        schedule=True,
    )
    address: str | None = option(
        None,
        "Ray cluster to join: auto or an address (default: start a local Ray)",
        metavar="ADDRESS",
        schedule=True,
    )
    workers: int | str | None = option(
        None,
        "number of workers (default: one per GPU, or one per CPU without GPUs, and more when nodes "
        "join); 2..8 starts with 2 and requests up to 8 from an autoscaler, as many as the work "
        "can use",
        check=parse_workers,
        metavar="N",
        schedule=True,
    )
    threads: int | None = option(
        None,
        "threads per worker (default: 1, so that the bits do not depend on the size of a machine)",
        at_least=1,
        schedule=True,
        decides_bits=True,
    )
    shards: int | None = option(
        None,
        "number of contiguous shards of the model (default: at most two blocks each)",
        at_least=1,
        schedule=True,
    )
    run_dir: str | None = option(
        None,
        "run directory, from which the run is resumed (default: OUT.run; of an evaluation, "
        "MODEL.evaluation)",
        metavar="DIR",
        schedule=True,
    )
    allow_mixed: bool = option(
        False,
        "continue unfinished stages from another kind of device, other threads or versions; "
        "otherwise these are computed again from their start",
        schedule=True,
    )

    @property
    def threads_per_worker(self) -> int:
        """The requested number of threads, or one: on CPUs the highest throughput."""
        return self.threads or 1
