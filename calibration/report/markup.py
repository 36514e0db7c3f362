"""HTML and SVG from nested calls; whatever is not markup already is escaped."""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is markup: written as it is. Made by `tag`; everything else is escaped."""

    __slots__ = ()


_EMPTY = frozenset({"meta", "img", "br", "col"})


def tag(name: str, /, *children: str | None, **attributes: object) -> Markup:
    """One element.

    >>> tag("td", "<b>", class_="a", data_x=1)
    '<td class="a" data-x="1">&lt;b&gt;</td>'

    Args:
        name: of the element.
        children: markup, text (escaped), or None (nothing).
        attributes: ``class_`` is class, other underscores become dashes; None leaves one out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: tuple[str | None, ...] | list[Markup]) -> Markup:
    """Children one after the other, text escaped."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(child)
            for child in children
            if child is not None
        )
    )
