"""Folders of numbers without class names: float32's answers tell in which order they were."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hhdeploy.calibration.judging.exam import Exam, Question
from hhdeploy.calibration.judging.guard import check_bound
from hhdeploy.calibration.judging.order import settle_order
from hhdeploy.errors import PlanError

CLASSES = 12
TEXT = [sorted(map(str, range(CLASSES))).index(str(i)) for i in range(CLASSES)]


def asked(images=5):
    """Of adapter a, whose order is in doubt, and of b, whose is not, in turn."""
    questions = []
    for _ in range(images):
        for number in range(CLASSES):
            questions.append(Question("a", number, "x.png", lambda: None, as_text=TEXT[number]))
            questions.append(Question("b", number, "x.png", lambda: None))
    return Exam(tuple(questions), True, "images", ("before",))


def answered(columns):
    return np.eye(CLASSES, dtype=np.float32)[columns]


@pytest.mark.parametrize("order", ["numbers", "text"])
def test_the_order_that_float32_answers_is_taken(order):
    exam = asked()
    right = [q.as_text if order == "text" and q.adapter == "a" else q.truth for q in exam.questions]
    settled = settle_order(exam, answered(right))
    assert [q.truth for q in settled.questions] == right
    assert all(q.as_text is None for q in settled.questions)
    before, said = settled.warnings
    assert before == "before"
    assert said.startswith(f"adapter 'a': no class names, and folders that are numbers: taken in "
                           f"the order of {order} (float32 is right on ")  # fmt: skip
    assert re.findall(r"right on (\d+) of 60 .*, on (\d+) if", said) == [
        ("60", "10") if order == "numbers" else ("10", "60")
    ]
    check_bound(1.0, settled)


@pytest.mark.parametrize("share", [0.0, 0.5, None])
def test_what_float32_does_not_tell_is_unknown(share):
    """Random answers, those that are as often right in one order as in the other, and all wrong."""
    exam = asked()
    rng = np.random.default_rng(0)
    columns = rng.integers(0, CLASSES, len(exam.questions))
    for row, q in enumerate(exam.questions):
        if q.adapter == "b" or (share and row % 4 == 0):
            columns[row] = q.truth
        elif share:
            columns[row] = q.as_text
        elif share is None:
            columns[row] = min({0, 1, 2} - {q.truth, q.as_text})
    settled = settle_order(exam, answered(columns))
    assert {q.truth for q in settled.questions if q.adapter == "a"} == {None}
    assert [q.truth for q in settled.questions if q.adapter == "b"] == [*range(CLASSES)] * 5
    assert "which class is unknown, only agreement is reported" in settled.warnings[-1]
    assert settled.undecided == ("a",)
    with pytest.raises(PlanError, match=r"true classes of a, .* write the names"):
        check_bound(1.0, settled)


def test_images_that_are_right_either_way_tell_nothing():
    """Five that only one order explains decide, however many both do."""
    exam = asked(10)
    both = [q.truth if q.truth == q.as_text else CLASSES - 1 - q.truth for q in exam.questions]
    last = [row for row, q in enumerate(exam.questions) if (q.adapter, q.truth) == ("a", 2)][:5]
    for row in last:
        both[row] = 2
    settled = settle_order(exam, answered(both))
    assert "taken in the order of" in settled.warnings[-1], settled.warnings[-1]


def test_where_there_is_no_doubt_nothing_is_said():
    questions = tuple(
        Question("a", truth, "x.png", lambda: None, as_text=text)
        for truth, text in ((0, 0), (1, 1), (2, None))
    )
    exam = Exam(questions, True, "images", ())
    settled = settle_order(exam, answered([1, 1, 1]))
    assert [q.truth for q in settled.questions] == [0, 1, 2]
    assert (settled.warnings, settled.undecided) == ((), ())
