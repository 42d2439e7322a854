"""Golden record of the results of the code, and the command that compares or rewrites it.

    python tests/golden/golden_record.py            compare; prints the differences, one per line
    python tests/golden/golden_record.py --write    rewrite `record.json` and `forecasts.json`
    python tests/golden/golden_record.py --write --interrupt    also the unfinished runs

A commit that must change a key or a byte rewrites the record and explains why; the diff of the JSON
shows what changed. The unfinished runs were made by an earlier release and must be resumed by this
one: rewrite them only if a raised version invalidates their units.

Every case runs in one process with one thread. `PINNED` is set before torch is loaded, so that the
libraries use kernels that every x86-64 processor with AVX2 has. `golden_environment.probe` measures
if a machine computes the same bits; entries that depend on bits are compared only if it does.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from golden_differences import differences
from golden_environment import HEX, environment, pin_version

HERE = Path(__file__).parent
RECORD, FORECASTS = HERE / "record.json", HERE / "forecasts.json"
ARCHIVE = HERE / "interrupted.tar.xz"
PINNED = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}
MEASURED = {
    "timings",
    "seconds",
    "memory",
    "environment",
    "nodes",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "path",
}
"""Fields of facts and reports that may differ between two equal runs."""
BOOTSTRAP, SOURCE = "modeling_orchestrator.py", "source"
DIGITS = 12
"""Significant digits of a forecast's figures, so that they do not depend on the C library."""


def make(directory: Path) -> dict[str, Any]:
    """Perform every case below an empty directory; returns the record without forecasts."""
    import golden_cases as cases
    import torch
    from golden_models import write_models

    torch.set_num_threads(1)
    before = Path.cwd()
    os.chdir(directory)  # paths in keys are those of the recipe
    try:
        write_models(directory)
        # stages collect garbage; what torch and transformers have imported is none
        gc.freeze()
        return {
            "environment": environment(),
            "cases": {name: _case(name, fields) for name, fields in cases.CASES.items()},
            "retargeted": {n: _retargeted(n, f) for n, f in cases.RETARGETED.items()},
            "evaluated": {n: _evaluated(n, f) for n, f in cases.EVALUATED.items()},
            "verified": {n: _verified(n, cases.CASES[n]["model"]) for n in cases.VERIFIED},
            "resumed": {name: _resumed(name) for name in cases.INTERRUPTED},
        }
    finally:
        os.chdir(before)


class _Journal:
    """Journal of a run from its events and directory: stages, their units, and the units'
    content."""

    def __init__(self, run_dir: Path, stop: tuple[str, int] | None = None) -> None:
        self._units, self._stop = run_dir / "units", stop
        self._stage, self._known = "", self._there()
        self.made: dict[str, list[str]] = {}
        self.told: dict[str, int] = {}

    def _there(self) -> set[Path]:
        return {path.parent for path in self._units.glob("*/*/manifest.json")}

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "stage" and event["state"] == "end":
            keys = sorted(path.name for path in self._there() - self._known)
            self._known |= self._there()
            if keys:
                self.made[event["stage"]] = keys
        if event["event"] == "unit":
            self.told[event["stage"]] = self.told.get(event["stage"], 0) + 1
        if self._stop is not None:
            stage, units = self._stop
            is_there = event.get("stage") == stage and self.told.get(stage, 0) == units
            if is_there and event["event"] in ("stage", "unit"):
                from orchestrator.errors import StoppedError

                raise StoppedError("left unfinished")

    def contents(self) -> dict[str, dict[str, str]]:
        """Digests of a unit's facts and files as left by the run, by stage and key."""
        return {
            stage: {key[:HEX]: self._content(key) for key in keys}
            for stage, keys in self.made.items()
        }

    def _content(self, key: str) -> str:
        manifest = json.loads((self._units / key[:2] / key / "manifest.json").read_text())
        facts, files = digest(unmeasured(manifest["facts"])), digest(manifest["files"])
        return f"{facts} {files if manifest['files'] else 'no files'}"


