"""What an adapter may have been while a request was under way."""

from __future__ import annotations

import math

import pytest

from hhdeploy.loadtest.timeline import Timeline


@pytest.fixture
def timeline() -> Timeline:
    """Version 0; replaced by 1 between 10 and 12; removed between 20 and 22; back at 30 to 32."""
    line = Timeline(0)
    line.change(1, 10, 12)
    line.change(None, 20, 22)
    line.change(2, 30, 32)
    return line


@pytest.mark.parametrize(
    ("sent", "answered", "possible"),
    [
        (1, 9, {0}),
        (9, 11, {0, 1}),  # overlaps the change
        (10.5, 11, {0, 1}),  # within it
        (11, 15, {0, 1}),  # sent before the acknowledgement
        (13, 15, {1}),  # sent after it: the old version is wrong
        (9, 15, {0, 1}),
        (13, 21, {1, None}),
        (23, 29, {None}),  # sent after the removal, answered before the load was sent: 404
        (23, 31, {None, 2}),
        (33, 99, {2}),
        (5, 25, {0, 1, None}),
        (0, 99, {0, 1, None, 2}),
    ],
)
def test_possible(timeline, sent, answered, possible):
    assert timeline.possible(sent, answered) == possible


def test_a_change_that_was_never_acknowledged_may_or_may_not_have_happened():
    line = Timeline(0)
    line.change(1, 10, math.inf)
    assert line.possible(1, 9) == {0}
    assert line.possible(50, 60) == {0, 1}


def test_now(timeline):
    assert Timeline(None).now is None
    assert timeline.now == 2
