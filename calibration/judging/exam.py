"""The images that a quantised graph is judged on: none of those that it was calibrated on.

Whether an image was calibrated on is decided by its content, so a copy under another name, or
the same folder given twice, is found out.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.config import CLASSES, ProblemType
from hhdeploy.calibration.data import CalibrationData, ImageSource, choose_images, in_copies
from hhdeploy.calibration.feeds import Feeder, picture_digest, whose
from hhdeploy.errors import abbreviate

_ALL = sys.maxsize
# With fewer images of a task, one image is more than 5 points of its top-1.
FEW_JUDGED = 20


@dataclass(frozen=True)
class Question:
    """One image to judge on.

    Attributes:
        adapter: whose image it is; None: a folded bundle's only adapter.
        truth: column of the true class; None if unknown.
        source: name of the file, or number of the array.
        load: makes float32 [3, H, W], normalised.
        problem_type: what the adapter's logits mean.
        truths: of labels 1 or 0 each, or the values; None if unknown, and of classes.
        as_text: the true class's column, should the training have sorted its folders, which are
            numbers, as text; None where there is no such doubt, and once it is settled.
    """

    adapter: str | None
    truth: int | None
    source: str
    load: Callable[[], NDArray[np.float32]]
    problem_type: ProblemType = CLASSES
    truths: tuple[float, ...] | None = None
    as_text: int | None = None


@dataclass(frozen=True)
class _Column:
    """Of a class folder: by its name or number; and ``as_text`` as of `Question`."""

    truth: int
    as_text: int | None = None


@dataclass(frozen=True)
class Exam:
    """Images to judge on, tasks in turn, so that every batch mixes them.

    Attributes:
        questions: the images.
        held_out: False: they are the calibration images themselves, for want of others.
        source: name of the folder or file.
        warnings: what limits the verdict, in words.
        unjudged: adapters that were calibrated on, and have no image here, or none that was not
            calibrated on: whether they lost any of their top-1 is not known. None: the bare
            backbone.
        undecided: adapters without class names, whose folders are numbers in one of two orders
            that float32's answers do not tell apart.
        reasons: those of the warnings that say why it is not known what an adapter lost.
    """

    questions: tuple[Question, ...]
    held_out: bool
    source: str
    warnings: tuple[str, ...]
    unjudged: tuple[str | None, ...] = ()
    undecided: tuple[str | None, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def untold(self) -> tuple[str | None, ...]:
        """Adapters with classes, of none of whose images the true one is known."""
        asked = [q for q in self.questions if q.problem_type == CLASSES]
        told = {q.adapter for q in asked if q.truth is not None}
        return tuple(dict.fromkeys(q.adapter for q in asked if q.adapter not in told))

    @property
    def has_classes(self) -> bool:
        """Some image's task has classes, of which one is true: neither labels nor values."""
        return any(q.problem_type == CLASSES for q in self.questions)


def make_exam(source: ImageSource, used: CalibrationData, *, seed: int) -> Exam:
    """All images of ``source`` that calibration did not use; all of them if none is left.

    Args:
        source: as for `CalibrationData.open`; only folders give true classes.
        used: what was calibrated on.
        seed: of the order.

    Raises:
        DataError: no images, or not those of the bundle's adapters.
    """
    feeder = used.feeder
    seen = {sample.digest for sample in used.samples}
    warnings: list[str] = []
    reasons: list[str] = []
    if isinstance(source, str | Path) and Path(source).suffix != ".npz":
        name = Path(source).name
        pairs = _from_folder(feeder, Path(source), seed, warnings, reasons)
    else:
        name = Path(source).name if isinstance(source, str | Path) else "a Python iterable"
        pairs = _from_arrays(feeder, source, seed)
    fresh = [pair for pair in pairs if pair[0] not in seen]
    if fresh:
        left = _tasks([q for _, q in fresh])
        missing = [task for task in _tasks([q for _, q in pairs]) if task not in left]
        reasons += [f"{whose(task)}no image is left to judge on" for task in missing]
    else:
        warnings.append(
            "no image is left that calibration did not use: the figures are of the calibration "
            "images themselves, which flatters the quantised graph. Pass `eval_data` or "
            "fewer `images`."
        )
    judged = fresh or pairs
    questions = [question for _, question in judged]
    different = Counter(adapter for adapter, _ in {(q.adapter, digest) for digest, q in judged})
    calibrated = dict.fromkeys(sample.adapter for sample in used.samples)
    absent = [task for task in calibrated if task not in _tasks([q for _, q in pairs])]
    reasons += [f"{whose(task)}no image to judge on" for task in absent]
    unjudged = [task for task in calibrated if task not in _tasks(questions)]
    warnings += [
        f"{whose(task)}judged on {in_copies(different[task], count)} images only: one image is "
        f"{100 / different[task]:.1f} points"
        for task, count in _tasks(questions).items()
        if different[task] < FEW_JUDGED
    ]
    return Exam(
        tuple(questions),
        bool(fresh),
        name,
        (*reasons, *warnings),
        tuple(unjudged),
        reasons=tuple(reasons),
    )


