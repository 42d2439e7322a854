"""Failing writes: atomic, retried if transient, else one clear error."""

import errno
import os
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
from faulty_proxy import faulty_proxy
from object_store import remote
from pipeline import contents, run, write_llama, write_text

from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.store import cache as caches
from orchestrator.store import storage_errors as retries
from orchestrator.store.chunks import Chunks
from orchestrator.store.files import atomic, write_json, write_whole
from orchestrator.store.places import _undisturbed
from orchestrator.store.units import Units


@pytest.fixture
def impatient(monkeypatch):
    """Failed calls are not retried, so that a test need not wait; retries of the SDK stay."""
    monkeypatch.setattr(retries, "TRIES", 1)


@pytest.fixture
def full_disk(tmp_path):
    """Make a file system of 1 MB."""
    directory = tmp_path / "small"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


CUTS = {
    "a small object": (1000, lambda piece: piece.startswith(b"PUT")),
    "the second part": (25 << 20, lambda piece: b"partNumber=2" in piece[:400]),
    "the completion": (
        25 << 20,
        lambda piece: piece.startswith(b"POST") and b"uploadId=" in piece[:400],
    ),
}


@pytest.mark.chaos
@pytest.mark.parametrize("cut", CUTS)
def test_an_upload_that_is_cut_leaves_nothing(cut, s3, tmp_path, impatient):
    """An interrupted upload leaves no object, at any point, and the error names the failure."""
    size, is_cut = CUTS[cut]
    (tmp_path / "file").write_bytes(bytes(size))
    with faulty_proxy(s3.port) as proxy:
        place = remote(s3.uri(f"cut/{tmp_path.name}", port=proxy.port))
        proxy.is_cut = is_cut
        with pytest.raises(OrchestratorError, match="the store failed repeatedly"):
            place.upload(tmp_path / "file")
        assert proxy.cuts > 0
        proxy.is_cut = lambda piece: False
        assert not place.exists()
        place.upload(tmp_path / "file")
        assert place.size() == size


@pytest.mark.chaos
def test_a_store_that_comes_back_is_waited_for(s3, monkeypatch):
    """A call that fails in every try of the SDK is retried later, and succeeds."""
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.1)
    with faulty_proxy(s3.port) as proxy:
        place = remote(s3.uri("away/a.json", port=proxy.port))
        assert not place.exists()
        proxy.is_cut = lambda piece: True
        timer = threading.Timer(8, setattr, (proxy, "is_cut", lambda piece: False))
        timer.start()
        begun = time.monotonic()
        write_json(place, {"a": 1})
        timer.join()
        assert time.monotonic() - begun > 6
        assert place.read_bytes() == b'{\n "a": 1\n}\n'


def test_an_interrupt_completes_no_half_upload():
    """An interrupt has no delay and does not leave a partial upload."""
    begun, done = threading.Event(), threading.Event()

    def slow():
        begun.set()
        time.sleep(0.3)
        done.set()

    def interrupt():
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    # a process started in the background ignores it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        _undisturbed(slow)
    signal.signal(signal.SIGINT, before)
    assert done.wait(5)


def test_half_a_file_does_not_stay_whole(s3, tmp_path, impatient):
    """If the local file ends early or becomes unreadable, the resulting object is removed."""
    path = tmp_path / "file"
    path.write_bytes(bytes(100))

    class Shorter(type(path)):
        def open(self, *arguments):
            file = super().open(*arguments)
            os.truncate(self, 40)
            return file

    place = remote(s3.uri("half/file"))
    with pytest.raises(OrchestratorError, match="40 of 100 bytes"):
        place.upload(Shorter(path))
    assert not place.exists()


def test_a_write_that_fails_once_is_repeated(tmp_path, monkeypatch):
    """A transient error is retried; a permanent one is raised at once."""
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.01)
    tries = []

    def write(path):
        tries.append(path)
        if len(tries) < 3:
            raise OSError(errno.ESTALE, "stale handle")
        path.write_bytes(b"there")

    write_whole(tmp_path / "file", write)
    assert (tmp_path / "file").read_bytes() == b"there"
    tries.clear()

    def refuse(path):
        tries.append(path)
        raise OSError(errno.EDQUOT, "quota exceeded")

    with pytest.raises(OrchestratorError, match="cannot be written: quota exceeded"):
        write_whole(tmp_path / "other", refuse)
    assert len(tries) == 1
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_one_clear_line(full_disk):
    """Units and chunks that do not fit leave no file, and raise the system's message."""
    key = "ab" * 32
    unit = Units(full_disk).begin(key)

    def write():
        with unit.file("a.bin") as path:
            path.write_bytes(bytes(2 << 20))

    with pytest.raises(OrchestratorError, match=r"a\.bin: cannot be written: No space left"):
        write()
    with pytest.raises(OrchestratorError, match="cannot be written: No space left"):
        Chunks(full_disk).write(0, 0, {"a": np.zeros(1 << 18)})
    assert [path for path in full_disk.rglob("*") if path.is_file()] == []
    assert Units(full_disk).manifest(key) is None


def test_a_full_disk_on_the_way_to_a_store(s3, full_disk, monkeypatch):
    """If the copy to upload does not fit on the node, the message names its path."""
    monkeypatch.setattr(caches, "process_cache", lambda: cache)
    cache = caches.Cache(full_disk)

    def write():
        with atomic(remote(s3.uri("full/file"))) as path:
            path.write_bytes(bytes(2 << 20))

    with pytest.raises(OrchestratorError, match="under TMPDIR: No space left"):
        write()
    cache.close()
    assert s3.objects("full") == {}


@pytest.mark.chaos
def test_a_run_whose_disk_was_full_is_resumed(full_disk, tmp_path):
    """The run fails with one error; with space, the same command completes it, to the same
    bytes."""
    text = write_text(tmp_path / "text.txt")
    model = write_llama(tmp_path / "dense", blocks=4)
    run(model, tmp_path / "alone", text)
    run_dir = full_disk / "run"
    filler = full_disk / "filler"
    filler.write_bytes(bytes(600 << 10))
    events = []
    with pytest.raises(OrchestratorError, match="No space left on device"):
        run(model, tmp_path / "out", text, run_dir=str(run_dir), on_event=events.append)
    assert 0 < sum(event["event"] == "unit" for event in events) < 4
    units = Units(run_dir / "units")
    whole = [key for key in units.begun() if units.manifest(key) is not None]
    assert all(units.verify(key) for key in whole)
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(full_disk)], check=True)
    run(model, tmp_path / "out", text, run_dir=str(run_dir))
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_no_bucket_is_said_at_once(s3):
    """A bucket that does not exist is not waited for."""
    place = remote(s3.uri("a.json", bucket="nowhere"))
    begun = time.monotonic()
    with pytest.raises(UsageError, match="s3://nowhere does not exist; create the bucket"):
        write_json(place, {})
    with pytest.raises(UsageError, match="s3://nowhere does not exist; create the bucket"):
        place.check()
    assert time.monotonic() - begun < 5
