"""What hhdeploy says of other packages' errors, and of many names."""

from __future__ import annotations

import re

import pytest

from hhdeploy.errors import abbreviate, first_line
from tests.test_house import ROOT, sources


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("No such key."), "No such key"),
        (ValueError("\n  the first line\nthe second"), "the first line"),
        (ValueError("'size':\n  expected int, found None."), "'size': expected int, found None"),
        (ValueError("nothing follows:"), "nothing follows:"),
        (EOFError(), "EOFError"),
    ],
)  # fmt: skip
def test_another_package_s_error_is_a_part_of_a_sentence(error, said):
    assert first_line(error) == said


def test_many_names_are_cut_and_counted():
    assert abbreviate(["a", "b"], 2) == "a, b"
    assert abbreviate({"a": 1, "b": 2, "c": 3}, 2) == "a, b, … (3 in all)"
    assert abbreviate([]) == ""


def test_no_message_cuts_its_names_in_silence():
    """As if there were no more: `abbreviate` says how many there are."""
    cut = re.compile(r"""', '\.join\(.*\[:\d+\]\)|", "\.join\(.*\[:\d+\]\)|['"] ?…['"] if len""")
    lines = (
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources()
        for line in path.read_text(encoding="utf-8").splitlines()
        if cut.search(line)
    )
    assert [*lines] == []
