"""Dashboards of Ray: requests to a real one, and a simulated one without work."""

import json
import socket
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "a-token-that-only-this-test-knows-" * 2


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def answer(address, token):
    """Return the HTTP status of the jobs list; 0 without an answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{address}/api/jobs/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


def events(directory):
    lines = (directory.root / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class Head(ThreadingHTTPServer):
    """Simulated dashboard: a job ends with the given status, and a new head has no jobs."""

    def __init__(self, port, becomes):
        super().__init__(("127.0.0.1", port), Dashboard)
        self.jobs, self.asked, self.becomes = {}, [], becomes
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    def end(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Dashboard(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/api/version":
            self._answer({"ray_version": "2.60.0"})
        elif self.path == "/api/jobs/":
            self._answer(list(self.server.jobs.values()))
        else:
            # packages are already there, logs are not
            self._answer({}, 200 if "/packages/" in self.path else 404)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        job = {"type": "SUBMISSION", "entrypoint": asked["entrypoint"]}
        self.server.asked.append(asked)
        name = asked["submission_id"]
        self.server.jobs[name] = job | {"submission_id": name, **self.server.becomes}
        self._answer({"job_id": name, "submission_id": name})

    def _answer(self, document, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def log_message(self, *arguments):
        pass
