"""A release has one version, in `orchestrator/version.py`, and a section of the changelog."""

import re
import tomllib
from datetime import date
from pathlib import Path

from orchestrator.version import __version__

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"orchestrator[:-](\d+\.\d+\.\d+)")
"""Version in the name of a wheel or of an image."""
HEADING = re.compile(r"## (\d+)\.(\d+)\.(\d+)(?: - (\S+))?")


def test_wheels_and_images_have_the_version_of_the_sources():
    """Every file that names a wheel or an image of this package names that of this version."""
    files = [ROOT / "cluster.yaml", ROOT / "README.md"]
    files += [path for folder in ("docs", "scripts") for path in (ROOT / folder).rglob("*")]
    found = {
        path.name: {*NAMED.findall(path.read_text())}
        for path in files
        if path.is_file() and path.suffix not in (".pyc", ".svg")
    }
    named = {name: versions for name, versions in found.items() if versions}
    assert named.keys() >= {"cluster.yaml", "Dockerfile", "raycluster.yaml", "rayjob.yaml"}
    assert {name: versions for name, versions in named.items() if versions != {__version__}} == {}


def test_the_version_is_written_nowhere_else():
    """Builds take it from the sources."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    taken = project["tool"]["setuptools"]["dynamic"]["version"]
    assert taken == {"attr": "orchestrator.version.__version__"}


def test_the_changelog_begins_with_what_is_unreleased_and_then_this_version():
    """Releases have dates, newest first; what comes next is written under the first heading."""
    first, *others = [
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")
    ]
    assert first == "## Unreleased"
    releases = [match.groups() for match in map(HEADING.fullmatch, others) if match]
    assert len(releases) == len(others)
    assert ".".join(releases[0][:3]) == __version__
    versions = [tuple(map(int, release[:3])) for release in releases]
    assert versions == sorted(versions, reverse=True)
    dates = [date.fromisoformat(release[3]) for release in releases if release[3]]
    assert dates == sorted(dates, reverse=True)
    assert releases[0][3]
