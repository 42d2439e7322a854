"""Places in an object store, on a real S3 server: units, chunks, journal and status."""

import errno
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from object_store import BUCKET, remote

from orchestrator.errors import InputError, OrchestratorError, UsageError
from orchestrator.models.checkpoint.output import check_out, claim_out
from orchestrator.store import cache as caches
from orchestrator.store import journal
from orchestrator.store.cache import Cache
from orchestrator.store.chunks import Chunks
from orchestrator.store.files import digest_file, write_json
from orchestrator.store.places import Remote, parse_place
from orchestrator.store.run import RunDirectory
from orchestrator.store.storage_errors import is_denied, is_no_bucket, is_passing, waits
from orchestrator.store.units import Units

KEY = "ab" * 32


@pytest.fixture
def place(s3, request):
    """An empty prefix."""
    return remote(s3.uri(f"places/{request.node.name}"))


def commit(units, content=b"content", **facts):
    unit = units.begin(KEY)
    with unit.file("a.bin") as path:
        path.write_bytes(content)
    unit.commit(environment={}, facts=facts)


def test_a_path_is_a_path_and_a_uri_is_remote():
    """Text without a scheme is a local path, unchanged; a URI keeps its options."""
    assert parse_place("a/b") == Path("a/b")
    assert parse_place("file:///a/b") == Path("/a/b")
    there = parse_place("s3://bucket/a/b/?region=x")
    assert there == Remote("s3://bucket", "a/b", "region=x")
    assert str(there.with_name("b.run") / "units") == "s3://bucket/a/b.run/units?region=x"
    assert (there.name, str(there.parent)) == ("b", "s3://bucket/a?region=x")
    assert pickle.loads(pickle.dumps(there)) == there


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("ftp://host/a", "ftp:// is not supported"),
        ("s3:///a", "s3://BUCKET/PREFIX"),
        ("s3://bucket/../other", "s3://BUCKET/PREFIX"),
        ("s3://key:secret@bucket/a", "a secret in a URI"),
    ],
)
def test_what_is_no_place_is_refused(uri, says):
    """An unknown scheme, a missing bucket, an escaping path or a secret is refused, without the
    secret."""
    with pytest.raises(UsageError, match=says) as raised:
        parse_place(uri)
    assert "secret@" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_local_run_imports_no_file_systems(tmp_path):
    """Units, chunks, journal, status and lease on local disk do not import pyarrow."""
    code = f"""
import sys
from pathlib import Path
import numpy as np
from orchestrator.store.run import RunDirectory
run = RunDirectory(Path({str(tmp_path / "run")!r}))
run.claim({{}})
with run.lease().taken():
    run.write_status(state="running")
    run.append({{"event": "note"}})
    unit = run.units.begin("ab")
    with unit.file("a") as path:
        path.write_bytes(b"1")
    unit.commit(environment={{}}, facts={{}})
    assert run.units.verify("ab") and run.units.file("ab", "a").read_bytes() == b"1"
    run.chunks("p", {{}}).write(0, 0, {{"a": np.zeros(1)}})
assert not any(name.startswith("pyarrow") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_waits_grow_and_are_few():
    """A failed call is retried after growing waits, a limited number of times."""
    assert waits(4) == (0.5, 1.5, 4.5)
    assert waits(1) == ()


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EIO, "I/O error"), True),
        (OSError(errno.ESTALE, "stale handle"), True),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject: curlCode: 7"), True),
        (OSError("AWS Error SLOW_DOWN during PutObject: reduce your rate"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (OSError(errno.EDQUOT, "quota"), False),
        (OSError(errno.EROFS, "read-only"), False),
        (PermissionError(errno.EACCES, "denied"), False),
        (FileNotFoundError(errno.ENOENT, "not there"), False),
        (OSError("AWS Error NO_SUCH_BUCKET during PutObject: The bucket"), False),
        (OSError("AWS Error ACCESS_DENIED during HeadObject: No response body."), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error, passes):
    """Lost connections are retried; a full disk, denied access and a missing bucket are not."""
    assert is_passing(error) is passes
    assert not (is_denied(error) and is_no_bucket(error))


def test_a_unit_in_a_store_is_there_when_its_manifest_is(s3, place):
    """Files alone do not commit a unit; the manifest, written last, does."""
    units = Units(place)
    unit = units.begin(KEY)
    with unit.file("a.bin") as path:
        path.write_bytes(b"content")
    assert units.manifest(KEY) is None
    unit.commit(environment={}, facts={"n": 1})
    assert units.facts(KEY, {}) == {"n": 1}
    assert units.verify(KEY)
    assert units.file(KEY, "a.bin").read_bytes() == b"content"
    assert units.begun() == [KEY]
    names = s3.objects(place.inner)
    assert set(names) == {f"ab/{KEY}/a.bin", f"ab/{KEY}/manifest.json"}
    units.drop(KEY)
    assert s3.objects(place.inner) == {}
    assert units.manifest(KEY) is None


def test_both_kinds_of_place_hold_the_same_bytes(s3, place, tmp_path):
    """A unit has the same files in a store and on disk."""
    commit(Units(place), n=1)
    commit(Units(tmp_path), n=1)
    there = s3.objects(place.inner)
    assert there == {name: (tmp_path / name).read_bytes() for name in there}
    assert len(there) == 2


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "manifest"])
def test_damage_in_a_store_is_found(s3, place, damage):
    """A truncated, changed or missing object is found, at the latest on reading."""
    units = Units(place)
    commit(units)
    name = f"{place.inner}/ab/{KEY}/a.bin"
    if damage == "truncate":
        s3.write(name, b"con")
    elif damage == "remove":
        s3.system.delete_file(f"{BUCKET}/{name}")
    elif damage == "flip":
        s3.write(name, b"kontent")
    else:
        s3.write(f"{place.inner}/ab/{KEY}/manifest.json", b"{")
    assert not units.verify(KEY)
    if damage != "flip":
        assert units.manifest(KEY) is None
    if damage != "remove":
        with pytest.raises(OrchestratorError, match="differs from the manifest of its unit"):
            units.file(KEY, "a.bin")
    commit(units)
    assert units.file(KEY, "a.bin").read_bytes() == b"content"


def test_chunks_in_a_store_come_back_or_not_at_all(s3, place):
    """A chunk is read as written; one flipped bit makes it missing; a dropped chunk does not
    exist."""
    chunks = Chunks(place)
    record = {"hidden": np.arange(12, dtype=np.int16).reshape(3, 4), "mask": np.ones(3, bool)}
    chunks.write(2, 7, record)
    chunks.write(2, 8, record)
    back = chunks.read(2, 7)
    assert all(np.array_equal(back[name], record[name]) for name in record)
    assert chunks.present(2, 10) == {7, 8}
    content = bytearray(chunks.path(2, 7).read_bytes())
    content[-1] ^= 1
    s3.write(chunks.path(2, 7).inner, bytes(content))
    assert chunks.read(2, 7) is None
    assert chunks.read(3, 0) is None
    chunks.drop(2, 7)
    assert chunks.present(2, 10) == {8}
    chunks.drop(2)
    chunks.drop(3)
    assert chunks.present(2, 10) == set()
    chunks.clear()
    assert s3.objects(place.inner) == {}


def test_a_large_file_arrives_whole(place, tmp_path):
    """A file uploaded in several parts keeps its hash."""
    path = tmp_path / "large"
    path.write_bytes(np.random.default_rng(0).bytes(25 << 20))
    place.upload(path)
    assert place.size() == 25 << 20
    assert digest_file(place) == digest_file(path)
    place.download(tmp_path / "back")
    assert digest_file(tmp_path / "back") == digest_file(path)


def test_the_journal_replays_from_segments(s3, place, monkeypatch):
    """The journal reads as the same events in order, for any flushes and drivers."""
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 0.05)
    written = []
    for driver in range(3):
        run = RunDirectory(place)
        for number in range(40):
            event = {"event": "note", "text": f"{driver} ä\n {number}"}
            run.append(event)
            written.append(event)
            time.sleep(0.004)
        run.flush()
    events = list(RunDirectory(place).events())
    assert [{name: e[name] for name in ("event", "text")} for e in events] == written
    assert 3 <= len(s3.objects(f"{place.inner}/events")) < 60


def test_another_state_is_written_at_once(place):
    """Progress may wait for a second, a new state does not; old status never overwrites it."""
    run, reader = RunDirectory(place), RunDirectory(place)
    run.claim({})
    run.write_status(state="running", done=0)
    for done in range(1, 50):
        run.write_status(state="running", done=done)
    assert reader.status()["done"] < 49
    run.flush()
    assert reader.status()["done"] == 49
    run.append({"event": "note", "text": "the last"})
    run.write_status(state="running", done=50)
    run.write_status(state="done", exit_code=0)
    assert reader.status()["state"] == "done"
    assert [event["text"] for event in reader.events()] == ["the last"]
    run.flush()
    assert reader.status()["state"] == "done"


def test_a_prefix_that_holds_something_else_is_refused(s3, place):
    """A run directory and an output use a new prefix or their own, and change no other."""
    run = RunDirectory(place / "run")
    run.claim({"recipe": {}})
    run.claim({"recipe": {}})
    assert run.description()["recipe"] == {}
    claim_out(place / "out")
    assert check_out(place / "out") is False
    s3.write(f"{place.inner}/photos/cat.png", b"x")
    with pytest.raises(InputError, match="not a run directory"):
        RunDirectory(place / "photos").claim({})
    with pytest.raises(InputError, match="not a run directory"):
        RunDirectory(place / "photos").remove()
    with pytest.raises(UsageError, match=r"contains other files \(cat.png\)"):
        claim_out(place / "photos")
    assert s3.objects(f"{place.inner}/photos") == {"cat.png": b"x"}
    run.units.begin("ab" * 32).commit(environment={}, facts={})
    s3.write(f"{place.inner}/run/small/config.json", b"x")
    assert run.remove().left == (place / "run" / "small",)
    assert s3.objects(f"{place.inner}/run") == {"small/config.json": b"x"}
    s3.system.delete_dir(f"{BUCKET}/{place.inner}/run")
    with pytest.raises(OrchestratorError, match="was removed or renamed"):
        run.claim({"recipe": {}})
    run = RunDirectory(place / "run")
    run.claim({"recipe": {}})
    assert run.remove().left == ()
    assert s3.objects(f"{place.inner}/run") == {}


def test_a_cache_keeps_what_was_asked_for_last(s3, place, tmp_path):
    """Copies beyond the limit are removed, least recently used first, and all of them at the
    end."""
    for name in "abc":
        s3.write(f"{place.inner}/{name}", name.encode() * 10)
    cache = Cache(tmp_path, limit=25)
    checked = []
    fetch = lambda name: cache.fetch(place / name, lambda place, copy: checked.append(place.name))  # noqa: E731
    first = fetch("a")
    fetch("b")
    assert fetch("a") == first
    fetch("c")
    assert first.read_bytes() == b"a" * 10
    fetch("b")
    assert checked == ["a", "b", "c", "b"]
    assert cache.bytes == 20
    cache.forget(place)
    assert cache.bytes == 0
    cache.close()
    assert list(tmp_path.iterdir()) == []


def test_the_cache_of_a_killed_process_is_removed_by_the_next(tmp_path):
    """A process removes its cache at exit; that of a killed one is removed by the next."""
    code = """
import sys, pathlib, os
from orchestrator.store.cache import Cache
cache = Cache(pathlib.Path(sys.argv[1]))
cache.temporary().write_bytes(b"x")
print(flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes)
    owner.stdout.readline()
    (theirs,) = tmp_path.iterdir()
    caches.remove_abandoned(tmp_path)
    assert len(os.listdir(theirs)) == 2
    owner.kill()
    owner.communicate()
    Cache(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_json_in_a_store_is_replaced_as_a_whole(s3, place):
    """A second version replaces the first."""
    write_json(place / "a.json", {"a": 1})
    write_json(place / "a.json", {"b": 2})
    assert {n: json.loads(c) for n, c in s3.objects(place.inner).items()} == {"a.json": {"b": 2}}
