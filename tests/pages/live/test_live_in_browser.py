"""The live page in Chromium, beside a real run that fails, resumes and ends."""

import threading
from contextlib import contextmanager

import pytest
from chromium import CHROMIUM, browser
from pipeline import run, with_tokenizer, write_text

from orchestrator.pages.live import feed, live_server, url_of

OPTIONS = {
    "refinement": {"epochs": 3, "batches": 3, "learning_rate": 2e-4},
    "training": {"epochs": 2, "batches": 2, "every": 2, "learning_rate": 2e-4, "top_k": 24},
}
STAGED = {"refine": "blocks", "train": "all", "options": OPTIONS}


class Interrupted(Exception):
    """Failure that the test puts into a run."""


def at(stage, kind, action, **fields):
    """Callback that acts at the first event of a kind in a stage."""
    pending = [action]

    def on_event(event):
        wanted = {"event": kind, **({"stage": stage} if stage else {}), **fields}
        if pending and wanted.items() <= event.items():
            pending.pop()()

    return on_event


@contextmanager
def served(place, port=0):
    with live_server(place, "127.0.0.1", port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield url_of(server), server.server_address[1]
        server.shutdown()
        thread.join()


def check_widths_and_colours(page):
    """No view scrolls sideways, and the paper is light or dark as the browser asks for."""
    papers = set()
    for scheme in ("light", "dark"):
        page.use_colours(scheme)
        papers.add(page.value("getComputedStyle(document.body).backgroundColor"))
        for width in (400, 1100):
            page.resize(width)
            assert page.value("document.documentElement.scrollWidth") <= width
            assert page.value("innerWidth") == width
    assert len(papers) == 2


def cells(page, row, level):
    """Number of blocks of a level in a row of the map."""
    return page.value(
        f"[...document.querySelectorAll('#live-blocks rect.{level} title')]"
        f".filter((each) => each.textContent.includes(', {row}: ')).length"
    )


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_run_that_fails_resumes_and_ends(checkpoint, tmp_path, monkeypatch):
    """The page follows it without a reload: before its beginning, running, failed, resumed, and
    as its report; also over an interruption of the connection, and after a reload."""
    monkeypatch.setattr(feed, "DISK_SECONDS", 0.05)
    model = with_tokenizer(checkpoint("llama"), tmp_path / "<b>model")
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "out"
    with browser(tmp_path / "profile") as page:
        with served(tmp_path / "out.run") as (url, port):
            page.open(url)
            page.wait_for("document.title === 'new – out.run'")
            check_widths_and_colours(page)

            def look_and_fail():
                page.wait_for("document.title.startsWith('refine ')")
                page.wait_for("document.querySelectorAll('#live-blocks rect.done').length === 9")
                page.wait_for_text("<b>model, compressed with svd-llm, keep 0.5")
                assert page.value("document.querySelector('.badge').textContent") == "running"
                assert [cells(page, row, "done") for row in ("calibrated", "decomposed")] == [4, 4]
                assert (cells(page, "refined", "done"), cells(page, "refined", "busy")) == (1, 0)
                assert page.value("document.querySelectorAll('#live-losses polyline').length") == 2
                check_widths_and_colours(page)
                raise Interrupted("the disk is <full>")

            fail = at("refine", "unit", look_and_fail, done=1)
            with pytest.raises(Interrupted):
                run(model, out, text, on_event=fail, **STAGED)
            page.wait_for("document.title === 'failed – out'")
            page.wait_for_text("Failed with exit code 1, in stage refine.", "the disk is <full>")
            check_widths_and_colours(page)
            page.reload()
            page.wait_for_text("the disk is <full>", "Report of its results so far")
            assert page.complaints == []
        page.wait_for("!document.querySelector('.cut').hidden")
        with served(tmp_path / "out.run", port):
            page.wait_for("document.querySelector('.cut').hidden")
            assert all("ERR_" in each for each in page.complaints)
            page.complaints.clear()

            def look():
                page.wait_for("document.title.startsWith('train ')")
                page.wait_for("document.querySelectorAll('#live-losses figure').length === 3")
                assert cells(page, "decomposed", "earlier") == 4
                assert (cells(page, "refined", "earlier"), cells(page, "refined", "done")) == (1, 3)
                page.wait_for_text("Runs", "failed, exit code 1", "tokens per second")
                check_widths_and_colours(page)

            resumed = at(None, "snapshot", look, step=2)
            result = run(model, out, text, on_event=resumed, **STAGED)
            page.wait_for("location.pathname === '/report'")
            page.wait_for_text(str(result.out), "Every linear")
            check_widths_and_colours(page)
            page.open(url)
            page.wait_for("location.pathname === '/report'")
            assert page.complaints == []
