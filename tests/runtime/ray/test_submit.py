"""`orchestrator submit`: the policy alone, then on a head with a dashboard that runs no work."""

import os
import re
import signal
import time
from itertools import takewhile

import pytest
from dashboard import TOKEN, Head, events
from drivers import SMALL, start, units, wait_for
from hypothesis import given
from hypothesis import strategies as st
from pipeline import contents, run, write_llama, write_text

from orchestrator.cli.main import main
from orchestrator.runtime.ray.submit_policy import FINAL, End, State, seconds_to_next
from orchestrator.store.run import RunDirectory

ENDS = st.builds(
    End,
    state=st.sampled_from(State),
    driver_exit_code=st.none() | st.sampled_from([1, 2, 3, 4, 75, 126, 127, 137, -9, -15]),
)


@pytest.mark.parametrize("code", [1, 75, 137, 143, -9, None])
def test_what_may_pass_is_tried_again(code):
    """A driver that was killed, stopped, lost or at a loss has a successor."""
    assert seconds_to_next(End(State.FAILED, code), 1, 3) == 5
    assert seconds_to_next(End(State.LOST), 1, 3) == 5


@pytest.mark.parametrize("code", [2, 3, 4, 126, 127])
def test_what_is_asked_wrongly_is_not_tried_again(code):
    """Usage, an infeasible plan, bad input and a program that is not there end at once."""
    assert seconds_to_next(End(State.FAILED, code), 1, 100) is None
    assert End(State.FAILED, code).exit_code == code


@given(end=ENDS, retries=st.integers(0, 9))
def test_attempts_are_bounded(end, retries):
    """At most one attempt and the retries; waits double from 5 s and stay at 60 s or less."""
    tries = [seconds_to_next(end, failures, retries) for failures in range(1, 12)]
    waits = list(takewhile(lambda seconds: seconds is not None, tries))
    assert len(waits) in (0, retries)
    assert all(seconds is None for seconds in tries[len(waits) :])
    assert waits == [min(5 * 2**n, 60) for n in range(len(waits))]
    if end.state in (State.SUCCEEDED, State.STOPPED):
        assert waits == []


