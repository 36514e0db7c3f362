"""The images that quantisation moved most, as answers and as what the model sees of them."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle.answers import softmax
from hhdeploy.calibration.feeds import Feeder
from hhdeploy.calibration.judging.accuracy import Logits
from hhdeploy.calibration.judging.exam import Exam, Question
from hhdeploy.calibration.judging.findings import Answer, Changed
from hhdeploy.preprocess import Preprocess

_LARGEST = 160  # pixels; the report stays a file that can be mailed


def changed_images(
    feeder: Feeder, exam: Exam, reference: Logits, found: Logits, count: int
) -> tuple[Changed, ...]:
    """The ``count`` worst images: lost ones, other answers, then fallen probabilities.

    Args:
        feeder: knows labels and preprocessing.
        exam: n images.
        reference: of the float32 graph, [n, classes].
        found: of the quantised graph.
        count: at most this many; images whose answer did not get less probable never come.
    """
    before, after = softmax(reference), softmax(found)
    answer, other = np.argmax(before, axis=1), np.argmax(after, axis=1)
    rows = np.arange(len(answer))
    fall = before[rows, answer] - after[rows, answer]
    truth = np.asarray([-1 if q.truth is None else q.truth for q in exam.questions])
    lost = (answer == truth) & (other != truth)
    order = np.lexsort((-fall, -(answer != other).astype(int), -lost.astype(int)))
    return tuple(
        _changed(feeder, exam.questions[row], before[row], after[row])
        for row in order[:count]
        if fall[row] > 0
    )


def _changed(
    feeder: Feeder,
    question: Question,
    before: NDArray[np.float64],
    after: NDArray[np.float64],
) -> Changed:
    adapter, names = question.adapter, feeder.class_names(question.adapter)

    def label(column: int) -> str:
        return names[column] if names else str(column)

    def answer(shares: NDArray[np.float64]) -> Answer:
        best = int(np.argmax(shares))
        return Answer(label(best), float(shares[best]))

    return Changed(
        question.source,
        adapter or "",
        None if question.truth is None else label(question.truth),
        answer(before),
        answer(after),
        png_of(question.load(), feeder.preprocess(adapter)),
    )


def png_of(image: NDArray[np.float32], preprocess: Preprocess) -> bytes:
    """A normalised input [3, H, W] as a PNG of what it shows, at most 160 pixels wide or high."""
    from PIL import Image

    mean, std = np.asarray(preprocess.mean), np.asarray(preprocess.std)
    pixels = image.transpose(1, 2, 0) * std + mean
    picture = Image.fromarray(np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8))
    picture.thumbnail((_LARGEST, _LARGEST))
    with io.BytesIO() as file:
        picture.save(file, "PNG", optimize=True)
        return file.getvalue()
