"""Hostile input derived from valid input: JSON with some wrong values, files with some wrong
bytes."""

import copy
import json
from functools import partial
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from orchestrator.errors import OrchestratorError

SOME = settings(derandomize=True, deadline=None, database=None)
"""The same inputs every time, however slow the machine."""
many = partial(settings, SOME)


def nested(depth: int) -> Any:
    value: Any = 0
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


WRONG = st.sampled_from(
    [
        *(None, True, False, [], {}, [[]], [0], {"a": 1}, "", " ", "x", "5"),
        *(-1, 0, 1, 2, 3, 255, 2**16, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**15, 10**400),
        *(-(2**31), -(2**63), -(2**64), 0.5, -0.0, 1e300, 1e-320),
        *(float("nan"), float("inf"), float("-inf")),
        *("../x", "../../../../etc/passwd", "/etc/passwd", "~nobody-at-all/x", "a/b", "..", "."),
        *("C:\\x", "a\0b", "a\nb", "\x1b[2J", "²", "𝒳", "é", "\ud800", "x" * 300, "x" * 5000),
        *("s3://", "file:///etc", "__class__", "os.system", "%s{0}", "re:(", "*", "auto", "nan"),
        *(nested(50), nested(400), list(range(100)), ["model.norm.weight"], [2**62, 2**62]),
    ]
)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """Remove, replace, duplicate or move one to three parts of a JSON value."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(draw(WRONG))
        parent, key = draw(st.sampled_from(places))
        match draw(st.integers(0, 9)):
            case 0 | 1:
                del parent[key]
            case 2:
                other, there = draw(st.sampled_from(places))
                if (isinstance(there, int) and isinstance(other, list) and there >= len(other)) or (
                    isinstance(other, dict) and there not in other
                ):
                    continue
                parent[key] = copy.deepcopy(other[there])
            case 3:
                parent[key] = [parent[key]]
            case 4 if isinstance(parent, dict):
                parent[str(draw(WRONG))[:400]] = parent.pop(key)
            case 5 if type(parent[key]) is int:
                parent[key] += draw(st.sampled_from([-1, 1, 2**31, 2**63, -(2**40)]))
            case _:
                parent[key] = copy.deepcopy(draw(WRONG))
    return value


def _places(value: Any) -> Any:
    """Return every part of a JSON value, as container and key."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list):
            for key in list(each) if isinstance(each, dict) else range(len(each)):
                yield each, key
                waiting.append(each[key])


@st.composite
def garbled(draw: st.DrawFn, content: bytes) -> bytes:
    """Flip, remove, insert or truncate some bytes, mostly near the start."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        near = min(len(data), draw(st.sampled_from([8, 64, 512, 2**20])))
        at = draw(st.integers(0, near))
        match draw(st.integers(0, 5)):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + draw(st.integers(1, 9))]
            case 2:
                data[at:at] = draw(st.binary(min_size=1, max_size=9))
            case 3 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case _ if at < len(data):
                data[at] = draw(st.sampled_from(b'\x00\xff"[]{},:09.-e\\ \n'))
            case _:
                pass
    return bytes(data)


def to_bytes(value: Any) -> bytes:
    """Write drawn values as JSON, lone surrogates and NaN included."""
    return json.dumps(value).encode()


def documented(action: Any, *arguments: Any, **named: Any) -> Any:
    """Return the result of the action, or its one-line error of our classes; other errors
    propagate."""
    try:
        return action(*arguments, **named)
    except OrchestratorError as error:
        said = str(error)
        assert said
        assert len(said) < 3000, said
        assert len(said.splitlines()) == 1, said
        return error
