"""Run directory: atomic files, units committed by a manifest, chunks, status."""

import json
import os
import resource
import signal

import numpy as np
import pytest

from orchestrator.errors import InputError, OrchestratorError
from orchestrator.store.chunks import Chunks
from orchestrator.store.files import atomic, digest_json, write_json
from orchestrator.store.run import RunDirectory
from orchestrator.store.units import Units, unit_key


def commit(units, key, content=b"content", environment=None, **facts):
    unit = units.begin(key)
    with unit.file("a.bin") as path:
        path.write_bytes(content)
    unit.commit(environment=environment or {}, facts=facts)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    """If the body raises, the old content stays and no temporary file is left."""
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted():
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_refused_write_is_one_clear_line(tmp_path):
    """A write refused by the system gives an error with the path, and leaves no file."""
    path = tmp_path / "unit.json"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OrchestratorError, match=r"unit\.json: cannot be written"):
            write_json(path, "x" * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_keys_depend_on_every_part_and_on_no_order():
    """Equal parts give equal keys; another stage, version, input or parameter gives another key."""
    key = unit_key("decompose", 1, ["a", "b"], rank=3, dtype="float32")
    assert key == unit_key("decompose", 1, ["a", "b"], dtype="float32", rank=3)
    others = [
        unit_key("calibrate", 1, ["a", "b"], rank=3, dtype="float32"),
        unit_key("decompose", 2, ["a", "b"], rank=3, dtype="float32"),
        unit_key("decompose", 1, ["b", "a"], rank=3, dtype="float32"),
        unit_key("decompose", 1, ["a", "b"], rank=4, dtype="float32"),
    ]
    assert len({key, *others}) == 5


def test_a_unit_without_manifest_is_not_there(tmp_path):
    """Only the manifest commits a unit, not its files."""
    units = Units(tmp_path)
    unit = units.begin("ab" * 32)
    with unit.file("a.bin") as path:
        path.write_bytes(b"x")
    assert units.manifest("ab" * 32) is None
    unit.commit(environment={}, facts={"n": 1})
    assert units.facts("ab" * 32, {}) == {"n": 1}


def test_a_unit_counts_only_in_its_environment(tmp_path):
    """A unit of another environment is computed again."""
    units = Units(tmp_path)
    commit(units, "cd" * 32, environment={"threads": 1})
    assert units.facts("cd" * 32, {"threads": 1}) == {}
    assert units.facts("cd" * 32, {"threads": 2}) is None
    assert units.facts("cd" * 32, {"threads": 1, "orchestrator": "0.2.0"}) == {}


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "manifest"])
def test_damage_to_a_unit_is_found(tmp_path, damage):
    """A unit with a truncated, changed or missing file is no longer intact."""
    units = Units(tmp_path)
    commit(units, "ef" * 32)
    file = units.directory("ef" * 32) / "a.bin"
    assert units.verify("ef" * 32)
    if damage == "truncate":
        file.write_bytes(b"con")
    elif damage == "remove":
        file.unlink()
    elif damage == "flip":
        file.write_bytes(b"kontent")
    else:
        (file.parent / "manifest.json").write_text("{")
    assert not units.verify("ef" * 32)
    if damage != "flip":
        assert units.manifest("ef" * 32) is None


def test_a_spent_unit_has_facts_and_no_files(tmp_path):
    """A spent unit stays committed in its environment; written again, it has files again."""
    units, key = Units(tmp_path), "0a" * 32
    commit(units, key)
    whole = units.manifest(key)
    assert whole is not None
    assert (whole["spent"], len(whole["files"])) == (False, 1)
    units.spend(key)
    spent = units.manifest(key)
    assert spent == {**whole, "files": {}, "spent": True}
    assert [path.name for path in units.directory(key).iterdir()] == ["manifest.json"]
    assert (units.size(key), units.hashes(key)) == (0, [])
    units.spend(key)
    assert units.manifest(key) == spent
    commit(units, key)
    assert units.manifest(key) == whole
    units.drop(key)
    units.spend(key)
    assert units.manifest(key) is None


