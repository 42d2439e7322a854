"""`ray job submit` on a real head with its dashboard, which lets in only who has the token."""

import re
import sys

import pytest
from dashboard import TOKEN, answer, events
from drivers import SMALL, start, units, wait_for
from pipeline import contents, run, write_llama, write_text

from orchestrator.store.run import RunDirectory

pytestmark = pytest.mark.jobs


@pytest.fixture(scope="module")
def client(dashboard):
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(dashboard, headers={"Authorization": f"Bearer {TOKEN}"})


def ray_job(command, address, *arguments):
    """The command line `ray job`, as in the README."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    flags = ["job", command, f"--address={address}", *arguments]
    return start("-m", "ray.scripts.scripts", *flags, env=variables)


def test_who_has_no_token_is_not_let_in(dashboard):
    """The dashboard of these tests is one that asks for a token."""
    assert answer(dashboard, TOKEN) == 200
    assert answer(dashboard, "") == 401
    assert answer(dashboard, "wrong" * 8) == 403


def test_submit_follow_stop_and_resume(dashboard, client, tree, tmp_path):
    """A stopped job ends in the time that Ray gives; the next does the rest, to the same bytes.

    Logs are plain lines; the driver's exit code is in the run directory, where Ray flattens it.
    """
    text = write_text(tmp_path / "text.txt")
    model = write_llama(tmp_path / "dense", hidden=256)
    directory = RunDirectory(tmp_path / "out.run")
    command = [sys.executable, "-m", "orchestrator", "compress", model, tmp_path / "out"]
    command += [*SMALL, "--calibration", text, "--workers", "2", "--shards", "5"]
    entrypoint = ["--", *map(str, command)]
    submit = ["--working-dir", str(tree), "--submission-id"]
    first = ray_job("submit", dashboard, *submit, "first", "--no-wait", *entrypoint)
    output, error = first.communicate()
    assert first.returncode == 0, error
    assert wait_for(lambda: done(directory) >= 3), client.get_job_logs("first")
    client.stop_job("first")
    assert wait_for(lambda: client.get_job_status("first").is_terminal())
    assert client.get_job_status("first") == "STOPPED"
    # Ray kills what has not ended three seconds after SIGTERM, which would leave it "running"
    assert directory.status()["state"] == "stopped"
    assert directory.status()["exit_code"] == 75
    told = done(directory)
    logs = client.get_job_logs("first")
    assert "stopped by SIGTERM" in logs
    assert "Traceback" not in logs

    second = ray_job("submit", dashboard, *submit, "second", *entrypoint)
    output, error = second.communicate()
    assert second.returncode == 0, output + error
    (committed,) = re.findall(r"(\d+) of 10 blocks are committed already", output)
    assert client.get_job_info("second").driver_exit_code == 0
    for job in ("first", "second"):
        logs = client.get_job_logs(job)
        assert "\x1b" not in logs
        assert "\r" not in logs
        assert "calibrate" in logs

    # what two workers had under way, they may have committed when nobody listened any more
    assert told <= int(committed) <= told + 2
    assert done(directory) - told == 10 - int(committed)
    run(model, tmp_path / "local", text)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def done(directory):
    """Blocks that a run has committed so far."""
    return units(events(directory)) if (directory.root / "events.jsonl").exists() else 0


def test_a_script_that_is_a_job(dashboard, client, tree, tmp_path):
    """`compress` called by a job's own script uses the job's cluster and working directory."""
    text = write_text(tmp_path / "text.txt")
    model = write_llama(tmp_path / "dense", blocks=2)
    (tree / "script.py").write_text(
        "import sys\n"
        "import ray\n"
        "from orchestrator import Recipe, compress\n"
        "model, out, text = sys.argv[1:]\n"
        "ray.init()\n"
        "small = {'keep': 0.5, 'samples': 6, 'sequence_length': 48, 'workers': 2}\n"
        "small['method'] = 'svd-llm'\n"
        "result = compress(Recipe(model=model, out=out, calibration=text, **small))\n"
        "print('wrote', result.out, 'and Ray is up:', ray.is_initialized())\n"
    )
    command = [sys.executable, "script.py", model, tmp_path / "out", text]
    client.submit_job(
        entrypoint=" ".join(map(str, command)),
        submission_id="script",
        runtime_env={"working_dir": str(tree), "py_modules": [str(tree / "orchestrator")]},
    )
    assert wait_for(lambda: client.get_job_status("script").is_terminal())
    logs = client.get_job_logs("script")
    assert client.get_job_status("script") == "SUCCEEDED", logs
    assert f"wrote {tmp_path / 'out'} and Ray is up: True" in logs
    run(model, tmp_path / "local", text)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
