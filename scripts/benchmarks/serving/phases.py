"""Phases that are measured, in turns; without torch, for the environments of both engines."""

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from benchmarks.common.figures import in_turns

PROMPT = 512
"""Tokens of a prefill."""
BATCHES = (1, 8)
CONTEXT = 32
"""Tokens of each sequence before those that are decoded."""
STEPS = 2
"""Tokens of each sequence that are decoded in a turn."""
MORE = 3
"""Turns of decoding for one of prefill, which takes longer."""
PHASES = (f"prefill {PROMPT}", *(f"decode {batch}" for batch in BATCHES))


class Runner(Protocol):
    """A model in an engine."""

    def prefill(self) -> Callable[[], object]:
        """Return a computation: the next token after `PROMPT` others."""
        ...

    def decode(self, batch: int) -> Callable[[], object]:
        """Return a computation: `STEPS` tokens of each sequence, continued at every call."""
        ...


def decoded(turns: int) -> int:
    """Return the tokens that are decoded of a sequence in all turns and the warm-up."""
    return (MORE * turns + 1) * STEPS


def seconds(runners: Mapping[str, Runner], turns: int) -> dict[str, dict[str, list[float]]]:
    """Measure models in turns; returns CPU seconds of each turn by phase and model."""
    found = {}
    for phase in PHASES:
        kind, _, size = phase.partition(" ")
        is_prefill = kind == "prefill"
        works = {
            name: runner.prefill() if is_prefill else runner.decode(int(size))
            for name, runner in runners.items()
        }
        ways = {name: lambda work=work: cpu_seconds(work) for name, work in works.items()}
        found[phase] = in_turns(ways, turns if is_prefill else MORE * turns, warm_up=1)
    return found


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds that this process takes for a call."""
    start = time.process_time()
    work()
    return time.process_time() - start
