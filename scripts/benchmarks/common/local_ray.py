"""Ray on this machine for several jobs in sequence."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from orchestrator.runtime.ray.cluster import QUIET


@contextmanager
def local_ray() -> Iterator[None]:
    """Start a Ray that all jobs inside use, with at least two nominal CPUs.

    Ray's workers by default have a lower priority than other processes; here they have the same,
    since otherwise load on the machine would slow down one side of a comparison more.
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
