"""The pages of the documentation, and what is in them."""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.workshop import ROOT

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^(?: {4}\S.*)\n(?:(?: {4}.*)?\n)*)+", re.MULTILINE)


def builder():
    """docs/build.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages() -> list[str]:
    """Every page, by its path in the checkout."""
    return sorted(p.as_posix() for p in builder().copied() if p.suffix == ".md")


@dataclass(frozen=True)
class Block:
    """A block of code: the page it is on, its kind (``python``, ``bash``, "") and text."""

    page: str
    kind: str
    text: str

    @property
    def head(self) -> str:
        """Its first line, which tells it from the others of its page."""
        return self.text.strip().splitlines()[0].strip()


def blocks(page: str) -> list[Block]:
    """The fenced and the indented blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [(m.start(), Block(page, m[1], m[2])) for m in _FENCE.finditer(text)]
    # A fence's own text is no indented block; nor is what belongs to an item of a list.
    bare = _FENCE.sub(lambda m: " " * len(m[0]), text)
    for match in _INDENTED.finditer(bare):
        before = bare[: match.start()].rstrip("\n").rpartition("\n")[2]
        if not re.match(r"\s*(?:[*\-]|\d+\.)\s|  \S", before):
            lines = [line[4:] for line in match[0].splitlines()]
            found.append((match.start(), Block(page, "", "\n".join(lines) + "\n")))
    return [block for _, block in sorted(found, key=lambda pair: pair[0])]


def commands(block: Block) -> list[str]:
    """The command lines of a block, comments left out and continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"(?:^|\s+)#\s.*$", "", line).strip() for line in lines)
    return [line for line in stripped if line]


def words_of(page: str, head: str, **names: object) -> list[str]:
    """The words of the one command of a page that begins with ``head``, the program's name left
    out; ``names``: words of the page -> what stands in their place."""
    (line,) = (c for block in blocks(page) for c in commands(block) if c.startswith(head))
    return [str(names.get(word, word)) for word in shlex.split(line)[1:]]


def path_of(page: str) -> Path:
    return ROOT / page
