"""HTML that cannot be broken by what it shows: every string is escaped unless it is `Markup`."""

import html
from collections.abc import Iterable

from orchestrator.errors import UsageError
from orchestrator.pages.style import SCRIPT, STYLE
from orchestrator.store.files import atomic
from orchestrator.store.places import Place

_VOID = {"meta", "wbr"}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser itself refuses whatever would be loaded."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Attribute = str | int | float | None


def element(name: str, /, *children: str | None, **attributes: Attribute) -> Markup:
    """One element; children that are no `Markup` are escaped, those that are None left out.

    Args:
        attributes: `class_` and `for_` lose their last underscore, others become dashes; None
            leaves an attribute out.
    """
    shown = "".join(
        f' {key.removesuffix("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{joined(children)}</{name}>")


def joined(children: Iterable[str | None]) -> Markup:
    """The children one after another, escaped where they need it."""
    return Markup("".join(escape(child) for child in children if child is not None))


def escape(text: str) -> Markup:
    """Text as HTML shows it; half a surrogate pair, which no file can hold, becomes `?`."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(text.encode("utf-8", "replace").decode("utf-8")))


def section(title: str, *content: str | None) -> Markup:
    """A part of a page under its heading, which is also its anchor."""
    anchor = title.lower().replace(" ", "-").replace(",", "")
    heading = element("h2", title, id=anchor)
    return element("section", heading, *content, aria_labelledby=anchor)


def scrolling(content: Markup, label: str) -> Markup:
    """What may be wider than the page, and then scrolls within itself, by keyboard too."""
    return element("div", content, class_="scroll", role="region", tabindex=0, aria_label=label)


def page(title: str, *sections: str | None) -> Markup:
    """A whole document."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    body = element("body", element("main", *sections), element("script", Markup(SCRIPT)))
    return Markup(f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n")


def write_page(path: Place, content: Markup) -> Place:
    """Writes the page in one step; what was there is replaced.

    Raises:
        UsageError: The path is a directory.
        OrchestratorError: The device has no space left, or refuses the write.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a directory; name a file with --output")
    with atomic(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return path
