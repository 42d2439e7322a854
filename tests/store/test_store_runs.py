"""Whole runs with run directory and output in an object store: the bytes of a local run."""

import json
import random

import pytest
import torch
from drivers import Driver, is_unit, units
from faulty_proxy import faulty_proxy
from object_store import BUCKET, remote
from pipeline import contents, run, write_llama, write_text

import orchestrator
from orchestrator import evaluate
from orchestrator.cli.main import main
from orchestrator.events import JOURNAL_ONLY
from orchestrator.store.cache import process_cache
from orchestrator.store.run import RunDirectory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", blocks=4)


@pytest.fixture(scope="module")
def reference(llama, text, tmp_path_factory):
    """Files of a run on local disk, several of them."""
    out = tmp_path_factory.mktemp("reference") / "out"
    run(llama, out, text, **SEVERAL)
    return contents(out)


SEVERAL = {"max_shard_size": "200KB"}
TOKENS = torch.arange(2, 34)[None] * 5 % 96


def nothing_is_left(s3, prefix):
    """Assert that no chunk, probe or lease is left in the store."""
    names = [*s3.objects(f"{prefix}.run"), *s3.objects(prefix)]
    return not any("chunks/" in name or "probe" in name or "hold" in name for name in names)


@pytest.fixture(scope="module")
def stored(s3, llama):
    """The model in the store, with a file beside it that is not part of a model."""
    for path in llama.iterdir():
        s3.write(f"models/dense/{path.name}", path.read_bytes())
    s3.write("models/dense/optimizer.bin", b"x" * 1000)
    return "models/dense"


def test_a_model_in_a_store_is_read_there(s3, stored, llama, text, reference, tmp_path, capsys):
    """The bytes equal those for a local model, read by ranges without a copy of the weights;
    planning and evaluation work from there too."""
    uri = s3.uri(stored)
    result = run(uri, tmp_path / "out", text, shards=2, **SEVERAL)
    assert named(contents(result.out), uri) == named(reference, uri)
    (small,) = process_cache()._directory.glob("*-model")
    kept = {path.name for path in small.iterdir()}
    assert {"config.json", "tokenizer.json"} <= kept
    assert not any(name.endswith((".safetensors", ".bin")) for name in kept)
    assert main(["plan", uri, "--keep=0.5"]) == 0
    assert "llama" in capsys.readouterr().out
    options = {"text": str(text), "samples": 2, "sequence_length": 32, "executor": "local"}
    found = evaluate(uri, run_dir=tmp_path / "remote", **options)["models"]["model"]
    local = evaluate(llama, run_dir=tmp_path / "local", **options)["models"]["model"]
    assert (found["perplexity"], found["bytes"]) == (local["perplexity"], local["bytes"])


def named(files, model):
    """Files of a run whose recipe names the model like this; of any key."""
    local = files["orchestrator_report.json"]["recipe"]["model"]
    report = json.dumps(files["orchestrator_report.json"]).replace(local, model)
    recipe = files["recipe.toml"].decode().replace(local, model).encode()
    report = json.loads(report) | {"key": None}
    del report["files"]["recipe.toml"]
    config = json.loads(files["config.json"])
    del config["quantization_config"]["report_blake2b"]
    same = {"recipe.toml": recipe, "orchestrator_report.json": report, "config.json": config}
    return files | same


def test_no_model_in_a_store_is_said(s3, text, tmp_path, capsys):
    """A missing model exits with 4, a missing bucket with 2, with one message."""
    flags = ["--keep=0.5", "--executor=local", f"--calibration={text}"]
    out = str(tmp_path / "out")
    assert main(["compress", s3.uri("models/none"), out, *flags]) == 4
    assert "no files found" in capsys.readouterr().err
    assert main(["compress", s3.uri("models/none", bucket="none"), out, *flags]) in (2, 4)
    assert main(["compress", "ftp://x/y", out, *flags]) == 2


