"""TCP proxy in front of a server, which refuses and cuts requests on demand."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """Proxy that passes bytes both ways; a request selected by `is_cut` is cut off without an
    answer.

    `is_cut` receives the client's bytes in pieces; the first piece of a request starts with its
    method. It is called in threads, one per connection.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.is_cut: Callable[[bytes], bool] = lambda piece: False
        self.answer: bytes | None = None
        """Answer to every request instead of the server's."""
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with (
            client,
            suppress(OSError),
            socket.create_connection(("127.0.0.1", self._port)) as server,
        ):
            back = threading.Thread(target=_pass, args=(server, client), daemon=True)
            back.start()
            while piece := client.recv(1 << 16):
                if self.answer is not None:
                    client.sendall(self.answer)
                elif self.is_cut(piece):
                    self.cuts += 1
                    client.shutdown(socket.SHUT_RDWR)
                    break
                else:
                    server.sendall(piece)
            server.shutdown(socket.SHUT_RDWR)
            back.join()

    def close(self) -> None:
        self._listener.close()


def _pass(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(1 << 16):
            sink.sendall(piece)


@contextmanager
def faulty_proxy(port: int) -> Iterator[Proxy]:
    proxy = Proxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