def test_a_linked_unit_is_not_spent(tmp_path):
    """Spending a link does not remove the files of the other run's unit."""
    theirs, ours, key = Units(tmp_path / "theirs"), Units(tmp_path / "ours"), "0c" * 32
    commit(theirs, key)
    ours.directory(key).parent.mkdir(parents=True)
    ours.directory(key).symlink_to(theirs.directory(key))
    ours.spend(key)
    assert theirs.verify(key)


def test_a_unit_that_is_being_spent_never_looks_whole(tmp_path, monkeypatch):
    """If the machine stops after the first removed file, the manifest already says spent."""
    units, key = Units(tmp_path), "0b" * 32
    commit(units, key)

    def stop(path, missing_ok=False):
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "unlink", stop)
        with pytest.raises(OSError, match="gone"):
            units.spend(key)
    found = units.manifest(key)
    assert found is not None
    assert found["spent"]
    units.spend(key)
    assert [path.name for path in units.directory(key).iterdir()] == ["manifest.json"]


def test_writing_a_unit_twice_gives_the_same_bytes(tmp_path):
    """Two attempts at one unit give the same files as one."""
    units = Units(tmp_path)
    commit(units, "01" * 32, seconds=1)
    before = (units.directory("01" * 32) / "manifest.json").read_bytes()
    commit(units, "01" * 32, seconds=1)
    assert (units.directory("01" * 32) / "manifest.json").read_bytes() == before
    assert sorted(os.listdir(units.directory("01" * 32))) == ["a.bin", "manifest.json"]


def test_chunks_come_back_as_written_or_not_at_all(tmp_path):
    """A chunk is read as written; one flipped bit makes it missing."""
    chunks = Chunks(tmp_path)
    rng = np.random.default_rng(0)
    record = {"hidden": rng.integers(-9, 9, (3, 4)).astype(np.int16), "mask": np.ones(3, bool)}
    chunks.write(2, 7, record)
    back = chunks.read(2, 7)
    assert all(np.array_equal(back[name], record[name]) for name in record)
    assert chunks.present(2, 10) == {7}

    content = bytearray(chunks.path(2, 7).read_bytes())
    content[-1] ^= 1
    chunks.path(2, 7).write_bytes(content)
    assert chunks.read(2, 7) is None
    chunks.drop(2)
    assert chunks.present(2, 10) == set()
    assert chunks.read(2, 7) is None


def test_a_run_directory_claims_only_what_is_its_own(tmp_path):
    """An empty or own directory is claimed; one with other files is refused and not changed."""
    run = RunDirectory(tmp_path / "run")
    run.claim({"recipe": {}})
    run.claim({"recipe": {}})
    assert run.description()["recipe"] == {}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(InputError, match="not a run directory"):
        RunDirectory(tmp_path / "photos").claim({})
    with pytest.raises(InputError, match="not a run directory"):
        RunDirectory(tmp_path / "photos").remove()
    assert (tmp_path / "photos" / "cat.png").exists()


def test_a_status_whose_process_is_gone_says_so(tmp_path):
    """The state is `running` only while the process runs."""
    run = RunDirectory(tmp_path)
    run.claim({})
    run.write_status(state="running")
    assert run.status()["state"] == "running"
    status = json.loads((tmp_path / "status.json").read_text())
    write_json(tmp_path / "status.json", {**status, "pid": 2**22 + 1})
    assert run.status()["state"] == "lost"


def test_the_journal_is_one_line_an_event(tmp_path):
    """Events are appended as JSON lines, in order."""
    run = RunDirectory(tmp_path)
    run.append({"event": "note", "text": "ä\nb"})
    run.append({"event": "stage"})
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["note", "stage"]


def test_digests_do_not_depend_on_the_order_of_keys():
    """Canonical JSON: equal values have equal digests."""
    assert digest_json({"a": 1, "b": [2]}) == digest_json({"b": [2], "a": 1})
