"""Content of a run directory: chunks by segments, spent units, and the forecast of `plan`."""

from pathlib import Path

import pytest
from drivers import wait_for
from hypothesis import given
from hypothesis import strategies as st
from large_models import CONFIGS
from pipeline import contents, run

from orchestrator.errors import StoppedError
from orchestrator.forecast import storage
from orchestrator.forecast.forecast import costs_of, forecast
from orchestrator.forecast.outcome import Resources
from orchestrator.forecast.rates import Machine
from orchestrator.forecast.room import Room
from orchestrator.forecast.shapes import from_config
from orchestrator.forecast.stage_cost import Setting
from orchestrator.forecast.text import lines
from orchestrator.plan.cut import cut_segments
from orchestrator.recipe.recipe import Recipe
from orchestrator.resolve import resolve
from orchestrator.stages.context.worker.compress_worker import CompressionWorker
from orchestrator.stages.context.worker.curvature_worker import GradientPass
from orchestrator.stages.pivot.spec import Pivot


@given(shards=st.integers(1, 60), workers=st.integers(1, 12), data=st.data())
def test_segments_hold_every_shard_once_and_waves_are_full(shards, workers, data):
    """All segments except the first have a multiple of the workers; the last is never smaller."""
    count = data.draw(st.integers(1, 12))
    segments = cut_segments(shards, workers, count)
    assert [shard for segment in segments for shard in segment] == list(range(shards))
    assert all(len(segment) % workers == 0 for segment in segments[1:])
    assert len(segments) <= count
    assert len(segments[-1]) == max(map(len, segments))


@pytest.mark.parametrize(("preset", "times"), [("fast", 2.5), ("best", 4.0)])
def test_the_run_directory_of_a_large_model(preset, times):
    """For 70B, 8 workers and 256 x 2048 tokens it is within the bound; `plan` lists its parts."""
    shapes = from_config(CONFIGS["Llama-3-70B"] | {"dtype": "bfloat16"}, "test")
    machine = Machine("test", None, ())
    resources = Resources(workers=8, machine=machine, memory_bytes=80e9)
    found = forecast(shapes, Recipe.preset(preset, model="m", out="o", keep=0.8), resources)
    assert found.run_bytes <= times * found.model["bytes"]
    assert list(found.run) == [stage.name for stage in found.stages]
    (line,) = [line for line in lines(found) if line.startswith("run directory")]
    assert all(part in line for part in found.run[found.run_peak].parts)
    (line,) = [line for line in lines(found) if line.startswith("resuming")]
    assert ("segment" in line) == (found.segments > 1) == (preset == "fast")
    assert ("all steps" in line) == (not found.keeps_states) == (preset == "best")


def test_segments_are_as_few_as_there_is_room_for(monkeypatch):
    """Fewer segments need more than the room; without room the smallest size is chosen."""
    shapes = from_config(CONFIGS["Llama-3-70B"] | {"dtype": "bfloat16"}, "test")
    recipe = Recipe.preset("fast", model="m", out="o", keep=0.8)

    def of(room):
        monkeypatch.setattr(storage, "ROOM", room)
        about = {
            "costs": costs_of(shapes, resolve(recipe)),
            "room": Room(None, is_gpu=False),
            "rates": (),
        }
        setting = Setting(**about, workers=4, shards=40)
        return storage.Storage(setting, {"pivot": Pivot().cost(setting)})

    sizes = [
        of(2.5)._calibrating(cut_segments(40, 4, count)).total / (2 * shapes.total_values)
        for count in range(1, 11)
    ]
    later = of(2.5).stages["pivot"].total / (2 * shapes.total_values)
    for room in (0.0, 2.2, 2.3, 2.5, 3.0):
        count, most = len(of(room).segments), max(room, later, min(sizes))
        assert sizes[count - 1] <= most
        assert all(size > most for size in sizes[: count - 1])


@pytest.fixture(scope="module")
def reference(llama, text, tmp_path_factory):
    """Result in one shard, without a boundary."""
    out = tmp_path_factory.mktemp("reference") / "out"
    run(llama, out, text, method="two-sided", shards=1)
    return contents(out)


@pytest.fixture
def segmented(monkeypatch):
    """Make gradients pass back in two segments, with any room."""
    halves = property(lambda self: cut_segments(self.setting.shards, self.setting.workers, 2))
    monkeypatch.setattr(storage.Storage, "segments", halves)


@pytest.fixture
def passed(monkeypatch):
    """Count the forward passes of chunks through each shard made only for the boundaries."""
    counts, step = [], CompressionWorker.step

    def count(worker, index, emit, record):
        if not isinstance(worker.open_pass, GradientPass):
            counts.append(worker.open_pass.opened.blocks.start)
        return step(worker, index, emit, record)

    monkeypatch.setattr(CompressionWorker, "step", count)
    return counts


def boundaries(run_dir: Path) -> list[int]:
    """Numbers of boundaries with chunks by pass, ascending."""
    passes = (run_dir / "chunks").iterdir() if (run_dir / "chunks").exists() else ()
    return sorted(
        sum(any(boundary.iterdir()) for boundary in each.iterdir() if boundary.exists())
        for each in passes
    )


def test_segments_change_no_bit_and_hold_less(llama, text, reference, segmented, passed, tmp_path):
    """At most four boundaries have chunks, seven with one segment; three shards pass twice."""
    most = []

    def look(event):
        if event["event"] == "unit" and event["stage"] == "calibrate":
            most.append(max(boundaries(tmp_path / "out.run"), default=0))

    run(llama, tmp_path / "out", text, method="two-sided", shards=8, on_event=look)
    assert contents(tmp_path / "out") == reference
    assert max(most) <= 4
    assert not [path for path in (tmp_path / "out.run" / "chunks").rglob("*") if path.is_file()]
    # the first pass ends before the last shard, the second before the last shard of its segment
    assert len(passed) == 6 * (7 + 3)


@pytest.mark.parametrize(("units", "shards"), [(1, 8), (4, 8), (6, 8), (3, 4)])
def test_a_stopped_run_passes_no_chunk_again(
    units, shards, llama, text, reference, segmented, passed, tmp_path
):
    """Stopped anywhere, it continues from the chunks at boundaries, unless the cut changes. Blocks
    are made once in either case."""

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
    """If gradients after a finished segment are lost, that segment is passed again."""
    vanished = []

    def vanish(event):
        if event["event"] == "unit" and event["stage"] == "calibrate" and event["done"] == 4:
            # files of chunks are written beside the next computation
            chunks = (tmp_path / "out.run" / "chunks").rglob
            assert wait_for(lambda: list(chunks("00004/0000003.safetensors")))
            vanished.extend(chunks("00004/0000003.safetensors"))
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