@pytest.mark.chaos
def test_a_run_in_a_store_is_the_local_one(s3, llama, text, reference, tmp_path, capsys):
    """The bytes are those of a local run; a repeated command has no work; the download loads."""
    uri = s3.uri("runs/local/out")
    events = []
    result = run(llama, uri, text, shards=2, on_event=events.append, **SEVERAL)
    directory = s3.download("runs/local/out", tmp_path / "out")
    assert contents(directory) == reference
    assert nothing_is_left(s3, "runs/local/out")
    assert str(result.out) == uri
    loaded = orchestrator.load(directory)
    assert torch.isfinite(loaded(input_ids=TOKENS).logits).all()
    # no copy stays on this machine
    assert process_cache().bytes <= sum(map(len, s3.objects("runs/local/out.run").values()))

    journal = list(RunDirectory(result.run_dir).events())
    # progress is written less often than it is passed on
    kept = [event for event in journal if event["event"] not in (*JOURNAL_ONLY, "progress")]
    told = [event for event in events if event["event"] != "progress"]
    assert [{n: v for n, v in e.items() if n != "time"} for e in kept] == json.loads(
        json.dumps(told)
    )
    assert main(["status", str(result.run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "done"
    page = tmp_path / "report.html"
    assert main(["report", str(result.run_dir), "--output", str(page)]) == 0
    assert "model.layers.3" in page.read_text()
    again = run(llama, uri, text, **SEVERAL)
    assert again.report == result.report

    name = next(n for n in s3.objects("runs/local/out.run/units") if n.endswith("safetensors"))
    name = f"runs/local/out.run/units/{name}"
    content = bytearray(s3.read(f"{BUCKET}/{name}"))
    content[-1] ^= 1
    s3.write(name, bytes(content))
    s3.system.delete_dir(f"{BUCKET}/runs/local/out")
    events.clear()
    run(llama, uri, text, on_event=events.append, **SEVERAL)
    assert contents(s3.download("runs/local/out", tmp_path / "repaired")) == reference
    assert sum(event["event"] == "damaged" for event in events) >= 1
    assert main(["clean", str(result.run_dir)]) == 0
    assert s3.objects("runs/local/out.run") == {}


@pytest.mark.ray
@pytest.mark.chaos
def test_actors_share_a_store(s3, llama, text, reference, tmp_path, ray_address):
    """Two actors and a driver that share only the store give the same bytes."""
    fields = {"executor": "ray", "workers": 2, "shards": 4}
    run(llama, s3.uri("runs/ray/out"), text, **fields, **SEVERAL)
    assert contents(s3.download("runs/ray/out", tmp_path / "out")) == reference
    assert nothing_is_left(s3, "runs/ray/out")


@pytest.mark.chaos
def test_a_killed_driver_is_resumed_from_a_store(s3, llama, text, reference, tmp_path):
    """After SIGKILL the same command does only uncommitted work; the bytes are the same."""
    uri = s3.uri("runs/killed/out")
    driver = Driver(llama, uri, text, "--executor", "local", "--max-shard-size", "200KB")
    assert driver.until(is_unit(2))
    driver.kill()
    assert driver.run.status()["state"] == "lost"
    events = []
    run(llama, uri, text, on_event=events.append, **SEVERAL)
    assert units(events) <= 4 - 2
    assert contents(s3.download("runs/killed/out", tmp_path / "out")) == reference
    assert nothing_is_left(s3, "runs/killed/out")


@pytest.mark.chaos
def test_a_store_that_fails_now_and_then_changes_no_byte(s3, llama, text, reference, tmp_path):
    """One request in fifty is cut off and repeated; the bytes are the same."""
    rng = random.Random(0)
    with faulty_proxy(s3.port) as proxy:
        proxy.is_cut = lambda piece: rng.random() < 0.02
        run(llama, s3.uri("runs/cut/out", port=proxy.port), text, shards=2, **SEVERAL)
    assert proxy.cuts > 5
    assert contents(s3.download("runs/cut/out", tmp_path / "out")) == reference


@pytest.mark.chaos
def test_an_evaluation_in_a_store(s3, llama, text, tmp_path):
    """The run directory of an evaluation may be in a store; a repeated call reads the report."""
    fields = {"text": str(text), "samples": 3, "sequence_length": 48, "executor": "local"}
    place = s3.uri("runs/evaluation")
    first = evaluate(llama, run_dir=place, **fields)
    alone = evaluate(llama, run_dir=tmp_path / "alone", **fields)
    assert first["models"]["model"]["perplexity"] == alone["models"]["model"]["perplexity"]
    assert evaluate(llama, run_dir=place, **fields) == first
    assert "manifest.json" in " ".join(s3.objects(remote(place).inner))


def test_a_search_stays_on_local_disk(s3, llama, text, capsys):
    """Search candidates are evaluated where they are written, so an output in a store is
    refused."""
    places = [str(llama), s3.uri("runs/search")]
    texts = ["--calibration", str(text), "--text", str(llama / "other.txt")]
    flags = ["--keep", "0.5", "--vary", "storage=plain,pivoted", "--executor", "local"]
    assert main(["search", *places, *texts, *flags]) == 2
    assert "is not on local disk" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "code", "says"),
    [
        ("ftp://host/out", 2, "ftp:// is not supported"),
        ("s3://key:secret@bucket/out", 2, "a secret in a URI"),
        ("nowhere", 2, "s3://nowhere does not exist"),
        ("denied", 2, "denies access"),
        ("s3://bucket/out?wrong=1", 2, "Unexpected query parameter"),
    ],
)
def test_a_place_that_cannot_be_used(out, code, says, s3, llama, text, capsys):
    """An unusable place is reported before any computation."""
    with faulty_proxy(s3.port) as proxy:
        proxy.answer = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
        if out == "nowhere":
            out = s3.uri("out", bucket="nowhere")
        elif out == "denied":
            out = s3.uri("out", port=proxy.port)
        arguments = ["compress", str(llama), out, "--calibration", str(text), "--keep", "0.5"]
        assert main([*arguments, "--executor", "local"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert "secret@" not in line
