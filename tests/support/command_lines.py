"""Checks of command lines in scripts and configs."""

import re
import shlex
import subprocess


def check_ray_command(words):
    """Parse `ray COMMAND ...` as the installed Ray does; an unknown option raises."""
    from ray.scripts.scripts import cli

    name, *arguments = words
    command = cli.commands[name]
    context = command.make_context(name, list(arguments))
    assert name == "symmetric-run" or not context.args


def ray_commands(lines):
    """Return the words after `ray` of each command that calls it."""
    calls = (re.match(r"ray (.*)", line) for line in lines)
    return [shlex.split(call[1]) for call in calls if call]


def is_shell(text):
    return subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)
