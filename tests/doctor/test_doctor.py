"""`doctor`: judgement of stated facts, and the facts of this machine."""

import json
import re
import socket
import tomllib
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from orchestrator.cli.main import main
from orchestrator.doctor import checks
from orchestrator.doctor.facts import DeviceFacts, DiskFacts, MemoryFacts, PackageFacts, gather

GIB = 2**30
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
PACKAGES = PackageFacts(
    python="3.12.1",
    requires_python=">=3.11",
    requirements=["torch>=2.9", "ray<2.62,>=2.60", 'peft>=0.21; extra == "recovery"'],
    installed={"torch": "2.13.0+cpu", "ray": "2.60.0", "peft": "0.21.2"},
    import_errors={},
)
DISK = DiskFacts(purpose="temporary files", path="/t", free=50, total=100, is_writable=True)
MEMORY = MemoryFacts(
    total=64 * GIB,
    available=40 * GIB,
    limit=None,
    shared_free=32 * GIB,
    open_files=1024,
    open_files_most=2**20,
)


def packages(**changes):
    """Findings about packages and extras, by item."""
    facts = replace(PACKAGES, **changes)
    found = [*checks.check_packages(facts), *checks.check_extras(facts)]
    return {each.item: each for each in found}


def installed(**changes):
    return {"installed": PACKAGES.installed | changes}


@pytest.mark.parametrize(
    ("changes", "item", "state", "fails", "says"),
    [
        ({}, "torch", "ok", False, "2.13.0+cpu (>=2.9)"),
        ({"python": "3.10.4"}, "Python", "missing", True, "outside of >=3.11"),
        (installed(ray="2.70.0"), "ray", "missing", True, "outside of <2.62,>=2.60"),
        (installed(torch=None), "torch", "missing", True, "not installed"),
        (
            {"import_errors": {"torch": "ImportError: no libcudart"}},
            *("torch", "missing", True, "cannot be imported: ImportError: no libcudart"),
        ),
        (installed(peft=None), "peft", "missing", False, "for training of adapters"),
        (installed(peft="0.2"), "peft", "warning", False, "outside of >=0.21"),
    ],
)
def test_packages_are_compared_with_the_metadata(changes, item, state, fails, says):
    """A required library that is absent, of another version or broken fails; an extra does not."""
    found = packages(**changes)
    assert (found[item].state, found[item].fails) == (state, fails)
    assert says in found[item].found
    assert (found[item].remedy == "") is (state == "ok")
    assert {name for name, each in found.items() if each.state != "ok"} <= {item}


def test_a_source_tree_is_a_warning():
    """Without metadata versions are listed, and absence is still an error."""
    found = packages(requirements=[], requires_python=None, **installed(torch=None))
    assert found["metadata"].state == "warning"
    assert found["torch"].fails
    assert found["ray"].state == "ok"


def test_every_extra_has_a_purpose():
    assert checks.PURPOSES.keys() == PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize(
    ("facts", "state", "says"),
    [
        (DeviceFacts(cpus=1), "ok", "no GPU; one worker per CPU, 1 CPU"),
        (
            DeviceFacts(names=["H"], memory_bytes=[80 * 10**9], cuda="13.0", driver="D"),
            *("ok", "H with 80 GB; CUDA 13.0"),
        ),
        (DeviceFacts(cpus=4, driver="NVRM 580"), "warning", "built without CUDA, sees no GPU"),
    ],
)
def test_devices(facts, state, says):
    """A loaded driver whose GPU torch does not see is a warning."""
    found = checks.check_devices(facts)
    assert found.state == state
    assert says in found.found


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "ok"),
        ({"free": 4}, "warning"),
        ({"is_writable": False}, "warning"),
        ({"write_speed": 5e6}, "warning"),
        ({"write_speed": 500e6}, "ok"),
    ],
)
def test_disks(changes, state):
    """A disk that is full, slow or cannot be written is a warning with a remedy."""
    found = checks.check_disk(replace(DISK, **changes))
    assert found.state == state
    assert bool(found.remedy) is (state != "ok")


@pytest.mark.parametrize(
    ("changes", "item", "says"),
    [
        ({}, None, ""),
        ({"limit": 8 * GIB}, None, ""),
        ({"shared_free": 64 * 2**20}, "/dev/shm", "--shm-size=9g"),
        ({"open_files_most": 1024}, "open files", "ulimit -n"),
    ],
)
def test_memory(changes, item, says):
    """Shared memory below Ray's store, and a hard limit of few files, are warnings."""
    found = {each.item: each for each in checks.check_memory(replace(MEMORY, **changes))}
    assert {name for name, each in found.items() if each.state != "ok"} == {item} - {None}
    assert item is None or says in found[item].remedy
    assert found["memory"].found.startswith("8.59 GB" if changes.get("limit") else "68.7 GB")


def test_the_facts_are_those_of_this_machine():
    """Versions, memory, disks and the answer of a port agree with other sources."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        facts = gather(address)
    assert facts.ray.error is None
    assert checks.check_ray(facts.ray).found == f"{address} (from --address) answers"
    assert facts.packages.installed["torch"] == torch.__version__
    assert facts.packages.import_errors == {}
    assert facts.memory.total == psutil.virtual_memory().total
    assert [disk.is_writable for disk in facts.disks[:2]] == [True, True]
    assert facts.disks[0].total == psutil.disk_usage(".").total
    assert len(facts.devices.names) == torch.cuda.device_count()


def test_the_cluster_that_ray_has_noted_is_found(monkeypatch, tmp_path):
    """Ray notes the last cluster below RAY_TMPDIR; a stated address takes precedence."""
    monkeypatch.setattr("orchestrator.doctor.facts.IMPORTED", ())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert gather().ray.address is None
    noted = tmp_path / "ray" / "ray_current_cluster"
    noted.parent.mkdir()
    noted.write_text("127.0.0.1:1\n")
    assert (gather().ray.address, gather().ray.origin) == ("127.0.0.1:1", str(noted))
    assert gather("127.0.0.1:2").ray.address == "127.0.0.1:2"


def test_the_command_prints_one_line_per_item(capsys, monkeypatch):
    """Lines and JSON have the same items; an address where nothing listens is a warning."""
    monkeypatch.setattr("orchestrator.doctor.facts.IMPORTED", ("torch",))
    assert main(["doctor", "--address", "127.0.0.1:1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["doctor", "--address", "127.0.0.1:1", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    states = [re.match(r"(ok|warning|missing) +(.*?)  ", line).groups() for line in lines]
    assert states == [(each["state"], each["item"]) for each in findings]
    assert ("warning", "Ray cluster") in states


def test_a_missing_requirement_is_exit_code_1(capsys, monkeypatch):
    """The machine has everything; the stated requirement is one that no machine has."""
    monkeypatch.setattr("orchestrator.doctor.facts.IMPORTED", ())
    monkeypatch.setattr("orchestrator.doctor.facts.requires", lambda name: ["torch>=99"])
    assert main(["doctor"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "torch" in line]
    assert line.startswith("missing  torch")
    assert line.endswith("outside of >=99; pip install 'torch>=99'")
