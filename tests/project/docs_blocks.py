"""Blocks of the README and of the pages in docs/, and their commands.

sh       runs on a tiny model
console  cannot run here: parsed only. The comment `<!-- parsed only: WHY -->` above it says why
python   runs
toml     a recipe
text     output of the command above it
json, yaml, none   data, and samples of a terminal
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LANGUAGES = {"sh", "console", "python", "toml", "text", "json", "yaml", ""}
BLOCK = re.compile(
    r"(?:<!-- parsed only: ([^\n]+) -->\n\n?)?^```(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
PLACES = {
    "MODEL": "dense",
    "OUT": "small",
    "RUN": "small.run",
    "DENSE": "small-dense",
    "TEXT": "held-out.txt",
}
"""What stands for the words in capitals when a command runs."""


@dataclass(frozen=True)
class PageBlock:
    """Block of a page: why it is only parsed (empty otherwise), its language, its content."""

    why: str
    language: str
    body: str


def blocks(page: Path) -> list[PageBlock]:
    """Read the blocks of a page in order."""
    return [PageBlock(*found) for found in BLOCK.findall(page.read_text())]


def prose(page: Path) -> str:
    """Read the text of a page without its blocks."""
    return BLOCK.sub("", page.read_text())


def commands(body: str) -> list[list[str]]:
    """Split a shell block into commands: continued lines joined, comments left out.

    Where lines begin with the prompt `$ `, the others are output.
    """
    lines = body.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    parts = [part for line in lines for part in line.split(" && ")]
    split = [shlex.split(part, comments=True) for part in parts]
    return [[PLACES.get(word, word) for word in words] for words in split if words]
