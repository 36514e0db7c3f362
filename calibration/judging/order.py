"""Which class a folder of a number is, where an adapter has no class names: is 10 after 9 or 1?

The labels of its training were the numbers, or, as torchvision's ImageFolder makes them, places of
the folders sorted as text. Up to ten folders both are the same; past that, float32's answers tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hhdeploy.bundle.answers import Logits
from hhdeploy.calibration.judging.accuracy import TWO_SIDED_95
from hhdeploy.calibration.judging.exam import Exam, Question


def settle_order(exam: Exam, reference: Logits) -> Exam:
    """The exam with one truth an image: of two readings the one that float32 answers, and said.

    Where neither stands out by more than chance the true classes are unknown.

    Args:
        exam: of n images.
        reference: float32's logits of them, [n, classes].
    """
    found = np.argmax(reference, axis=1)
    questions, warnings = list(exam.questions), list(exam.warnings)
    undecided: list[str | None] = []
    for task in dict.fromkeys(q.adapter for q in questions):
        rows = [row for row, q in enumerate(questions) if q.adapter == task]
        own = [questions[row] for row in rows]
        if all(q.as_text in (None, q.truth) for q in own):
            continue
        settled, said = _settled(own, found[rows].tolist())
        for row, question in zip(rows, settled, strict=True):
            questions[row] = question
        if all(q.truth is None for q in settled):
            undecided.append(task)
        whose = f"adapter {task!r}: " if task else ""
        warnings.append(f"{whose}no class names, and folders that are numbers: {said}")
    return replace(
        exam, questions=tuple(questions), warnings=tuple(warnings), undecided=tuple(undecided)
    )


def _settled(questions: Sequence[Question], found: Sequence[int]) -> tuple[list[Question], str]:
    """One task's images with the truths that float32 answers, and what was taken, in words."""
    pairs = list(zip(questions, found, strict=True))
    numbers = sum(q.truth == answer for q, answer in pairs)
    text = sum(q.as_text == answer for q, answer in pairs)
    # Images that are right either way tell nothing (the sign test).
    telling = numbers + text - 2 * sum(q.truth == q.as_text == answer for q, answer in pairs)
    figures = (
        f"float32 is right on {numbers} of {len(pairs)} images if their order is that of numbers, "
        f"on {text} if it is that of text, as torchvision's ImageFolder sorts"
    )
    if abs(numbers - text) <= TWO_SIDED_95 * math.sqrt(telling):
        unknown = [replace(q, truth=None, as_text=None) for q in questions]
        return unknown, f"which is which class is unknown, only agreement is reported ({figures})"
    if text > numbers:
        return [replace(q, truth=q.as_text, as_text=None) for q in questions], (
            f"taken in the order of text ({figures})"
        )
    return [replace(q, as_text=None) for q in questions], (
        f"taken in the order of numbers ({figures})"
    )
