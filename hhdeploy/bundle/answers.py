"""Logits to answers: a class's name, its score, and whether the adapter says it of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle.manifest import AdapterEntry


@dataclass(frozen=True)
class Answer:
    """One class of one image.

    Attributes:
        label: the class's name, its number if it has none.
        score: its probability, from 0 to 1: softmax over the adapter's own classes.
        positive: the adapter says this class: the most probable one, and no other.
        index: the class's column.
    """

    label: str
    score: float
    positive: bool
    index: int


def answers_of(logits: NDArray[Any], entry: AdapterEntry | None, classes: int) -> list[Answer]:
    """All answers of one image, the most probable first.

    Args:
        logits: [at least classes] of the image; what follows the adapter's own is padding. A
            class of -inf has score 0 and keeps its column.
        entry: of the image's adapter; None: the backbone, whose classes have numbers only.
        classes: own classes of the adapter or the backbone.
    """
    own = logits[:classes]
    shares = softmax(own)
    return [
        Answer(label_of(entry, int(i)), float(shares[i]), rank == 0, int(i))
        for rank, i in enumerate(np.argsort(-own, kind="stable"))
    ]


def label_of(entry: AdapterEntry | None, index: int) -> str:
    """Name of a class of an adapter; of the backbone (None) its number."""
    return entry.label(index) if entry is not None else str(index)


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """exp(x) / sum(exp(x)) over the last axis, in float64.

    -inf gives 0; a row that holds NaN or +inf, or nothing but -inf, gives NaN.
    """
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shares = np.exp(wide - wide.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = shares / shares.sum(axis=-1, keepdims=True)
    return result
