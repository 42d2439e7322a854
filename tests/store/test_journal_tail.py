"""A journal that is read while it grows, on disk and in a store."""

import pytest
from object_store import remote

from orchestrator.store.files import remove_tree
from orchestrator.store.journal import JournalTail
from orchestrator.store.run import RunDirectory


@pytest.fixture(params=["disk", "store"])
def run(request, tmp_path):
    """Run directory that does not exist yet."""
    if request.param == "disk":
        return RunDirectory(tmp_path / "run")
    s3 = request.getfixturevalue("s3")
    return RunDirectory(remote(s3.uri(f"tails/{tmp_path.name}/run")))


def write(run, *texts):
    for text in texts:
        run.append({"event": "note", "text": text})
    run.flush()


def texts(news):
    return [event["text"] for event in news.events]


def test_every_event_is_read_once_and_in_order(run):
    """From before the directory exists; together they are the events of the whole journal."""
    tail = JournalTail(run.root)
    assert tail.read() == (False, [])
    run.claim({})
    found = []
    for number in range(5):
        write(run, f"{number} ä\u2028\n", f"{number} b")
        news = tail.read()
        assert not news.begins_anew
        assert len(news.events) == 2
        found += news.events
        assert tail.read() == (False, [])
    assert found == list(run.events())


def test_a_journal_that_was_removed_begins_anew(run):
    """After removal and a new beginning, the events of the new journal are read from its first."""
    run.claim({})
    write(run, "a", "b", "c")
    tail = JournalTail(run.root)
    assert texts(tail.read()) == ["a", "b", "c"]
    remove_tree(run.root)
    assert tail.read() == (True, [])
    assert tail.read() == (False, [])
    again = RunDirectory(run.root)
    again.claim({})
    write(again, "d")
    assert texts(tail.read()) == ["d"]


def test_a_journal_replaced_between_readings_begins_anew(run):
    """The removal itself need not be seen."""
    run.claim({})
    write(run, "a", "b", "c")
    tail = JournalTail(run.root)
    tail.read()
    remove_tree(run.root)
    again = RunDirectory(run.root)
    again.claim({})
    write(again, "d")
    news = tail.read()
    assert (news.begins_anew, texts(news)) == (True, ["d"])


def test_an_incomplete_line_is_read_when_it_is_complete(tmp_path):
    """A part of a line, as another host may see it, is neither skipped nor read twice."""
    path, tail = tmp_path / "events.jsonl", JournalTail(tmp_path)
    line = '{"event": "note", "text": "ü"}\n'.encode()
    cut = line.index("ü".encode()) + 1
    path.write_bytes(line + line[:cut])
    assert texts(tail.read()) == ["ü"]
    assert texts(tail.read()) == []
    path.write_bytes(line + line + b"no JSON\n")
    assert texts(tail.read()) == ["ü"]
