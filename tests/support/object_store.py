"""Real S3 server in a separate process, and access to its objects."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    """Start the server on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, **quiet)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None, "the server has ended"
                assert time.monotonic() < end, "the server does not answer"
                time.sleep(0.05)
        yield ObjectStore(port)
    finally:
        server.kill()
        server.wait()


def remote(uri: str) -> Remote:
    from orchestrator.store.places import parse_place

    place = parse_place(uri)
    assert isinstance(place, Remote)
    return place
