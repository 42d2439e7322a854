"""Recorder of a run for the tests of the time that is left.

    python tests/progress/record_runs.py NAME compress MODEL OUT --keep 0.8 --calibration FILE ...

writes `recorded/NAME.json`: per stage what `progress.eta.stage_left` was given, its forecast, and
the second in which the stage ended.
"""

import json
import sys
import time
from dataclasses import astuple
from pathlib import Path

from orchestrator.cli.main import main
from orchestrator.progress import eta
from orchestrator.runtime import progress
from orchestrator.runtime.monitor import StageMonitor

RECORDED = Path(__file__).parent / "recorded"
MOST = 30
"""Moments of a stage that are kept, evenly spaced."""
LEAST_SECONDS = 10.0
"""Shorter stages are left out."""


class Recorder:
    """Stages of a run with their moments, in seconds since the first call of each."""

    def __init__(self):
        self.stages, self._now = {}, ""

    def stage_left(self, moment, forecast, ratio=1.0):
        found = self.stages.setdefault(self._now, {"forecast": forecast, "moments": []})
        found["moments"].append((time.monotonic(), moment, ratio))
        return eta.stage_left(moment, forecast, ratio)

    def follow(self, stage, begins):
        if begins and stage != "verify":
            self._now = stage
        elif stage == self._now and stage in self.stages:
            self.stages[stage]["end"] = time.monotonic()

    def to_json(self):
        return [
            entry
            for stage, found in self.stages.items()
            if (entry := _entry(stage, found))["end"] > LEAST_SECONDS
        ]


def _entry(stage, found):
    moments, end = found["moments"], found["end"]
    begun = moments[0][0] - progress.SECONDS
    step = max(len(moments) // MOST, 1)
    return {
        "stage": stage,
        "end": round(end - begun, 2),
        "forecast": {kind: float(f"{each:.4g}") for kind, each in found["forecast"].items()},
        "moments": [
            {
                "at": round(at - begun, 2),
                "to_do": {k: _short(n) for k, n in moment.to_do.items()},
                "ended": {k: [_short(x) for x in astuple(m)] for k, m in moment.ended.items()},
                "running": [[r.kind, _short(r.units), round(r.seconds, 2)] for r in moment.running],
                "workers": moment.workers,
                "existed": round(moment.existed, 2),
                "ratio": float(f"{ratio:.4g}"),
            }
            for at, moment, ratio in moments[::step]
        ],
    }


def _short(number):
    """Four digits of a number."""
    return float(f"{number:.4g}")


def record(name, arguments):
    """Run a command and write what its estimates were made of."""
    recorder = Recorder()
    progress.stage_left = recorder.stage_left
    enter, leave = StageMonitor.__enter__, StageMonitor.__exit__

    def entered(self):
        recorder.follow(self.name, True)
        return enter(self)

    def left(self, *exc):
        recorder.follow(self.name, False)
        return leave(self, *exc)

    StageMonitor.__enter__, StageMonitor.__exit__ = entered, left
    code = main(arguments)
    RECORDED.mkdir(exist_ok=True)
    lines = ",\n".join(
        json.dumps({**stage, "moments": []})[:-2]
        + ",\n".join(["", *(" " + json.dumps(each) for each in stage["moments"])])[1:]
        + "\n]}"
        for stage in recorder.to_json()
    )
    (RECORDED / f"{name}.json").write_text(f"[\n{lines}\n]\n")
    return code


if __name__ == "__main__":
    sys.exit(record(sys.argv[1], sys.argv[2:]))
