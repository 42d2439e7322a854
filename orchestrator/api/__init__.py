"""Python API: the commands of the command line as blocking functions with an event callback.

    from orchestrator import Recipe, compress, load

    result = compress(Recipe(model="dense/", out="small/", keep=0.8, calibration="text.txt"))
    model = load(result.out)

Heavy packages are imported when a function is called.
"""

from orchestrator.api.checkpoints import evaluate, export, lm_eval, load, push, verify
from orchestrator.api.cluster import submit
from orchestrator.api.compression import (
    compress,
    compress_sizes,
    measure,
    plan,
    retarget,
    retarget_sizes,
    search,
)
from orchestrator.api.machine import bench, doctor, measure_latency
from orchestrator.api.runs import clean, compare, report, status, watch

__all__ = [
    "bench",
    "clean",
    "compare",
    "compress",
    "compress_sizes",
    "doctor",
    "evaluate",
    "export",
    "lm_eval",
    "load",
    "measure",
    "measure_latency",
    "plan",
    "push",
    "report",
    "retarget",
    "retarget_sizes",
    "search",
    "status",
    "submit",
    "verify",
    "watch",
]