def _from_folder(
    feeder: Feeder, folder: Path, seed: int, warnings: list[str], reasons: list[str]
) -> list[tuple[str, Question]]:
    chosen = choose_images(feeder, folder, _ALL, seed, judging=True)
    warnings += chosen.warnings
    classes: dict[str | None, set[str]] = {}
    for picked in chosen.images:
        if feeder.problem_type(picked.adapter) != CLASSES:
            continue  # labels and values have their truths with them
        classes.setdefault(picked.adapter, set()).add(picked.label)
    columns = {
        adapter: _columns(feeder, adapter, sorted(names), warnings, reasons)
        for adapter, names in classes.items()
    }
    pairs = []
    for picked in chosen.images:
        known = columns.get(picked.adapter)
        column = known.get(picked.label) if known is not None else None
        if known is not None and column is None:
            continue  # a folder that is no class of the adapter: a warning says so
        question = Question(
            picked.adapter,
            column.truth if column is not None else None,
            picked.path.name,
            feeder.loader(picked.adapter, picked.path),
            feeder.problem_type(picked.adapter),
            picked.truths,
            column.as_text if column is not None else None,
        )
        pairs.append((picture_digest(picked.path), question))
    return pairs


def _from_arrays(feeder: Feeder, source: ImageSource, seed: int) -> list[tuple[str, Question]]:
    data = CalibrationData.of(feeder, source, images=_ALL, seed=seed)
    return [
        (
            sample.digest,
            Question(
                sample.adapter,
                None,
                sample.source,
                sample.load,
                feeder.problem_type(sample.adapter),
            ),
        )
        for sample in data.samples
    ]


def _columns(
    feeder: Feeder,
    adapter: str | None,
    folders: Sequence[str],
    warnings: list[str],
    reasons: list[str],
) -> dict[str, _Column] | None:
    """Class folder -> column of the logits; None if nothing tells."""
    names = feeder.class_names(adapter)
    if names is not None:
        if twice := [name for name in folders if names.count(name) > 1]:
            reasons.append(
                f"{whose(adapter)}several of its classes are called {abbreviate(twice)}: which one "
                "a folder has the images of is unknown, and they are not judged on"
            )
        found = {n: _Column(names.index(n)) for n in folders if n in names and n not in twice}
        if not found:
            reasons.append(
                f"{whose(adapter)}none of the folders ({abbreviate(folders)}) is one of its "
                f"classes ({abbreviate(names)}): only agreement is reported"
            )
        return found or None
    count = feeder.class_count(adapter)
    numbered = _numbered(folders, count)
    if numbered is not None:
        return numbered
    if len(folders) == count:
        warnings.append(
            f"{whose(adapter)}the adapter has no class names: its folders are taken as classes "
            "in alphabetical order, as torchvision's ImageFolder does"
        )
        return {name: _Column(column) for column, name in enumerate(folders)}
    reasons.append(
        f"{whose(adapter)}{len(folders)} folders, {count} classes without names: which folder "
        "is which class is unknown: only agreement is reported"
    )
    return None


def _numbered(folders: Sequence[str], count: int) -> dict[str, _Column] | None:
    """Of folders that are numbers: columns, or else places in the order of all that there were."""
    if not all(name.isdecimal() for name in folders):
        return None
    if all(int(name) < count for name in folders):
        columns = {name: int(name) for name in folders}
        # Where they are written with zeros in front both orders are the same.
        plain = all(name == str(column) for name, column in columns.items())
        as_text = sorted(map(str, range(count))) if plain else []
    else:
        columns = {name: column for column, name in enumerate(sorted(folders, key=int))}
        as_text = sorted(folders)
        if len(folders) != count or as_text == list(columns):
            return None
    return {
        name: _Column(column, as_text.index(name) if as_text else None)
        for name, column in columns.items()
    }


def _tasks(questions: Sequence[Question]) -> dict[str | None, int]:
    """Images of each task."""
    return dict(Counter(q.adapter for q in questions))
