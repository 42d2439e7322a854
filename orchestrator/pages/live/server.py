"""Server of the live page: a page, its stream of changes, and the report; it only reads.

    /         the page; once the run is done, a redirection to its report
    /events   the changes of the page, as server-sent events
    /report   the report of the run as it is now

On a loopback address requests must name a loopback host, so that a page of another site cannot
read the run by rebinding its own name to 127.0.0.1.
"""

import base64
import hashlib
import json
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any
from urllib.parse import parse_qs, urlsplit

from orchestrator.errors import InputError, OrchestratorError, UsageError
from orchestrator.pages.live.feed import Change, Feed
from orchestrator.pages.live.style import LIVE_SCRIPT, LIVE_STYLE
from orchestrator.pages.style import SCRIPT, STYLE
from orchestrator.store.places import Place

HEARTBEAT_SECONDS = 15.0
"""Interval between comments in a stream without changes, by which a closed client is noticed."""
REQUEST_SECONDS = 30.0
"""Seconds for which a client may be silent within a request, or not read its answer."""
MOST_STREAMS = 64
"""Number of streams at the same time; each has a thread."""
RETRY_MILLISECONDS = 2000
"""Pause of a browser before it connects again."""


class LiveServer(ThreadingHTTPServer):
    """HTTP server of one run directory."""

    daemon_threads = True

    def __init__(self, feed: Feed, host: str, port: int) -> None:
        self.feed = feed
        self.streams = threading.BoundedSemaphore(MOST_STREAMS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.is_local = is_loopback(host)
        super().__init__((host, port), LiveHandler)

    def server_bind(self) -> None:
        """Bind without a look-up of the host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that went away."""


class LiveHandler(BaseHTTPRequestHandler):
    """Answers GET; every other method is refused."""

    server: LiveServer
    server_version, sys_version = "orchestrator", ""
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if self.server.is_local and not self._names_this_host():
            text = "this server answers requests for localhost only\n"
            return self._answer(HTTPStatus.MISDIRECTED_REQUEST, text)
        match path:
            case "/":
                self._send_page()
            case "/events":
                after = parse_qs(query).get("after", [""])[0]
                self._send_events(self.headers.get("Last-Event-ID") or after)
            case "/report":
                self._send_report()
            case "/favicon.ico":
                self._answer(HTTPStatus.NO_CONTENT, "")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, "there are /, /events and /report\n")

    def _refuse(self) -> None:
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "only GET\n", Allow="GET")

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def log_message(self, format: str, *args: Any) -> None:
        """Write no line per request."""

    def _names_this_host(self) -> bool:
        hosts = self.headers.get_all("Host") or []
        with suppress(ValueError):
            return len(hosts) == 1 and is_loopback(urlsplit(f"//{hosts[0]}").hostname or "")
        return False

    def _send_page(self) -> None:
        feed = self.server.feed
        feed.refresh()
        if feed.has_ended():
            self._answer(HTTPStatus.SEE_OTHER, "", Location="/report")
        else:
            self._answer(HTTPStatus.OK, feed.page(), policy=LIVE_POLICY)

    def _send_report(self) -> None:
        try:
            content = self.server.feed.report()
        except InputError as error:
            self._answer(HTTPStatus.NOT_FOUND, f"{error}\n")
        except OrchestratorError as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n")
        else:
            self._answer(HTTPStatus.OK, content, policy=REPORT_POLICY)

    def _answer(self, code: HTTPStatus, text: str, policy: str = "", **headers: str) -> None:
        content = text.encode()
        kind = "text/html" if policy else "text/plain"
        self._begin(
            code, f"{kind}; charset=utf-8", policy, Content_Length=str(len(content)), **headers
        )
        self.wfile.write(content)

    def _begin(self, code: HTTPStatus, kind: str, policy: str = "", **headers: str) -> None:
        """Send the status and the headers."""
        sent = {
            "Content-Type": kind,
            "Content-Security-Policy": policy or NOTHING,
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        self.send_response(code)
        for name, value in {**sent, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _send_events(self, mark: str) -> None:
        streams = self.server.streams
        if not streams.acquire(blocking=False):
            text = f"there are {MOST_STREAMS} streams already\n"
            return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, text)
        try:
            self._begin(HTTPStatus.OK, "text/event-stream; charset=utf-8")
            self._send(f"retry: {RETRY_MILLISECONDS}\n")
            self._send(_message("clock", f"{time.time():.3f}"))
            with self.server.feed.followed():
                self._stream(mark)
        except OSError:
            # the client went away
            pass
        finally:
            streams.release()

    def _stream(self, mark: str) -> None:
        """Send changes until the run has ended, or the server is closed."""
        feed = self.server.feed
        change: Change | None = feed.since(mark)
        revision = 0
        while not feed.is_closed:
            if change is None:
                self._send(": nothing new\n\n")
            else:
                revision = change.revision
                if change.sections:
                    self._send(_message("sections", json.dumps(change.sections), change.mark))
                if feed.has_ended():
                    return self._send(_message("ended", "report"))
            change = feed.wait(revision, HEARTBEAT_SECONDS)

    def _send(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()


def _message(kind: str, data: str, mark: str = "") -> str:
    """Make a server-sent event; `data` is one line."""
    return (f"id: {mark}\n" if mark else "") + f"event: {kind}\ndata: {data}\n\n"


@contextmanager
def live_server(place: Place, host: str, port: int) -> Iterator[LiveServer]:
    """Listen at an address and read the run; `serve_forever` of the server answers requests.

    Raises:
        UsageError: The address is in use, or is not one of this machine.
    """
    with Feed(place) as feed:
        try:
            server = LiveServer(feed, host, port)
        except (OSError, UnicodeError) as error:
            said = getattr(error, "strerror", None) or str(error)
            raise UsageError(
                f"{host}, port {port}: cannot be opened: {said}; "
                "give another with --port, --port 0 for any free one, or another --host"
            ) from error
        with server:
            yield server


def url_of(server: LiveServer) -> str:
    """Return the address of the page."""
    host, port = server.server_address[:2]
    return f"http://[{host!s}]:{port}/" if ":" in str(host) else f"http://{host!s}:{port}/"


def is_loopback(host: str) -> bool:
    """Return True for localhost and loopback addresses."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _policy(style: str, script: str) -> str:
    """Content security policy of a page with one style sheet and one script of its own."""
    return (
        f"{NOTHING}; style-src '{_hash(style)}'; script-src '{_hash(script)}'; connect-src 'self'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
LIVE_POLICY = _policy(STYLE + LIVE_STYLE, LIVE_SCRIPT)
REPORT_POLICY = _policy(STYLE, SCRIPT)
