"""What hhdeploy says of other packages' errors."""

from __future__ import annotations

import pytest

from hhdeploy.errors import first_line


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