@given(end=ENDS)
def test_an_exit_code_is_the_program_s(end):
    """0 only after success, a signal as shells write it, 75 where the program did not end."""
    assert (end.exit_code == 0) == (end.state is State.SUCCEEDED)
    if end.state is State.FAILED and end.driver_exit_code is not None:
        assert end.exit_code % 256 in (end.driver_exit_code, 128 - end.driver_exit_code)
    elif end.state is not State.SUCCEEDED:
        assert end.exit_code == 75
    assert end.exit_code not in FINAL or end.driver_exit_code == end.exit_code


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--", "compress", "m", "small"], "out: small would be in the job's own directory"),
        (["--", "compress", "m", "/o", "--run-dir", "r"], "run_dir: r would be in the job's"),
        (["--", "submit", "--", "status", "r"], "the job's command cannot be submit itself"),
        (["--no-wait", "--retries", "1", "--", "status", "/r"], "does not watch the job"),
        (["--retries", "-1", "--", "status", "/r"], "retries is -1"),
        (["--working-dir", "/none", "--", "status", "/r"], "/none is not a directory"),
        (["--env", "NAME", "--", "status", "/r"], "--env NAME: must be NAME=VALUE"),
        (["--env", "RAY_AUTH_TOKEN=x", "--", "status", "/r"], "RAY_AUTH_TOKEN would be displayed"),
        (["--address", "http://127.0.0.1:9", "--", "status", "/r"], "no Ray dashboard answers"),
    ],
)
def test_bad_usage_is_told_before_anything_is_submitted(arguments, says, capsys):
    """One line, exit code 2."""
    assert main(["submit", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_the_job_s_command_is_checked_here(capsys):
    """A flag that the command does not have needs no cluster to be found out."""
    with pytest.raises(SystemExit) as ended:
        main(["submit", "--", "compress", "m", "/o", "--keeps", "0.5"])
    assert ended.value.code == 2
    assert "unknown flag --keeps" in capsys.readouterr().err


def test_a_directory_that_ray_does_not_take_is_refused_before_it_is_packed(tmp_path, capsys):
    """The message has the size, the largest parts, and the flags that help; what is excluded does
    not count."""
    for name, count in {"runs/a": 90 * 2**20, "data.txt": 11 * 2**20, ".git/c": 2**30}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(count)
    there = ["--address", "http://127.0.0.1:9", "--working-dir", str(tmp_path)]
    assert main(["submit", *there, "--", "status", "/r"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path} has 106 MB to upload, and Ray takes less than 105 MB" in line
    assert "most is in runs/ (94.4 MB), data.txt (11.5 MB): leave that out with --exclude" in line
    (tmp_path / ".gitignore").write_text("data.txt\n")
    assert main(["submit", *there, "--", "status", "/r"]) == 2
    assert "no Ray dashboard answers" in capsys.readouterr().err


def test_an_address_that_ray_would_overrule_is_refused(monkeypatch, capsys):
    """Ray prefers its variable to the address it is given, and would go elsewhere."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert main(["submit", "--address", "http://127.0.0.1:2", "--", "status", "/r"]) == 2
    assert "RAY_ADDRESS=http://127.0.0.1:1 instead" in capsys.readouterr().err


def test_a_head_that_goes_is_waited_for(tmp_path):
    """While none answers the job is waited for; a new head knows nothing of it, and gets the next.

    What a node takes along has no exit code: it is tried again, as often as was asked, and ends
    in 75, since the run can be resumed.
    """
    (tmp_path / "file").write_text("travels")
    first = Head(0, {"status": "RUNNING"})
    port = first.server_address[1]
    address = f"http://127.0.0.1:{port}"
    process = submit(address, tmp_path, "--retries", "1", "--", "status", "/r")
    try:
        assert wait_for(lambda: first.jobs)
    finally:
        first.end()
    time.sleep(2)
    gone = {"status": "FAILED", "message": "The node\nof the driver has died."}
    second = Head(port, gone)
    try:
        output, error = process.communicate(timeout=240)
    finally:
        second.end()
    assert process.returncode == 75
    assert output == ""
    told, *rest = error.splitlines()
    assert told.startswith(f"{tmp_path} has no package orchestrator: the job runs the version that")
    lines = [line.partition(": ") for line in rest]
    one, two = dict.fromkeys(name for name, _, _ in lines)
    assert [(name, text) for name, _, text in lines] == [
        (one, f"submitted to {address}, attempt 1 of 2"),
        (one, f"{address} does not answer, is asked again"),
        (one, f"{State.LOST}; the next attempt is in 5 s"),
        (two, f"submitted to {address}, attempt 2 of 2"),
        (two, "failed without an exit code: The node of the driver has died."),
    ]
    assert list(second.jobs) == [two]
    assert second.jobs[two]["entrypoint"] == "python -m orchestrator status /r"


def submit(address, tree, *arguments, token=TOKEN):
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    flags = ["--address", address, "--working-dir", str(tree), *arguments]
    return start("-m", "orchestrator", "submit", *flags, env=variables)


def jobs(address):
    """Return the jobs that the cluster knows, by submission id."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address, headers={"Authorization": f"Bearer {TOKEN}"})
    return {job.submission_id: job for job in client.list_jobs()}


def done(directory):
    """Blocks that a run has committed so far."""
    return units(events(directory)) if (directory.root / "events.jsonl").exists() else 0


@pytest.mark.jobs
@pytest.mark.chaos
def test_a_killed_driver_has_a_successor(dashboard, tree, tmp_path):
    """SIGKILL of a job's driver costs an attempt: the next, under another id, gives the same bytes.

    The head has no CPU to offer, as in `cluster.yaml`: the driver needs none. No token is shown.
    """
    text = write_text(tmp_path / "text.txt")
    model = write_llama(tmp_path / "dense", hidden=256)
    directory = RunDirectory(tmp_path / "out.run")
    command = ["compress", model, tmp_path / "out", *SMALL, "--calibration", text]
    command += ["--workers", "2", "--shards", "5"]
    flags = ["--exclude", "big", "--env", "GREETING=hello", "--retries", "1", "--"]
    process = submit(dashboard, tree, *flags, *map(str, command))
    assert wait_for(lambda: done(directory) >= 3)
    killed = directory.status()["pid"]
    os.kill(killed, signal.SIGKILL)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, output + error

    said = [re.fullmatch(r"(orchestrator-\S+): (.*)", line).groups() for line in error.splitlines()]
    first, second = dict.fromkeys(name for name, _ in said)
    assert [text.partition(" to ")[0] for _, text in said] == [
        "submitted",
        "failed with exit code 137; the next attempt is in 5 s",
        "submitted",
        "succeeded",
    ]
    found = jobs(dashboard)
    assert [found[name].status.value for name in (first, second)] == ["FAILED", "SUCCEEDED"]
    assert found[second].metadata["attempt"] == "2 of 2"
    assert found[second].runtime_env["env_vars"] == {"GREETING": "hello"}
    (committed,) = re.findall(r"(\d+) of 10 blocks are committed already", output)
    assert int(committed) >= 3
    assert directory.status()["pid"] != killed
    assert TOKEN not in output + error + str(found[second])
    run(model, tmp_path / "local", text)
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


@pytest.mark.jobs
def test_sigterm_stops_the_job(dashboard, tree, tmp_path):
    """SIGTERM to the follower of a job stops the job: 75, and the status is `stopped`."""
    text = write_text(tmp_path / "text.txt")
    model = write_llama(tmp_path / "dense", hidden=256)
    directory = RunDirectory(tmp_path / "out.run")
    command = ["compress", model, tmp_path / "out", *SMALL, "--calibration", text]
    process = submit(dashboard, tree, "--", *map(str, command), "--workers", "1")
    assert wait_for(lambda: done(directory) >= 1)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=240)
    assert process.returncode == 75, output + error
    assert "has ended as STOPPED; what is committed stays" in error
    assert directory.status()["state"] == "stopped"


@pytest.mark.jobs
def test_bad_input_is_reported_once(dashboard, tree, tmp_path):
    """The job's exit code, which Ray's own command line loses, is the command's: 4."""
    process = submit(dashboard, tree, "--", "status", str(tmp_path))
    output, error = process.communicate(timeout=240)
    assert process.returncode == 4, output + error
    assert "is not a run directory" in output
    assert "failed with exit code 4" in error
    assert error.count("submitted") == 1


@pytest.mark.jobs
def test_a_job_can_be_left_alone(dashboard, tree, tmp_path):
    """With --no-wait the submission id is all of stdout.

    What is excluded does not travel: changed, it leaves the package's name, a hash, as it was.
    """
    packages = []
    for content in ("old", "new"):
        for excluded in (".venv", ".git", "big"):
            (tree / excluded / "file").write_text(content)
        arguments = ["--no-wait", "--exclude", "big", "--", "status", str(tmp_path)]
        process = submit(dashboard, tree, *arguments)
        output, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
        name = output.strip()
        assert f"ray job logs --address {dashboard} --follow {name}" in error
        assert wait_for(lambda name=name: jobs(dashboard)[name].status.is_terminal())
        assert jobs(dashboard)[name].driver_exit_code == 4
        packages.append(jobs(dashboard)[name].runtime_env["working_dir"])
    assert packages[0] == packages[1]


@pytest.mark.jobs
def test_a_wrong_token_is_told(dashboard, tree):
    """One line that says which variables hold the token, and not the token."""
    process = submit(dashboard, tree, "--", "status", "/r", token="wrong" * 8)
    output, error = process.communicate(timeout=240)
    assert process.returncode == 2
    assert output == ""
    assert "another token than is given here; set RAY_AUTH_MODE=token" in error
    assert "wrong" not in error
