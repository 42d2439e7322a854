"""HTML construction with escaping: every string is escaped unless it is `Markup`."""

import html
from collections.abc import Iterable

from orchestrator.errors import UsageError
from orchestrator.pages.style import SCRIPT, STYLE
from orchestrator.store.files import atomic
from orchestrator.store.places import Place

_VOID = {"meta", "wbr"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content security policy: the browser itself refuses to load other resources."""


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


Attribute = str | int | float | None


def element(name: str, /, *children: str | None, **attributes: Attribute) -> Markup:
    """Make an element; children that are not `Markup` are escaped, None is omitted.

    Args:
        attributes: `class_` and `for_` lose their last underscore, other underscores become dashes;
            None omits an attribute.
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
    """Concatenate the children, escaped where necessary."""
    return Markup("".join(escape(child) for child in children if child is not None))


def escape(text: str) -> Markup:
    """Escape text for HTML; a lone surrogate, which a file cannot store, becomes `?`."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(text.encode("utf-8", "replace").decode("utf-8")))


def section(title: str, *content: str | None) -> Markup:
    """Make a section with a heading, which is also its anchor."""
    anchor = title.lower().replace(" ", "-").replace(",", "")
    heading = element("h2", title, id=anchor)
    return element("section", heading, *content, aria_labelledby=anchor)


def scrolling(content: Markup, label: str) -> Markup:
    """Wrap content that may be wider than the page, so that it scrolls separately, also by
    keyboard."""
    return element("div", content, class_="scroll", role="region", tabindex=0, aria_label=label)


def page(
    title: str,
    *sections: str | None,
    style: str = STYLE,
    script: str = SCRIPT,
    policy: str | None = POLICY,
) -> Markup:
    """Make a complete document.

    Args:
        policy: Content security policy; None if the server sends one.
    """
    stated = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        None if policy is None else Markup(stated),
        element("title", title),
        element("style", Markup(style)),
    )
    body = element("body", element("main", *sections), element("script", Markup(script)))
    return Markup(f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n")


def write_page(path: Place, content: Markup) -> Place:
    """Write the page atomically; an existing file is replaced.

    Raises:
        UsageError: The path is a directory.
        OrchestratorError: The device is full or refuses the write.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a directory; name a file with --output")
    with atomic(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return path
