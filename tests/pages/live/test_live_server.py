"""Server of the live page: streams that go on, requests that are refused, and nothing written."""

import http.client
import json
import socket
import threading
from contextlib import contextmanager

import pytest
from object_store import remote

from orchestrator import api
from orchestrator.cli.main import main
from orchestrator.errors import InputError, UsageError
from orchestrator.pages.live import feed as feeds
from orchestrator.pages.live import live_server, server, url_of
from orchestrator.runtime.monitor import RunMonitor
from orchestrator.store.run import RunDirectory

NAME = "<i>'model'&"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Shorten the intervals to some hundredths of a second."""
    monkeypatch.setattr(feeds, "DISK_SECONDS", 0.02)
    monkeypatch.setattr(feeds, "STORE_SECONDS", 0.05)
    monkeypatch.setattr(server, "HEARTBEAT_SECONDS", 0.1)


@contextmanager
def served(place, host="127.0.0.1"):
    """Serve a run in a thread. Yields the port."""
    with live_server(place, host, 0) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.02,))
        thread.start()
        yield served.server_address[1]
        served.shutdown()
        thread.join()


def asked(port, path, method="GET", **headers):
    """The answer to a request: code, headers, text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={n.replace("_", "-"): v for n, v in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


class EventStream:
    """Client of `/events`."""

    def __init__(self, port, path="/events", **headers):
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request("GET", path, headers=named)
        self._answer = self._connection.getresponse()
        assert self._answer.headers["Content-Type"].startswith("text/event-stream")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._answer.close()
        self._connection.close()

    def block(self):
        """The next event or comment, by field."""
        fields = {}
        while (line := self._answer.readline().decode().rstrip("\n")) != "":
            name, _, value = line.partition(": ")
            fields[name] = value
        return fields

    def event(self, kind):
        """Data and id of the next event of a kind."""
        while (found := self.block()).get("event") != kind:
            pass
        return found["data"], found.get("id")

    def sections(self):
        data, mark = self.event("sections")
        return json.loads(data), mark


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / NAME)
    run.claim({"recipe": {"method": NAME, "keep": 0.5}, "model": f"/models/{NAME}"})
    return run


def test_a_stream_goes_on_where_it_was_interrupted(run):
    """With the last id only what changed since then is sent, and the id counts events."""
    with RunMonitor(run, None) as monitor, served(run.root) as port:
        with EventStream(port) as stream:
            everything, mark = stream.sections()
            assert {"head", "key", "happened", "foot"} <= everything.keys()
        monitor.note("something new")
        with EventStream(port, Last_Event_ID=mark) as stream:
            changed, later = stream.sections()
            while "something new" not in changed.get("happened", ""):
                more, later = stream.sections()
                changed |= more
            assert "foot" in changed
            monitor.note("and more")
            changed, latest = stream.sections()
            assert changed.keys() == {"happened"}
        counts = [int(each.partition("-")[2]) for each in (mark, later, latest)]
        assert counts == [1, 2, 3]
        with EventStream(port, Last_Event_ID=latest) as stream:
            assert stream.sections()[0].keys() == {"happened"}
        for unknown in ("0123abcd-2", "2", f"{latest}9", "-", "ä"):
            with EventStream(port, f"/events?after={unknown.encode().hex()}") as stream:
                assert stream.sections()[0].keys() == everything.keys()


def test_a_quiet_stream_has_heartbeats(run):
    """Comments keep it open; the browser's clock is compared with the server's once."""
    with served(run.root) as port, EventStream(port) as stream:
        float(stream.event("clock")[0])
        stream.sections()
        assert [stream.block() for _ in range(2)] == [{"": "nothing new"}] * 2


def test_the_page_shows_a_run_from_before_its_beginning(tmp_path):
    """The directory appears, is removed and appears again; the stream shows each of it."""
    place = tmp_path / "run"
    with served(place) as port, EventStream(port) as stream:
        head = stream.sections()[0]["head"]
        assert "Nothing has happened" in head
        for _ in range(2):
            run = RunDirectory(place)
            run.claim({})
            with RunMonitor(run, None):
                while "running" not in head:
                    head = stream.sections()[0].get("head", head)
            run.remove()
            while "Nothing has happened" not in head:
                head = stream.sections()[0].get("head", head)


