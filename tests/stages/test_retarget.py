"""Several sizes from one calibration: the bytes of separate runs, with no repeated work."""

import json

import pytest
from pipeline import contents, run, write_text

from orchestrator import Recipe, compress_sizes, evaluate, retarget, status
from orchestrator.cli.main import main
from orchestrator.errors import InputError, UsageError

STAGES = ["survey", "read", "calibrate", "verify", "allocate", "write"]


METHODS = {
    "svd-llm": {},
    "fast": {"method": "two-sided", "storage": "pivoted"},
    "shared": {"method": "d-rank"},
    "masks": {"method": "cap", "options": {"cap": {"iterations": 2, "samples": 2, "chunks": 2}}},
    "refined": {
        "method": "two-sided",
        "refine": "blocks",
        "options": {"refinement": {"epochs": 1}},
    },
}


@pytest.mark.parametrize("name", METHODS)
def test_another_size_has_the_bytes_of_a_run_of_its_own(name, llama, llama2, text, tmp_path):
    """Without the text; all decompositions are those of the first run."""
    copy = write_text(tmp_path / "text.txt")
    fields, events = METHODS[name] | {"shards": 2}, []
    model = llama if name == "shared" else llama2  # two shards need two groups of blocks
    run(model, tmp_path / "first", copy, keep=0.8, **fields)
    copy.unlink()
    result = retarget(
        tmp_path / "first.run", tmp_path / "cut", keep=0.6, executor="local", on_event=events.append
    )
    copy.write_bytes(text.read_bytes())
    run(model, tmp_path / "alone", copy, keep=0.6, **fields)
    assert contents(result.out) == contents(tmp_path / "alone")
    stages = [each["stage"] for each in events if each["event"] == "stage"]
    assert set(STAGES) <= set(stages)
    assert not [e for e in events if e["event"] == "unit" and e["stage"] == "calibrate"]


def test_several_sizes_are_cut_from_one_run(llama, text, tmp_path):
    """Each in a directory named by its size, all from one run directory."""
    recipe = Recipe(
        model=str(llama),
        out=str(tmp_path / "out"),
        method="svd-llm",
        keep=0.8,
        calibration=str(text),
        samples=6,
        sequence_length=48,
        executor="local",
    )
    events = []
    results = compress_sizes(recipe, [0.8, 0.6, 0.5], events.append)
    assert [each.out.name for each in results] == ["out-0.8", "out-0.6", "out-0.5"]
    listed = status(results[0].run_dir)["outputs"]
    assert [each["out"] for each in listed] == [str(each.out) for each in results]
    assert [each["kept"] for each in listed] == [0.8, 0.6, 0.5]
    assert {each.run_dir for each in results} == {tmp_path / "out.run"}
    decomposed = [e for e in events if e["event"] == "unit" and e["stage"] == "calibrate"]
    assert len(decomposed) == 4
    run(llama, tmp_path / "alone", text, keep=0.5)
    assert contents(results[-1].out) == contents(tmp_path / "alone")
    with pytest.raises(UsageError, match=r"keep: 0\.5, 0\.5 contains a size twice"):
        compress_sizes(recipe, [0.5, 0.5])


