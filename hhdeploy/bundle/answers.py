"""Logits to answers: the one place that knows what an adapter's numbers mean.

Classes of which one is right share one probability (softmax). Labels that are true or not each have
their own (sigmoid), and are said from 0.5 on. Values are what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.config import CLASSES, LABELS, VALUES, ProblemType
from hhdeploy.bundle.manifest import AdapterEntry

# float32 [images, classes].
Logits = NDArray[np.float32]

# A label is said from this probability on.
_SAID = 0.5


@dataclass(frozen=True)
class Answer:
    """One class, label or value of one image.

    Attributes:
        label: its name, its number if it has none.
        score: its probability, from 0 to 1; of a regression the value itself.
        positive: the adapter says it: the most probable class and no other, a label of 0.5 or more;
            never of a regression, whose values are no yes or no.
        index: its column.
        problem_type: of the adapter.
    """

    label: str
    score: float
    positive: bool
    index: int
    problem_type: ProblemType = CLASSES

    def __str__(self) -> str:
        share = self.problem_type != VALUES
        return f"{self.label} {self.score:.1%}" if share else f"{self.label} {self.score:.6g}"


def answers_of(logits: NDArray[Any], entry: AdapterEntry | None, classes: int) -> list[Answer]:
    """All answers of one image, the most probable first; values in the order of their columns.

    Args:
        logits: [at least classes] of the image; what follows the adapter's own is padding. A
            class of -inf has score 0 and keeps its column.
        entry: of the image's adapter; None: the backbone, whose classes have numbers only.
        classes: own classes of the adapter or the backbone.
    """
    kind = problem_type(entry)
    own = logits[:classes]
    scores = own.astype(np.float64) if kind == VALUES else probabilities(own, kind)
    order = range(len(own)) if kind == VALUES else np.argsort(-own, kind="stable")
    return [
        Answer(
            label_of(entry, int(i)),
            float(scores[i]),
            (kind == CLASSES and rank == 0) or (kind == LABELS and bool(scores[i] >= _SAID)),
            int(i),
            kind,
        )
        for rank, i in enumerate(order)
    ]


def best(answers: Sequence[Answer], top: int) -> Sequence[Answer]:
    """What to show of one image: ``top`` classes, every label that is said, all values."""
    if answers and answers[0].problem_type == VALUES:
        return answers
    return answers[: max(top, sum(a.positive for a in answers))]


def are_numbers(logits: NDArray[Any], entry: AdapterEntry | None) -> bool:
    """Whether an adapter's own logits of one image say anything.

    -inf does (a class that is ruled out), but is no value of a regression; NaN and +inf, or -inf
    alone, do not: the best class of them would be the first.
    """
    values = problem_type(entry) == VALUES
    least = logits.min(initial=np.inf) if values else logits.max(initial=-np.inf)
    return bool(np.isfinite(least) and np.isfinite(logits.max(initial=-np.inf)))


def problem_type(entry: AdapterEntry | None) -> ProblemType:
    """Of an adapter; of the backbone (None) classes."""
    return entry.problem_type if entry is not None else CLASSES


def label_of(entry: AdapterEntry | None, index: int) -> str:
    """Name of a class of an adapter; of the backbone (None) its number."""
    return entry.label(index) if entry is not None else str(index)


def probabilities(logits: NDArray[Any], kind: ProblemType) -> NDArray[np.float64]:
    """Of classes or labels, in float64, over the last axis: softmax, or sigmoid.

    -inf gives 0; NaN gives NaN. Of classes a row that holds +inf, or nothing but -inf, gives NaN.

    Raises:
        ValueError: the values of a regression have none.
    """
    if kind == VALUES:
        raise ValueError("the values of a regression are no probabilities")
    return softmax(logits) if kind == CLASSES else _sigmoid(logits)


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """exp(x) / sum(exp(x)) over the last axis, in float64.

    -inf gives 0; a row that holds NaN or +inf, or nothing but -inf, gives NaN.
    """
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shares = np.exp(wide - wide.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = shares / shares.sum(axis=-1, keepdims=True)
    return result


def _sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)); exp never of a positive number, which could be too large."""
    wide = logits.astype(np.float64)
    small = np.exp(-np.abs(wide))
    result: NDArray[np.float64] = np.where(wide >= 0, 1.0, small) / (1.0 + small)
    return result
