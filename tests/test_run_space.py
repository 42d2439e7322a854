"""What lies in a run directory: chunks by segments, dropped when spent, and what `plan` says."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline import contents, run, write_llama, write_text

from orchestrator.cluster.curvature_worker import CurvatureWorker
from orchestrator.errors import StoppedError
from orchestrator.forecast import storage
from orchestrator.shards import cut_segments


@given(shards=st.integers(1, 60), workers=st.integers(1, 12), data=st.data())
def test_segments_hold_every_shard_once_and_waves_are_full(shards, workers, data):
    """All but the first are a multiple of the workers, and the last one is never the smaller."""
    count = data.draw(st.integers(1, 12))
    segments = cut_segments(shards, workers, count)
    assert [shard for segment in segments for shard in segment] == list(range(shards))
    assert all(len(segment) % workers == 0 for segment in segments[1:])
    assert len(segments) <= count
    assert len(segments[-1]) == max(map(len, segments))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama8") / "dense", blocks=8)


@pytest.fixture(scope="module")
def reference(llama, text, tmp_path_factory):
    """The result in one shard, without a boundary."""
    out = tmp_path_factory.mktemp("reference") / "out"
    run(llama, out, text, method="two-sided", shards=1)
    return contents(out)


@pytest.fixture
def segmented(monkeypatch):
    """Has gradients pass back in two segments, whatever room there is."""
    halves = property(lambda self: cut_segments(self.shards, self.workers, 2))
    monkeypatch.setattr(storage.Storage, "segments", halves)


@pytest.fixture
def passed(monkeypatch):
    """Counts the chunks that pass each shard forward for the boundaries alone."""
    counts, step = [], CurvatureWorker.step

    def count(worker, index, emit, record):
        if not worker._is_backward:
            counts.append(worker._shard.blocks.start)
        return step(worker, index, emit, record)

    monkeypatch.setattr(CurvatureWorker, "step", count)
    return counts


def boundaries(run_dir: Path) -> list[int]:
    """How many boundaries of each pass have chunks, the pass with most of them last."""
    passes = (run_dir / "chunks").iterdir() if (run_dir / "chunks").exists() else ()
    return sorted(
        sum(any(boundary.iterdir()) for boundary in each.iterdir() if boundary.exists())
        for each in passes
    )


def test_segments_change_no_bit_and_hold_less(llama, text, reference, segmented, passed, tmp_path):
    """Four boundaries at most, where one segment has seven; three shards pass chunks twice."""
    most = []

    def look(event):
        if event["event"] == "unit" and event["stage"] == "calibrate":
            most.append(max(boundaries(tmp_path / "out.run"), default=0))

    run(llama, tmp_path / "out", text, method="two-sided", shards=8, on_event=look)
    assert contents(tmp_path / "out") == reference
    assert max(most) <= 4
    assert not [path for path in (tmp_path / "out.run" / "chunks").rglob("*") if path.is_file()]
    # the first pass ends before the last shard, the second before the last one of its segment
    assert len(passed) == 6 * (7 + 3)


@pytest.mark.parametrize(("units", "shards"), [(1, 8), (4, 8), (6, 8), (3, 4)])
def test_a_stopped_run_passes_no_chunk_again(
    units, shards, llama, text, reference, segmented, passed, tmp_path
):
    """Wherever it stops, what lies at the boundaries is gone on from; another cut is another run's.

    Blocks are made once in either case.
    """

    def stop(event):
        if event["event"] == "unit" and event["done"] == units:
            raise StoppedError("enough")

    with pytest.raises(StoppedError):
        run(llama, tmp_path / "out", text, method="two-sided", shards=8, on_event=stop)
    events = []
    fields = {"method": "two-sided", "shards": shards, "on_event": events.append}
    run(llama, tmp_path / "out", text, **fields)
    assert contents(tmp_path / "out") == reference
    made = [e for e in events if e["event"] == "unit" and e["stage"] == "calibrate"]
    assert len(made) == 8 - units
    if shards == 8:
        assert len(passed) == 6 * (7 + 3)
    assert not [path for path in (tmp_path / "out.run" / "chunks").rglob("*") if path.is_file()]


def test_a_chunk_that_vanishes_from_a_spent_boundary_is_made_again(
    llama, text, reference, segmented, tmp_path
):
    """Gradients behind a segment that is done are lost: it goes back through that segment again."""
    vanished = []

    def vanish(event):
        if event["event"] == "unit" and event["stage"] == "calibrate" and event["done"] == 4:
            vanished.extend((tmp_path / "out.run" / "chunks").rglob("00004/0000003.safetensors"))
            for chunk in vanished:
                chunk.unlink()

    events = []

    def look(event):
        events.append(event)
        vanish(event)

    run(llama, tmp_path / "out", text, method="two-sided", shards=8, on_event=look)
    assert vanished
    assert contents(tmp_path / "out") == reference
    made = [e["unit"] for e in events if e["event"] == "unit" and e["stage"] == "calibrate"]
    assert sorted(made) == [f"block {block}" for block in range(8)]
