"""The tests that are marked `gpu`."""

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.bench import Bench, Check, PartResult
from benchmarks.gpu.supervisor import ROOT

OPTIONS = ("-q", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", "--tb=short", "-rA")
# versions other than those of constraints.txt give other warnings
OPTIONS += ("-W", "default")
COUNT = re.compile(r"(\d+) (passed|failed|skipped|error)")


def measure(bench: Bench) -> PartResult:
    files = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if is_marked(path)]
    command = [sys.executable, "-m", "pytest", *OPTIONS, *sorted(files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1].strip("= ")
    counts = {kind: int(number) for number, kind in COUNT.findall(last)}
    wanted = "passed" if bench.is_cuda else "skipped"
    checks = (
        Check("pytest's exit status is 0", done.returncode == 0),
        Check(f"all are {wanted}, and some are", set(counts) == {wanted}),
    )
    figures = {"counts": counts, "status": done.returncode}
    if done.returncode:
        figures |= {"output": done.stdout[-20_000:], "errors": done.stderr[-2_000:]}
    return PartResult(last, figures, checks)


def is_marked(path: Path) -> bool:
    return "mark.gpu" in path.read_text(encoding="utf-8")