def test_names_are_escaped_and_scripts_bound_to_the_page(run):
    """No name becomes an element, and the policy allows only the page's own script and style."""
    with RunMonitor(run, None) as monitor, served(run.root) as port:
        monitor.note(f"note {NAME}</script>")
        for path in ("/", "/report"):
            code, headers, text = asked(port, path)
            assert code == 200
            assert "<i>" not in text
            assert text.count("</script>") == 1
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Cache-Control"] == "no-store"
        with EventStream(port) as stream:
            assert not any("<i>" in each for each in stream.sections()[0].values())


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil", "[x"])
def test_other_hosts_are_refused_locally(host, run):
    """A page of another site that has rebound its name gets nothing."""
    with served(run.root) as port:
        for path in ("/", "/events", "/report"):
            assert asked(port, path, Host=host)[0] == 421
        for ours in (f"localhost:{port}", "127.0.0.1", "[::1]:9000", "LOCALHOST"):
            assert asked(port, "/", Host=ours)[0] == 200


def test_an_open_address_answers_to_any_name(run):
    """All hosts are answered if all addresses are served: names of a machine are unknown."""
    with served(run.root, host="0.0.0.0") as port:
        assert asked(port, "/", Host="node-3.cluster:8270")[0] == 200


def test_only_pages_are_read(run):
    """Other methods and other paths are refused, also paths into the run directory."""
    with served(run.root) as port:
        for method in ("HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            code, headers, _ = asked(port, "/", method)
            assert (code, headers["Allow"]) == (405, "GET")
        for path in ("/run.json", "/../run.json", "/%2e%2e/run.json", "//x", "/events/", "*"):
            assert asked(port, path)[0] == 404
        assert asked(port, "/favicon.ico")[0] == 204


def test_streams_are_limited(run, monkeypatch):
    """Each holds a thread; one more is told so, and may come when another one has left."""
    monkeypatch.setattr(server, "MOST_STREAMS", 2)
    with served(run.root) as port, EventStream(port) as one, EventStream(port) as other:
        for each in (one, other):
            each.sections()
        assert asked(port, "/events")[0] == 503
        other.__exit__()
        code = 503
        while code == 503:
            try:
                with EventStream(port) as stream:
                    code = 200
                    stream.sections()
            except AssertionError:
                continue


def test_a_run_that_has_ended_is_its_report(runs):
    """The page leads to the report, a stream says that it has ended, and nothing is written."""
    first, _ = runs
    before = sorted(first.run_dir.rglob("*"))
    with served(first.run_dir) as port:
        code, headers, _ = asked(port, "/")
        assert (code, headers["Location"]) == (303, "/report")
        report = asked(port, "/report")[2]
        assert "Every linear" in report
        with EventStream(port) as stream:
            assert stream.event("ended")[0] == "report"
            assert stream.block() == {}
    assert sorted(first.run_dir.rglob("*")) == before


def test_an_evaluation_that_has_ended_is_its_result(runs, tmp_path, capsys):
    """Perplexities of both models and their ratio; `report` writes the same page."""
    directory = runs[0].out.with_name(f"{runs[0].out.name}.evaluation")
    with served(directory) as port:
        assert asked(port, "/")[1]["Location"] == "/report"
        code, _, text = asked(port, "/report")
    assert code == 200
    assert "Quality, speed and size" in text
    assert text.count('<th scope="row">perplexity</th>') == 1
    assert main(["report", str(directory), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == text
    capsys.readouterr()


def test_the_page_of_a_search_stays_until_its_last_run(tmp_path):
    """A candidate's run ends long before: it is evaluated, and others follow."""
    run = RunDirectory(tmp_path / "run")
    for out, is_last in ((tmp_path / "out.search" / "1f", False), (tmp_path / "out", True)):
        run.claim({"recipe": {"method": "svd"}, "out": str(out)})
        with RunMonitor(run, None):
            pass
        with served(run.root) as port:
            code, _, text = asked(port, "/")
        assert code == (303 if is_last else 200)
        assert is_last or "A combination of a search is done" in text


def test_a_run_in_a_store(s3, tmp_path):
    """Its events arrive, and its objects are read and not written."""
    place = remote(s3.uri(f"watched/{tmp_path.name}/run"))
    run = RunDirectory(place)
    with served(place) as port, EventStream(port) as stream:
        run.claim({})
        with RunMonitor(run, None) as monitor, monitor.stage("calibrate") as stage:
            stage.progress(1, 3, unit="block 0")
            run.flush()
            blocks = ""
            while "block 0, decomposed: committed" not in blocks:
                blocks = stream.sections()[0].get("blocks", "")
        head = ""
        while ">done<" not in head:
            head = stream.sections()[0].get("head", "")
    names = {each.split("/")[0] for each in s3.objects(place.inner)}
    assert names == {"run.json", "status.json", "events"}


def test_a_damaged_status_is_shown_as_such(run):
    """The page keeps what was known, and says which file cannot be read."""
    with RunMonitor(run, None), served(run.root) as port, EventStream(port) as stream:
        stream.sections()
        (run.root / "status.json").write_text("[")
        head = ""
        while "status.json: cannot be read" not in head:
            head = stream.sections()[0].get("head", head)
        assert ">running<" in head


def test_watch_says_what_is_wrong_in_a_line(run, runs, tmp_path, capsys):
    """A port in use, a number that is none, and places that are no runs, with their exit codes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["watch", str(run.root), "--port", str(port)]) == 2
    assert f"127.0.0.1, port {port}: cannot be opened" in capsys.readouterr().err
    with pytest.raises(UsageError, match="65535"):
        api.watch(run.root, port=65536)
    with pytest.raises(UsageError, match="cannot be opened"):
        api.watch(run.root, host="not a host")
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="not a run directory"):
            api.watch(place)
    RunDirectory(tmp_path / "out.run").claim({})
    with pytest.raises(InputError, match=r"its run directory is .*out\.run"):
        api.watch(tmp_path / "out")


def test_the_keyboard_ends_watch_without_error(run, capsys, monkeypatch):
    """The address is printed once, with a warning if others can reach it."""

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(server.LiveServer, "serve_forever", interrupted)
    assert main(["watch", str(run.root), "--port", "0"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert "http://127.0.0.1:" in said[0]
    assert main(["watch", str(run.root), "--port", "0", "--host", "0.0.0.0"]) == 0
    warning, address = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: everyone who reaches 0.0.0.0")
    assert "http://0.0.0.0:" in address


def test_the_address_of_a_page(run):
    """IPv6 addresses are in brackets."""
    with live_server(run.root, "::1", 0) as served:
        assert url_of(served) == f"http://[::1]:{served.server_address[1]}/"