def _recipe(name: str, **fields: Any) -> Any:
    from orchestrator import Recipe

    preset = fields.pop("preset", None)
    fields["out"] = name
    return Recipe(**fields) if preset is None else Recipe.preset(preset, **fields)


def _case(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    from orchestrator import compress

    journal = _Journal(Path(f"{name}.run"))
    return _outcome(compress(_recipe(name, **fields), journal), journal)


def _retargeted(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    from orchestrator import retarget

    journal = _Journal(Path(f"{name}.run"))
    given = {"executor": "local", **fields}
    return _outcome(retarget(f"{name}.run", f"{name}-cut", on_event=journal, **given), journal)


def _outcome(result: Any, journal: _Journal) -> dict[str, Any]:
    """Record of a compression."""
    out, plan = Path(result.out), result.plan.to_json()
    assignments = {name: _words(each) for name, each in plan.pop("assignments").items()}
    report = json.loads((out / "orchestrator_report.json").read_text())
    del report["files"][BOOTSTRAP]
    return {
        "key": report["key"],
        "plan": {**plan, "assignments": assignments},
        "told": journal.told,
        "units": journal.contents(),
        "report": {name: digest(value) for name, value in unmeasured(report).items()},
        "tensors": _tensors(out),
        "files": _files(out),
    }


def _words(assignment: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in assignment.items() if value)


def _tensors(out: Path) -> dict[str, str]:
    """Dtype and shape of every tensor, from the headers."""
    found = {}
    for path in sorted(out.glob("*.safetensors")):
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        header.pop("__metadata__", None)
        found |= {name: f"{each['dtype']} {each['shape']}" for name, each in header.items()}
    return dict(sorted(found.items()))


def _files(out: Path) -> dict[str, str]:
    """SHA-256 of every file except the report, which is recorded separately because it has times.

    The file for loading without this package consists of its sources, comments included: only its
    existence is recorded. The digest of the report, which has that of this file, is taken out of
    the config.
    """
    return {
        str(path.relative_to(out)): SOURCE if path.name == BOOTSTRAP else _digest(path)
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "orchestrator_report.json"
    }


def _digest(path: Path) -> str:
    content = path.read_bytes()
    if path.name == "config.json":
        config = json.loads(content)
        if config.get("quantization_config", {}).pop("report_blake2b", None):
            content = f"{json.dumps(config, indent=2, ensure_ascii=False)}\n".encode()
    return hashlib.sha256(content).hexdigest()[:HEX]


def _evaluated(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    from orchestrator import evaluate

    small = {"text": "held_out.txt", "samples": 4, "sequence_length": 32, "executor": "local"}
    figures = evaluate(name, **{**small, **fields})
    return dict(unmeasured(figures))


def _verified(name: str, model: str) -> dict[str, Any]:
    from orchestrator import export, verify

    found = dict(unmeasured(verify(name, against=model)))
    dense = Path(export(name, f"{name}-dense"))
    return {"found": found, "exported": _files(dense)}


def _resumed(name: str) -> dict[str, Any]:
    """Outcome of resuming the archive's unfinished run: units made and rewritten by stage, the
    result."""
    from golden_cases import CASES

    from orchestrator import compress

    os.makedirs("resumed")
    os.chdir("resumed")
    try:
        for path in Path("..").iterdir():
            if (path / "config.json").exists() and not (path / "orchestrator_report.json").exists():
                Path(path.name).symlink_to(path)
        Path("text.txt").symlink_to("../text.txt")
        with tarfile.open(ARCHIVE) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(".")
        manifests = sorted(Path(f"{name}.run").glob("units/*/*/manifest.json"))
        journal = _Journal(Path(f"{name}.run"))
        result = compress(_recipe(name, **CASES[name]), journal)
        # the archive's files are of the year 1970
        there = [path for path in manifests if path.exists()]
        rewritten = [path.parent.name[:HEX] for path in there if path.stat().st_mtime > 0]
        made = {stage: count for stage, count in journal.told.items() if stage != "verify"}
        return {"made": made, "rewritten": rewritten, "files": _files(Path(result.out))}
    finally:
        os.chdir("..")
        shutil.rmtree("resumed")


def make_interrupted(directory: Path, archive: Path) -> None:
    """Run the cases of `INTERRUPTED` up to their stops, and pack their run directories.

    Names of this machine and its directories are taken out of the three files that hold them.
    """
    import socket

    import golden_cases as cases
    import torch
    from golden_models import write_models

    from orchestrator import compress
    from orchestrator.errors import StoppedError

    torch.set_num_threads(1)
    os.chdir(directory)
    write_models(directory)
    for name, stop in cases.INTERRUPTED.items():
        run_dir = Path(f"{name}.run")
        try:
            compress(_recipe(name, **cases.CASES[name]), _Journal(run_dir, stop))
        except StoppedError:
            pass
        else:
            raise RuntimeError(f"{name}: was not interrupted")
        for told in ("run.json", "status.json", "events.jsonl"):
            text = (run_dir / told).read_text().replace(f"{directory}/", "")
            (run_dir / told).write_text(text.replace(socket.gethostname(), "node"))
    with tarfile.open(archive, "w:xz", preset=9) as packed:
        for name in cases.INTERRUPTED:
            packed.add(f"{name}.run", filter=_anonymous)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def forecasts(directory: Path) -> dict[str, Any]:
    """The forecast of every case; of a Llama with the shapes of 8B where the case names no other.

    No torch: figures depend on neither bits nor processor.
    """
    from golden_cases import CASES
    from golden_models import LARGE

    from orchestrator import api

    large = directory / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(LARGE))
    found = {}
    for name, fields in CASES.items():
        if fields["model"].startswith("llama"):
            big = {"model": str(large / "config.json"), "samples": 64, "sequence_length": 2048}
            recipe = _recipe(name, **{**fields, **big})
            found[name] = _rounded(api.plan(recipe, gpus=4, price=2.5).to_json())
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    return value


def unmeasured(value: Any) -> Any:
    """Copy without the fields of `MEASURED`, at any depth."""
    if isinstance(value, Mapping):
        return {name: unmeasured(each) for name, each in value.items() if name not in MEASURED}
    if isinstance(value, list | tuple):
        return [unmeasured(each) for each in value]
    return value


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:HEX]


def run_pinned(*arguments: str) -> None:
    """Run this file in a separate process with `PINNED` in its environment."""
    paths = [str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    own = {**os.environ, **PINNED, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(Path(__file__).absolute()), *arguments]
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-4000:]}")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=0) + "\n")


