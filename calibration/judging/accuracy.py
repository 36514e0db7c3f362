"""What quantisation costs, task by task: float32 and quantised answers to the same images.

Both graphs see the same images, so the drop is judged as paired data (McNemar): images that both
answer right or both answer wrong carry no information about it.

    drop = (lost - gained) / n        standard error = sqrt((lost + gained) / n - drop²) / sqrt(n)

with lost: right in float32 and wrong quantised, gained: the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.config import CLASSES, LABELS
from hhdeploy.adapters.labels import mean_absolute_error, mean_average_precision
from hhdeploy.bundle.answers import Logits
from hhdeploy.calibration.judging.exam import Question
from hhdeploy.parity import compare

# images [batch, 3, H, W] and one adapter per image to logits [batch, classes]; a session's `run`.
Answering = Callable[[NDArray[np.float32], Sequence[str | None]], NDArray[np.float32]]
_BATCH = 16
# Of the range of all values.
_SAME_VALUE = 0.01
TWO_SIDED_95 = 1.96  # standard errors
NEVER_SEEN = 3.0  # the rule of three: an event not seen in n trials is rarer than 3 / n at 95 %


@dataclass(frozen=True)
class TaskAccuracy:
    """Float32 against quantised answers on one task's images.

    Attributes:
        task: the adapter; empty for a folded bundle's.
        images: n.
        agreement: share of images with the same answer: class, set of labels, or values that moved
            by no more than a hundredth of their range.
        sqnr_db: logits of float32 over their difference, in dB; inf if they are equal.
        float_right, quantised_right: right answers; None if the true classes are unknown.
        lost: right in float32, wrong quantised; gained: the other way round; None as above.
        score: how labels (``mAP``, a share) and values (``MAE``, in their unit) are judged; None of
            classes, and where the truths are unknown.
        float_score, quantised_score: by it.
    """

    task: str
    images: int
    agreement: float
    sqnr_db: float
    float_right: int | None = None
    quantised_right: int | None = None
    lost: int | None = None
    gained: int | None = None
    score: str | None = None
    float_score: float | None = None
    quantised_score: float | None = None

    @property
    def scores(self) -> tuple[str, str] | None:
        """Of labels and values in float32 and quantised, in words; None of classes."""
        if self.float_score is None or self.quantised_score is None:
            return None
        both = (self.float_score, self.quantised_score)
        if self.score == "MAE":
            first, second = (f"MAE {x:.4g}" for x in both)
        else:
            first, second = (f"mAP {100 * x:.2f} %" for x in both)
        return first, second

    @property
    def float_top1(self) -> float | None:
        """Percent."""
        return None if self.float_right is None else 100 * self.float_right / self.images

    @property
    def quantised_top1(self) -> float | None:
        """Percent."""
        return None if self.quantised_right is None else 100 * self.quantised_right / self.images

    @property
    def drop(self) -> float | None:
        """Points of top-1 that quantisation costs; negative if it gains."""
        if self.lost is None or self.gained is None:
            return None
        return 100 * (self.lost - self.gained) / self.images

    @property
    def standard_error(self) -> float | None:
        """Of the drop, in points."""
        if self.lost is None or self.gained is None:
            return None
        mean = (self.lost - self.gained) / self.images
        variance = (self.lost + self.gained) / self.images - mean**2
        return 100 * math.sqrt(variance / self.images)

    @property
    def at_most(self) -> float | None:
        """Upper end of the drop's 95 % interval, in points.

        Where no answer changed the standard error is zero, which proves too much: the rule of
        three (3 / n) is used then.
        """
        drop, error = self.drop, self.standard_error
        if drop is None or error is None:
            return None
        if error == 0.0 and drop == 0.0:
            return 100 * NEVER_SEEN / self.images
        return drop + TWO_SIDED_95 * error

    def to_json(self) -> dict[str, Any]:
        """Counts and figures; percent and points."""
        return {
            **asdict(self),
            "sqnr_db": _finite(self.sqnr_db),
            "float_top1": self.float_top1,
            "quantised_top1": self.quantised_top1,
            "drop": self.drop,
            "standard_error": self.standard_error,
            "at_most": self.at_most,
        }


@dataclass(frozen=True)
class Accuracy:
    """All tasks of one comparison.

    Attributes:
        tasks: in the order of their first image.
        held_out: the images were not calibrated on.
    """

    tasks: tuple[TaskAccuracy, ...]
    held_out: bool

    @property
    def labelled(self) -> tuple[TaskAccuracy, ...]:
        """Tasks whose true classes are known."""
        return tuple(task for task in self.tasks if task.drop is not None)

    @property
    def images(self) -> int:
        """Of all tasks."""
        return sum(task.images for task in self.tasks)

    @property
    def float_top1(self) -> float | None:
        """Mean over the labelled tasks, percent."""
        return _mean([task.float_top1 for task in self.labelled])

    @property
    def quantised_top1(self) -> float | None:
        """Mean over the labelled tasks, percent."""
        return _mean([task.quantised_top1 for task in self.labelled])

    @property
    def drop(self) -> float | None:
        """Mean drop over the labelled tasks, points."""
        return _mean([task.drop for task in self.labelled])

    @property
    def standard_error(self) -> float | None:
        """Of the mean drop, points: the tasks' images are independent."""
        if not self.labelled:
            return None
        squares = [(task.standard_error or 0.0) ** 2 for task in self.labelled]
        return math.sqrt(sum(squares)) / len(squares)

    @property
    def worst(self) -> TaskAccuracy | None:
        """The task with the largest drop."""
        return max(self.labelled, key=lambda task: task.drop or 0.0, default=None)

    @property
    def agreement(self) -> float:
        """Share of all images with the same answer."""
        return sum(task.agreement * task.images for task in self.tasks) / self.images

    def to_json(self) -> dict[str, Any]:
        """The accuracy entry of a calibration's JSON."""
        return {
            "held_out": self.held_out,
            "images": self.images,
            "agreement": self.agreement,
            "float_top1": self.float_top1,
            "quantised_top1": self.quantised_top1,
            "drop": self.drop,
            "standard_error": self.standard_error,
            "worst_task": self.worst.task if self.worst else None,
            "tasks": [task.to_json() for task in self.tasks],
        }


