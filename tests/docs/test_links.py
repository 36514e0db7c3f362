"""Every link of the documentation leads somewhere, in the checkout and in the site."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import builder, pages
from tests.workshop import ROOT

_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


def links(text: str) -> list[str]:
    """Targets of links and images that are not in code."""
    return _LINK.findall(_CODE.sub("", text))


def anchors(text: str) -> set[str]:
    """What the headings of a page are called, as Markdown's readers do it."""
    found: set[str] = set()
    for heading in _HEADING.findall(re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).lower()
        name = re.sub(r"\s", "-", plain.strip())
        while name in found:
            name = f"{name}-1"
        found.add(name)
    return found


def dead(page: str, text: str, site: set[str]) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for target in links(text):
        if re.match(r"[a-z]+:", target):
            continue  # of the network: no test asks that
        place, _, anchor = target.partition("#")
        path = (ROOT / page).parent / place if place else ROOT / page
        name = path.resolve().relative_to(ROOT).as_posix() if path.exists() else None
        there = name in site
        if there and anchor:
            there = anchor in anchors(path.read_text(encoding="utf-8"))
        found += [] if there else [target]
    return found


@pytest.fixture(scope="module")
def site() -> set[str]:
    return {path.as_posix() for path in builder().copied()}


def test_no_link_is_dead(site):
    found = {page: dead(page, (ROOT / page).read_text(encoding="utf-8"), site) for page in pages()}
    assert not {page: targets for page, targets in found.items() if targets}
    assert sum(len(links((ROOT / page).read_text(encoding="utf-8"))) for page in pages()) > 100


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("see [that](nowhere.md)", "nowhere.md"),
        ("see [that](models.md#nowhere)", "models.md#nowhere"),
        ("see [that](#nowhere) and [this](#large-models)", "#nowhere"),
        ("![a picture](nowhere.png)", "nowhere.png"),
        ("[`code`](../nowhere.py)", "../nowhere.py"),
        ("[over two\nlines](nowhere.md)", "nowhere.md"),
        ("[what the site has not](../hhdeploy/plan.py)", "../hhdeploy/plan.py"),
    ],
)
def test_a_planted_dead_link_is_found(site, text, target):
    assert dead("docs/models.md", text, site) == [target]


def test_what_is_no_link_is_none():
    assert not links("```\n[x](y.md)\n```\n`[x](y.md)` x[0](y)"[:-6])
    assert links("a [b](c.md) [d [e]](f.md#g) ![h](i.svg)") == ["c.md", "f.md#g", "i.svg"]


def test_every_page_is_in_the_navigation():
    told = set(re.findall(r'"([\w/.-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    assert told == set(pages())
