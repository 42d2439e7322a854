"""Errors of Ray in one line: pure functions of their texts, so that they are tested without Ray.

Ray explains the loss of an actor in paragraphs of advice that is the same for every loss; the whole
text goes to the failure record.
"""

import re
from textwrap import shorten

LONGEST = 300
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_MEMORY = re.compile(r"Memory on the node .*? was ([\d.]+ ?GB).*?/ ([\d.]+ ?GB)")
_EXIT = re.compile(r"Worker exit detail: (.+?)(?= Some common causes| There are some|$)", re.M)
_UNEXPLAINED = "Worker unexpectedly exits with a connection error"
"""Begin of the detail for a process that ended without a word: a signal, a crash or `_exit`."""


def reason(error: BaseException) -> str:
    """Reason of a loss, or the last line, after a traceback or actor details: usually the reason.

    Memory is named if Ray has killed the process for it.
    """
    lines = _lines(error)
    text = "\n".join(lines)
    if memory := _MEMORY.search(text):
        used, limit = (each.replace(" ", "").replace("GB", " GB") for each in memory.groups())
        return f"Ray killed its process, because {used} of {limit} of the node's memory were in use"
    if exits := _EXIT.search(text):
        said = exits[1].strip()
        if said.startswith(_UNEXPLAINED):
            return "its process was killed (by the kernel, if memory ran out) or has crashed"
        return shorten(said, LONGEST, placeholder=" ...")
    return shorten(lines[-1], LONGEST, placeholder=" ...")


def first_line(error: BaseException) -> str:
    """First line of an error of Ray: usually the fault."""
    return _lines(error)[0]


def _lines(error: BaseException) -> list[str]:
    return _COLOURS.sub("", str(error)).strip().splitlines() or [type(error).__name__]
