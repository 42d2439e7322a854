"""The site of the documentation: built strictly, its references complete, its links alive."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from docs_blocks import PAGES, README
from docs_pages import METHODS as METHODS_PAGE
from docs_pages import with_methods

from orchestrator import api
from orchestrator.allocate import ALLOCATORS
from orchestrator.cli.main import main
from orchestrator.cli.verbs import VERBS
from orchestrator.methods import METHODS
from orchestrator.recipe.field import described
from orchestrator.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
GENERATED = {
    "reference/commands.md",
    "reference/recipe.md",
    "reference/options.md",
    "recipe.md",
    "contributing.md",
    "changelog.md",
}
"""Pages that scripts/docs_pages.py makes; links to them are alive in the site alone."""


class SitePage(HTMLParser):
    """Text of a page without markup, its links, and the names of its parts."""

    def __init__(self, path):
        super().__init__()
        self.parts, self.links, self.names = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [given[name] for name in ("href", "src") if given.get(name)]

    def handle_data(self, data):
        self.parts.append(data)

    def __str__(self):
        return " ".join("".join(self.parts).split())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, built strictly: a dead link is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    return out


def test_the_reference_has_every_field_and_verb(site):
    """Generated pages have the names and help texts of the program, and the public functions."""
    recipe = str(SitePage(site / "reference" / "recipe.html"))
    assert [name for name in described(Recipe) if name not in recipe] == []
    commands = SitePage(site / "reference" / "commands.html")
    assert [verb for verb in VERBS if verb not in commands.names] == []
    assert "--keep-bytes FRACTION" in str(commands)
    python = (site / "reference" / "python.html").read_text()
    names = [f'id="orchestrator.api.{name}"' for name in api.__all__]
    assert [name for name in names if name not in python] == []
    options = str(SitePage(site / "reference" / "options.html"))
    assert "mgaa.t" in options
    assert "Largest fraction that may be removed of one linear." in options


def test_every_method_says_how_it_differs_and_when_to_use_it(capsys):
    """Each in its own words, not its base class's: in the table of the page, which
    `python scripts/docs_pages.py --write` writes, and in `orchestrator methods`."""
    page = METHODS_PAGE.read_text()
    assert page == with_methods(page)
    assert main(["methods"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    allocators = [each for each in map(ALLOCATORS.__getitem__, ALLOCATORS) if each.departure]
    assert {"Learned", "Lorc", "Soco"} <= {each.__name__ for each in allocators}
    for each in (*map(type, map(METHODS.__getitem__, METHODS)), *allocators):
        own = vars(each)
        assert own.get("departure"), each
        assert own.get("use"), each
        assert f"Differs: {own['departure']} Use: {own['use']}" in printed, each


def test_the_page_of_methods_has_every_publication():
    """Whatever a method or an allocation is named after."""
    page = METHODS_PAGE.read_text()
    sources = [each.source for table in (METHODS, ALLOCATORS) for each in map(table.get, table)]
    numbers = re.findall(r"\d{4}\.\d{5}", " ".join(sources))
    assert len(numbers) > 20
    assert [number for number in numbers if number not in page] == []


def test_the_home_page_is_the_readme(site):
    """The picture of the README is a file of the site."""
    home = (site / "index.html").read_text()
    (picture,) = re.findall(r'<img src="([^"]+)"', home)
    assert (site / picture).is_file()
    assert "What it gives" in str(SitePage(site / "index.html"))


def test_every_link_leads_to_a_part_of_a_page(site):
    """Links within the site name files that exist, and anchors that these files have."""
    pages = {path: SitePage(path) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            # the page for unknown addresses has links from the root of a server
            if parts.scheme or parts.netloc or parts.path.startswith("/"):
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            anchor = unquote(parts.fragment)
            if not there.is_file() or (anchor and anchor not in pages[there].names):
                dead.append(f"{path.name}: {link}")
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert dead == []


def test_links_between_files_of_the_repository_are_alive():
    """As on a page of the repository: relative paths of Markdown files, and of their pictures."""
    dead = []
    for page in (README, ROOT / "CONTRIBUTING.md", *PAGES):
        links = re.findall(r"\]\(([^)#\s]+)|<img src=\"([^\"]+)", page.read_text())
        for link in (a or b for a, b in links):
            known = (page.parent / link).exists() or link in GENERATED or "://" in link
            dead += [] if known else [f"{page.name}: {link}"]
    assert dead == []


def test_the_parts_of_the_package_are_those_of_the_architecture_page():
    """Its table names every package and every module of `orchestrator`."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.partition("## Packages")[2].partition("\n## ")[0]
    named = {part for line in table.splitlines() for part in re.findall(r"`(\w+)", line)}
    package = ROOT / "orchestrator"
    there = {path.parent.name for path in package.glob("*/__init__.py")}
    there |= {path.stem for path in package.glob("*.py") if not path.stem.startswith("_")}
    assert there - named == set()


def test_every_verb_is_on_a_page():
    """Each verb of the command line is written as a command on a page that is not generated."""
    text = "".join(page.read_text() for page in (README, *PAGES))
    assert [verb for verb in VERBS if f"orchestrator {verb}" not in text] == []