def test_the_command_line_takes_several_sizes(llama, text, tmp_path, capsys):
    """`--keep 0.8,0.6`, and `retarget` after it; a run that never read its text has no tokens."""
    flags = ["--samples=6", "--sequence-length=48", "--executor=local", f"--calibration={text}"]
    out, cut = str(tmp_path / "out"), str(tmp_path / "cut")
    assert main(["compress", str(llama), out, "--keep", "0.8,0.6", *flags, "--json"]) == 0
    kept = [report["kept"]["asked"] for report in json.loads(capsys.readouterr().out)]
    assert kept == [0.8, 0.6]
    run_dir = f"{out}.run"
    assert main(["retarget", run_dir, cut, "--keep-bytes", "0.5", "--executor=local"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("kept fraction of the targeted linears, in bytes")
    assert first.endswith(" (requested 0.5)")
    inside = f"{run_dir}/cut"
    assert main(["retarget", run_dir, inside, "--keep", "0.5", "--executor=local"]) == 2
    assert f"{inside} lies in the run directory {run_dir}" in capsys.readouterr().err
    several = ["retarget", run_dir, cut, "--executor=local"]
    assert main([*several, "--keep-bytes", "0.5,0.4", "--json"]) == 0
    kept = [report["kept"] for report in json.loads(capsys.readouterr().out)]
    assert [(each["asked"], each["asked_of"]) for each in kept] == [(0.5, "bytes"), (0.4, "bytes")]
    assert contents(tmp_path / "cut-0.5") == contents(tmp_path / "cut")
    assert main([*several, "--keep", "0.5,1.5"]) == 2
    assert "keep is 1.5" in capsys.readouterr().err


def test_an_unfinished_output_of_another_size_is_not_damaged(llama2, text, tmp_path):
    """Files that it has left are written anew, without a report of damage."""
    run(llama2, tmp_path / "out", text)
    run_dir, events = str(tmp_path / "out.run"), []

    def stop(event):
        if (event["event"], event.get("stage")) == ("unit", "write"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retarget(run_dir, tmp_path / "cut", keep=0.6, executor="local", on_event=stop)
    assert (tmp_path / "cut" / "model.safetensors").exists()
    retarget(run_dir, tmp_path / "cut", keep=0.5, executor="local", on_event=events.append)
    assert not [event for event in events if "damaged" in str(event)]
    assert contents(tmp_path / "cut") == contents(tmp_path / "out")


def test_a_size_that_was_written_elsewhere_is_not_damaged(llama2, text, tmp_path):
    """Its files are written again, to the new directory, without a report of damage."""
    first, events = run(llama2, tmp_path / "out", text), []
    second = retarget(
        first.run_dir, tmp_path / "cut", keep=0.5, executor="local", on_event=events.append
    )
    assert contents(second.out) == contents(first.out)
    assert not [event for event in events if event["event"] == "damaged"]


def test_options_of_an_earlier_version_are_no_obstacle(llama2, text, tmp_path):
    """It recorded options without effect; they are left out, and refused only if given anew."""
    run(llama2, tmp_path / "out", text, keep=0.8)
    marker = tmp_path / "out.run" / "run.json"
    said = json.loads(marker.read_text())
    del said["compressed"]
    said["recipe"]["options"] = {"mgaa": {"t": 0.5}, "training": {"epochs": 3}}
    marker.write_text(json.dumps(said))
    with pytest.raises(UsageError, match=r"option mgaa\.t has no effect"):
        retarget(
            tmp_path / "out.run",
            tmp_path / "cut",
            keep=0.6,
            executor="local",
            options={"mgaa": {"t": 0.5}},
        )
    cut = retarget(tmp_path / "out.run", tmp_path / "cut", keep=0.6, executor="local")
    assert cut.report["recipe"]["options"] == {}


def test_a_size_changes_the_recipe_of_no_later_one(llama2, text, tmp_path):
    """Neither its allocation nor its options; those that are not named stay as they are, and are
    left out where they have no effect."""
    options = {"grasp": {"blocks": 2, "importance": "gradient"}}
    first = run(llama2, tmp_path / "out", text, method="grasp", keep=0.8, options=options)
    changed = {"allocation": "threshold", "options": {"grasp": {"importance": "taylor"}}}
    local = {"keep": 0.8, "executor": "local"}
    cut = retarget(first.run_dir, tmp_path / "cut", **local, **changed)
    recipe = cut.report["recipe"]
    assert recipe["allocation"] == "threshold"
    assert recipe["options"] == {"grasp": {"importance": "taylor"}}
    again = retarget(first.run_dir, tmp_path / "again", **local)
    assert again.report["recipe"]["options"] == options
    assert contents(again.out) == contents(first.out)


@pytest.mark.parametrize("damage", ["tokens", "marker"])
def test_a_run_without_tokens_is_refused(damage, llama2, text, tmp_path):
    """One line names what to give instead."""
    run(llama2, tmp_path / "out", text)
    run_dir = tmp_path / "out.run"
    if damage == "tokens":
        (tokens,) = run_dir.rglob("tokens.safetensors")
        tokens.write_bytes(tokens.read_bytes()[:-1] + b"?")
        says = "the tokens of its calibration are missing or damaged"
    else:
        marker = json.loads((run_dir / "run.json").read_text())
        del marker["tokens_key"]
        (run_dir / "run.json").write_text(json.dumps(marker))
        says = "no compression has read its text here"
    with pytest.raises(InputError, match=says):
        retarget(run_dir, tmp_path / "cut", keep=0.7)


def test_a_refused_run_leaves_the_description_and_the_status_of_the_one_before(
    llama, text, tmp_path, monkeypatch, capsys
):
    """At survey, text, output and memory of a worker; a run that begins replaces them."""
    out = str(tmp_path / "out")
    run(llama, tmp_path / "out", text, keep=0.8)
    marker, ended = (tmp_path / "out.run" / name for name in ("run.json", "status.json"))
    written = marker.read_bytes(), ended.read_bytes()
    flags = ["--method=svd-llm", "--samples=6", "--sequence-length=48", "--executor=local"]
    again = ["compress", str(llama), f"{out}-2", f"--run-dir={out}.run", *flags]
    assert main([*again, "--keep=0.0001", f"--calibration={text}"]) == 3
    assert main([*again, "--keep=0.7", f"--calibration={tmp_path}/no.txt"]) == 4
    with monkeypatch.context() as small:
        small.setattr("orchestrator.stages.admission.host_bytes", lambda: 100_000)
        assert main([*again, "--keep=0.7", f"--calibration={text}"]) == 3
    assert main(["retarget", f"{out}.run", out, "--keep=0.65", "--executor=local"]) == 2
    assert (marker.read_bytes(), ended.read_bytes()) == written
    assert main(["retarget", f"{out}.run", f"{out}-3", "--keep=0.7", "--executor=local"]) == 0
    assert json.loads(marker.read_text())["recipe"]["keep"] == 0.7
    assert json.loads(ended.read_text())["out"] == f"{out}-3"
    capsys.readouterr()


def test_a_refused_evaluation_leaves_the_files_of_the_one_before(llama, text, tmp_path):
    """A text that cannot be read is known after the models."""
    asked = {"samples": 2, "sequence_length": 48, "run_dir": tmp_path / "run", "executor": "local"}
    evaluate(llama, text=str(text), **asked)
    files = [tmp_path / "run" / name for name in ("run.json", "status.json")]
    written = [file.read_bytes() for file in files]
    with pytest.raises(InputError, match=r"no\.txt"):
        evaluate(llama, text=str(tmp_path / "no.txt"), **asked)
    assert [file.read_bytes() for file in files] == written
