"""A Ray on this machine for several jobs one after the other."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from orchestrator.runtime.ray.cluster import QUIET


@contextmanager
def local_ray() -> Iterator[None]:
    """All jobs within use it; two CPUs at least, if only in name.

    Ray runs its workers at a lower priority than other processes; here they get the same, or
    whatever else the machine does would slow down one side of a comparison more than the other.
    """
    cpus = max(2, os.cpu_count() or 1)
    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={**QUIET, "worker_niceness": 0},
    )
    try:
        yield
    finally:
        ray.shutdown()
