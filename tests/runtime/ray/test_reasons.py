"""Reasons of losses in one line; texts are those of Ray 2.60."""

import pytest

from orchestrator.runtime.ray.reasons import first_line, reason

ACTOR = """The actor died unexpectedly before finishing this task.
\tclass_name: WorkerActor
\tactor_id: 4141b50037317d868c7cae7301000000
\tpid: 1201
\tip: 192.0.2.2
The actor is dead because """
ADVICE = (
    " Some common causes include: (1) the process was killed by the OOM killer due to high memory "
    "usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV "
    "or another unexpected error. If the process was killed by the kernel OOM killer (verifiable "
    "by checking for OOM in dmesg of the OOMing node), consider enabling resource isolation."
)
DETAIL = "its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
MEMORY = """1 worker(s) were killed due to the node running low on memory. 
Memory on the node (IP: 192.0.2.2, ID: 811d) was 14.90GB used / 15.20GB limit (0.980000)
Object store memory usage: [1.2GB]
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
Refer to the documentation on how to address the out of memory issue"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            f"{ACTOR}{DETAIL}Worker unexpectedly exits with a connection error code 2. End of file."
            + ADVICE,
            "its process was killed (by the kernel, if memory ran out) or has crashed",
        ),
        (
            f"{ACTOR}{DETAIL}Worker exits because its node was drained.{ADVICE}",
            "Worker exits because its node was drained.",
        ),
        (
            f"{ACTOR}it was killed by `ray.kill`.",
            "The actor is dead because it was killed by `ray.kill`.",
        ),
        (
            MEMORY,
            "Ray killed its process, because 14.90 GB of 15.20 GB of the node's memory were in use",
        ),
        (
            "\x1b[36mray::f()\x1b[0m\n  File ...\nValueError: no such thing",
            "ValueError: no such thing",
        ),
        ("", "ValueError"),
    ],
)
def test_a_reason_is_one_short_line(text, line):
    """The cause is kept; ids, advice and colours are left out."""
    assert reason(ValueError(text)) == line


def test_a_long_reason_is_shortened():
    """Other texts are cut; the first line of an error of Ray is the fault."""
    assert len(reason(ValueError("word " * 200))) <= 300
    assert first_line(ValueError("\x1b[36mone\x1b[0m\ntwo")) == "one"
