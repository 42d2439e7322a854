"""Real S3 server in a separate process, and access to its objects."""

import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from orchestrator.store.places import Remote

BUCKET = "bucket"


class ObjectStore:
    """The server, accessed by a client independent of orchestrator."""

    def __init__(self, port: int) -> None:
        from pyarrow.fs import S3FileSystem

        self.port = port
        self.system = S3FileSystem(
            endpoint_override=f"127.0.0.1:{port}", scheme="http", allow_bucket_creation=True
        )
        self.system.create_dir(BUCKET)

    def uri(self, inner: str, *, port: int | None = None, bucket: str = BUCKET) -> str:
        """Return a place in the store; through a proxy if the port is that of one."""
        query = f"endpoint_override=127.0.0.1:{port or self.port}&scheme=http"
        return f"s3://{bucket}/{inner}?{query}"

    def objects(self, inner: str) -> dict[str, bytes]:
        """Return every object under a prefix, by the rest of its name."""
        from pyarrow.fs import FileSelector

        base = f"{BUCKET}/{inner}"
        selector = FileSelector(base, recursive=True, allow_not_found=True)
        return {
            each.path.removeprefix(f"{base}/"): self.read(each.path)
            for each in self.system.get_file_info(selector)
            if each.type.name == "File"
        }

    def read(self, path: str) -> bytes:
        with self.system.open_input_stream(path) as stream:
            return stream.read()

    def write(self, inner: str, content: bytes) -> None:
        with self.system.open_output_stream(f"{BUCKET}/{inner}") as stream:
            stream.write(content)

    def download(self, inner: str, directory: Path) -> Path:
        for name, content in self.objects(inner).items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return directory


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Start the server on a port that it chooses: one found beforehand may be taken by then."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with (
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as server,
        ThreadPoolExecutor(1) as reader,
    ):
        assert server.stderr is not None
        try:
            port = _port_in(server.stderr)
            # requests are logged: a full pipe would stop the server
            reader.submit(deque, server.stderr, 0)
            yield ObjectStore(port)
        finally:
            server.kill()


def _port_in(log: Iterable[str]) -> int:
    """Read the log of the server up to the line with its address."""
    for line in log:
        if found := re.search(r"Running on http://127.0.0.1:(\d+)", line):
            return int(found[1])
    raise AssertionError("the server has ended")


def remote(uri: str) -> Remote:
    from orchestrator.store.places import parse_place

    place = parse_place(uri)
    assert isinstance(place, Remote)
    return place
