"""The results file of a check, written again, atomically, whenever a part begins or ends."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.store.files import write_json

FORMAT_VERSION = 1


class Results:
    """The results so far; the file always holds all of them.

    `content["parts"]` has `seconds`, `line`, `figures` and `checks` of each finished part, or
    `error` (a traceback, or the end of its process), or `left_out`. `content["running"]` has the
    name and start of the running part, on the system's monotonic clock; otherwise it is None.
    """

    def __init__(self, path: Path, environment: Mapping[str, Any], *, is_small: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "environment": dict(environment),
            "small": is_small,
            "running": None,
            "parts": {},
        }
        self.write()

    @classmethod
    def read(cls, path: Path) -> "Results":
        found = cls.__new__(cls)
        found.path, found.content = path, json.loads(path.read_text(encoding="utf-8"))
        return found

    @property
    def parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = self.content["parts"]
        return parts

    @property
    def is_small(self) -> bool:
        return bool(self.content["small"])

    @property
    def running(self) -> tuple[str, float] | None:
        """The running part, and the seconds since it began."""
        found = self.content["running"]
        return found and (found["part"], time.monotonic() - found["began"])

    def begin(self, part: str) -> None:
        self.content["running"] = {"part": part, "began": time.monotonic()}
        self.write()

    def end(self, part: str, entry: Mapping[str, Any]) -> None:
        """Add the results of a part, or the reason why there are none."""
        if self.running is not None:
            entry = {"seconds": self.running[1], **entry}
        self.content["running"] = None
        self.parts[part] = entry
        self.write()

    def write(self) -> None:
        write_json(self.path, self.content)


def summary(results: Results) -> str:
    """Summarise the numbers of finished parts and passed checks, with a line for each other
    part."""
    parts = results.parts
    over = [name for name, entry in parts.items() if "checks" in entry]
    checks = [(name, check) for name in over for check in parts[name]["checks"]]
    broken = [(name, check) for name, check in checks if not check["holds"]]
    lines = [
        f"{len(over)} of {len(parts)} parts ended, "
        f"{len(checks) - len(broken)} of {len(checks)} checks hold"
    ]
    for name, entry in parts.items():
        if "error" in entry:
            lines.append(f"  {name} failed: {entry['error'].strip().splitlines()[-1]}")
        elif "left_out" in entry:
            lines.append(f"  {name} left out: {entry['left_out']}")
    for name, check in broken:
        bound = "" if check["bound"] is None else f", not below {check['bound']:g}"
        lines.append(f"  {name}: {check['name']} is {check['found']}{bound}")
    return "\n".join(lines)
