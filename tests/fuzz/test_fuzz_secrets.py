"""Secrets in the environment do not appear in files or output of a run or submission."""

import json
import os
from functools import partial

import pytest
from dashboard import Head
from drivers import start
from pipeline import with_tokenizer, write_text

from orchestrator.cli.main import main

SECRETS = {
    "RAY_AUTH_TOKEN": "tok-0f1e2d3c4b5a69788796a5b4c3d2e1f0",
    "HF_TOKEN": "hf_SekretSekretSekretSekret",
    "AWS_ACCESS_KEY_ID": "AKIASEKRETSEKRET",
    "AWS_SECRET_ACCESS_KEY": "aws-SekretSekretSekretSekretSekret",
    "AWS_SESSION_TOKEN": "session-SekretSekretSekret",
}


def orchestrator(*arguments, code=0, forked=False, **variables):
    """Run a command with all secrets in its environment; returns its output."""
    command = ["-m", "orchestrator", *map(str, arguments)]
    process = start(*command, forked=forked, env=SECRETS | variables)
    output, error = process.communicate(timeout=300)
    assert process.returncode == code, error
    return (output + error).encode()


@pytest.fixture
def here(monkeypatch, capfdbinary):
    """Like `orchestrator`, in this process, which saves the imports of another one."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)

    def perform(*arguments, code=0):
        assert main([*map(str, arguments)]) == code
        return b"".join(capfdbinary.readouterr())

    return perform


def assert_none(said, root):
    """No secret is in the output, nor in any file below a directory, by name or content."""
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 20
    for content in [said, *(path.read_bytes() for path in files), *map(os.fsencode, files)]:
        for value in SECRETS.values():
            assert value.encode() not in content


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_run_reveals_no_secret(checkpoint, tmp_path, executor, here):
    """Files and output of compression, failure, evaluation, status, report and export."""
    model = with_tokenizer(checkpoint("llama"), tmp_path / "dense")
    text = write_text(tmp_path / "text.txt")
    small = ["--samples", "2", "--sequence-length", "32", "--executor", executor, "--verbose"]
    out, run = tmp_path / "out", tmp_path / "out.run"
    given = ["compress", model, out, "--method", "svd-llm", "--calibration", text, *small]
    begin = here if executor == "local" else partial(orchestrator, forked=True)
    said = begin(*given, "--keep", "0.5")
    said += here(*given[:2], tmp_path / "o2", *given[3:], "--keep", "0.001", code=3)
    if executor == "local":
        said += here("evaluate", out, "--against", model, "--text", text, *small)
        said += here("export", out, tmp_path / "export")
    said += here("status", run, "--json") + here("report", run)
    assert_none(said, tmp_path)


def test_a_submission_reveals_no_secret(tmp_path):
    """The job that the cluster shows to all users has no secret, nor has the output."""
    (tmp_path / "file").write_text("travels")
    head = Head(0, {"status": "SUCCEEDED", "driver_exit_code": 0})
    try:
        address = f"http://127.0.0.1:{head.server_address[1]}"
        asked = ["--address", address, "--working-dir", tmp_path, "--", "status", "/r"]
        said = orchestrator("submit", *asked, RAY_AUTH_MODE="token")
    finally:
        head.end()
    shown = said + json.dumps([head.asked, head.jobs]).encode()
    assert not any(value.encode() in shown for value in SECRETS.values())


@pytest.mark.parametrize("name", [*SECRETS, "AZURE_STORAGE_ACCOUNT_KEY", "WANDB_API_KEY"])
def test_a_secret_is_refused_as_a_variable_of_a_job(name, capsys):
    """Everyone who sees the job sees its variables: refused, and the value is not printed."""
    assert main(["submit", "--env", f"{name}=sekret", "--", "status", "/r"]) == 2
    said = capsys.readouterr().err
    assert f"{name} would be displayed" in said
    assert "sekret" not in said