def answers(run: Answering, questions: Sequence[Question]) -> Logits:
    """Logits [n, classes] of all images, in batches that mix tasks as ``questions`` do."""
    batches = []
    for start in range(0, len(questions), _BATCH):
        batch = questions[start : start + _BATCH]
        images = np.stack([question.load() for question in batch])
        batches.append(run(images, [question.adapter for question in batch]))
    return np.concatenate(batches)


def compare_answers(
    questions: Sequence[Question], reference: Logits, found: Logits, *, held_out: bool
) -> Accuracy:
    """Compare two graphs' logits of the same images, task by task.

    Args:
        questions: n images.
        reference: of the float32 graph, [n, classes]; -inf past a task's own classes.
        found: of the quantised graph.
        held_out: the images were not calibrated on.
    """
    names = [question.adapter for question in questions]
    tasks = []
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        own = [questions[row] for row in rows]
        compare_task = _compare_classes if own[0].problem_type == CLASSES else _compare_others
        tasks.append(compare_task(name or "", own, reference[rows], found[rows]))
    return Accuracy(tuple(tasks), held_out)


def _compare_others(
    task: str, questions: Sequence[Question], reference: Logits, found: Logits
) -> TaskAccuracy:
    """Labels and values: mAP and MAE."""
    kind = questions[0].problem_type
    sqnr = compare(reference, found, kind).sqnr_db
    own = ~np.isneginf(reference).any(axis=0)
    before, after = reference[:, own], found[:, own]
    if kind == LABELS:
        agreement = ((before >= 0) == (after >= 0)).all(axis=1)
    else:
        agreement = (np.abs(before - after) <= _SAME_VALUE * np.ptp(before)).all(axis=1)
    result = (task, len(reference), float(agreement.mean()), sqnr)
    known = [q.truths for q in questions if q.truths is not None]
    if len(known) < len(questions):
        return TaskAccuracy(*result)
    truths = np.asarray(known)
    if kind == LABELS:
        score, scores = "mAP", [mean_average_precision(x, truths) for x in (before, after)]
    else:
        score, scores = "MAE", [mean_absolute_error(x, truths) for x in (before, after)]
    return TaskAccuracy(*result, score=score, float_score=scores[0], quantised_score=scores[1])


def _compare_classes(
    task: str, questions: Sequence[Question], reference: Logits, found: Logits
) -> TaskAccuracy:
    truths = [question.truth for question in questions]
    figures = compare(reference, found)
    agreement = float(np.mean(np.argmax(reference, axis=1) == np.argmax(found, axis=1)))
    result = (task, len(reference), agreement, figures.sqnr_db)
    if None in truths:
        return TaskAccuracy(*result)
    truth = np.asarray(truths)
    before, after = np.argmax(reference, axis=1) == truth, np.argmax(found, axis=1) == truth
    return TaskAccuracy(
        *result,
        float_right=int(before.sum()),
        quantised_right=int(after.sum()),
        lost=int((before & ~after).sum()),
        gained=int((after & ~before).sum()),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