def found_here(directory: Path) -> dict[str, Any]:
    """Record of the current code, made in a separate process."""
    run_pinned("--make", str(directory))
    return {
        "record": json.loads((directory / RECORD.name).read_text()),
        "forecasts": json.loads((directory / FORECASTS.name).read_text()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="replace the record")
    parser.add_argument("--interrupt", action="store_true", help="and the unfinished runs")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pack", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        scratch = Path(temporary).resolve()
        if arguments.make or arguments.pack:
            pin_version()
        if arguments.pack is not None:
            make_interrupted(scratch, arguments.pack.absolute())
            return 0
        if arguments.make is not None:
            target = arguments.make.absolute()
            write_json(target / FORECASTS.name, forecasts(scratch))
            (scratch / "runs").mkdir()
            write_json(target / RECORD.name, make(scratch / "runs"))
            return 0
        if arguments.interrupt:
            run_pinned("--pack", str(ARCHIVE))
        found = found_here(scratch)
    if arguments.write:
        write_json(RECORD, found["record"])
        write_json(FORECASTS, found["forecasts"])
        return 0
    lines = [
        *differences(json.loads(RECORD.read_text()), found["record"]),
        *differences(json.loads(FORECASTS.read_text()), found["forecasts"], "forecast"),
    ]
    print(*lines, sep="\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
