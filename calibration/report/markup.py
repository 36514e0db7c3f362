"""HTML and SVG from nested calls; whatever is not markup already is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from hhdeploy.calibration.report.style import STYLE

# Nothing is fetched and no script runs, whatever a class or an adapter is called.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


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


def document(title: str, *body: str | None) -> str:
    """A whole page, its title as its heading: it loads nothing and runs nothing."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    shown = tag("body", tag("h1", title), *body)
    return "<!doctype html>\n" + tag("html", head, shown, lang="en")


def section(heading: str, *children: Markup | None) -> Markup:
    """A part of a page under its heading."""
    return tag("section", tag("h2", heading), *children)


def remark(text: str) -> Markup:
    """What the reader has to know of what follows."""
    return tag("p", text, class_="note")


def html_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    last: bool = False,
    class_: str | None = None,
) -> Markup:
    """A table whose first column is the rows' headings; ``last`` sets off the last row."""
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = [
        tag("tr", tag("th", str(row[0]), scope="row"), *(tag("td", str(cell)) for cell in row[1:]))
        for row in rows
    ]
    foot = tag("tfoot", body.pop()) if last else None
    made = tag("table", tag("thead", head), tag("tbody", join(body)), foot, class_=class_)
    return tag("div", made, class_="scroll")
