"""Licences as their sources state them: none is guessed, and several are all kept.

Sources are a configuration's ``license`` and the front matter of a model card, README.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from io import TextIOWrapper
from pathlib import Path

from hhdeploy.files.plain import open_plain

# Names as a source states them, each once; empty: nobody says.
Licences = tuple[str, ...]
UNKNOWN = "unknown"
CARD = "README.md"
# What stands for no statement, as cards are generated.
_NOTHING = frozenset({"", "none", "null", "~", "unknown", "[more information needed]"})
_KEY = re.compile(r"(?P<key>[\w-]+):(?P<value>(\s.*)?)")
_LONGEST_CARD = 1 << 20


def licences_of(stated: object) -> Licences:
    """What a JSON or YAML value states: a name, a list of names, or nothing.

    Raises:
        ValueError: it is something else.
    """
    names = [stated] if isinstance(stated, str) else ([] if stated is None else stated)
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise ValueError("the name of a licence, a list of them, or null")
    return together(tuple(names))


def together(*stated: Iterable[str]) -> Licences:
    """All that several sources state, each name once whatever its case; the first spelling."""
    names = (" ".join(name.split()) for part in stated for name in part)
    found: dict[str, str] = {}
    for name in names:
        if name.lower() not in _NOTHING:
            found.setdefault(name.lower(), name)
    return tuple(found.values())


def licences_to_json(licences: Licences) -> str | list[str] | None:
    """None where nobody says, a name, or a list of several names."""
    return licences[0] if len(licences) == 1 else list(licences) or None


def in_words(licences: Licences) -> str:
    """For people: ``unknown`` where nobody says."""
    return " and ".join(licences) or UNKNOWN


def licences_of_card(folder: Path) -> Licences:
    """What the model card in a folder states in its front matter; nothing without a card.

    Of ``license: other`` the ``license_name`` counts, if there is one. What is no plain file is no
    card.
    """
    try:
        card = open_plain(folder / CARD)
        with TextIOWrapper(card, encoding="utf-8", errors="replace") as stream:
            text = stream.read(_LONGEST_CARD)
    except OSError:
        return ()
    front = _front_matter(text)
    stated, name = together(front.get("license", ())), together(front.get("license_name", ()))
    other = [n for n in stated if n.lower() == "other"]
    return together([n for n in stated if n not in other], name if other and name else other)


def _front_matter(text: str) -> dict[str, list[str]]:
    """Keys at the top of the YAML between two lines of ``---``, those whose values are names or
    lists of names. (A card may come from anywhere: it is read as text, and nothing more.)"""
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    found: dict[str, list[str]] = {}
    key = ""
    for line in lines[1:]:
        if line.rstrip() == "---":
            return found
        if matched := _KEY.fullmatch(line):
            key = matched["key"]
            found[key] = _names(matched["value"])
        elif line.lstrip().startswith("- ") and key:
            found[key] += _names(line.lstrip()[2:])
        elif line.strip() and not line.lstrip().startswith("#"):
            key = ""  # a mapping or a text of several lines: no list of names
    return {}


def _names(value: str) -> list[str]:
    value = re.sub(r"(^|\s)#.*", "", value).strip()
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else None
    parts = [value] if inner is None else inner.split(",")
    return [name for part in parts if (name := part.strip().strip("'\"").strip())]
