"""Everything that one calibration found: what its JSON, the report and the command line show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.config import CLASSES
from hhdeploy.bundle.answers import Logits, softmax
from hhdeploy.calibration.feeds import Feeder
from hhdeploy.calibration.judging.accuracy import NEVER_SEEN, TWO_SIDED_95, Accuracy
from hhdeploy.calibration.judging.exam import Exam, Question
from hhdeploy.calibration.judging.guard import Guarded
from hhdeploy.choices import Precision, QuantisedPrecision
from hhdeploy.preprocess import Preprocess
from hhdeploy.timing import Paired

if TYPE_CHECKING:
    from hhdeploy.calibration.quantised import Quantised


@dataclass(frozen=True)
class Guess:
    """A class and its probability (softmax over the adapter's own classes)."""

    label: str
    probability: float


@dataclass(frozen=True, eq=False)
class Changed:
    """One image that quantisation hurt.

    Attributes:
        source: file name.
        task: the adapter; empty for a folded bundle's.
        truth: true class, None if unknown.
        before: answer of the float32 graph.
        after: answer of the quantised graph.
        pixels: what the model sees of the image, [H, W, channels] from 0 to 1.
    """

    source: str
    task: str
    truth: str | None
    before: Guess
    after: Guess
    pixels: NDArray[np.float64]


@dataclass(frozen=True)
class Findings:
    """One calibrated, quantised and judged graph.

    Attributes:
        bundle: name of the directory.
        model: timm name of the backbone.
        quantised: the graph and how it came about.
        exam: the images it was judged on.
        accuracy: the verdict.
        guarded: what the guard decided; None without ``max_drop``.
        changed: the images that it hurt most, the worst first.
        sizes: precision -> bytes of graph and weights on disk.
        latency: batch -> float32 (a) and quantised (b), in turn.
        device: what computed, as the session says it.
        machine: where.
        replaced: the bundle had a graph of this precision before.
    """

    bundle: str
    model: str
    quantised: Quantised
    exam: Exam
    accuracy: Accuracy
    guarded: Guarded | None
    changed: tuple[Changed, ...]
    sizes: Mapping[Precision, int]
    latency: Mapping[int, Paired]
    device: str
    machine: str
    replaced: bool

    @property
    def precision(self) -> QuantisedPrecision:
        """Of the quantised graph."""
        return self.quantised.precision

    @property
    def kept(self) -> tuple[str, ...]:
        """Sites that stay in floating point, for whatever reason."""
        return tuple(n for n, info in self.quantised.sites.items() if not info.quantised)

    @property
    def warnings(self) -> tuple[str, ...]:
        """All that the user should know, each once."""
        found = [*self.quantised.warnings, *self.exam.warnings, *self._doubts()]
        return tuple(dict.fromkeys(found))

    def verdict(self) -> str:
        """What quantisation costs, in one sentence."""
        name, accuracy = self.precision.upper().replace("-WEIGHTS", " weights"), self.accuracy
        images = f"{accuracy.images} {'held-out' if accuracy.held_out else 'calibration'} images"
        tail = f"{self._others_in_words()}{self._kept_in_words()}"
        drop, worst = accuracy.drop, accuracy.worst
        if drop is None or worst is None:
            return (
                f"{name} gives the answer of float32 on {accuracy.agreement:.1%} of {images}, "
                f"whose true classes are unknown{tail}."
            )
        change = f"{accuracy.float_top1:.2f} % to {accuracy.quantised_top1:.2f} %"
        costs = f"costs {drop:.2f} points" if drop > 0 else "costs nothing"
        several = len(accuracy.labelled) > 1
        last = _worst(worst.task, worst.drop or 0.0) if several else ""
        return (
            f"{name} {costs} of {'mean ' if several else ''}top-1 ({change}{self._chance(drop)}) "
            f"on {images}{last}{tail}."
        )

    def to_json(self) -> dict[str, Any]:
        """The bundle's ``calibration.<precision>.json``, without pictures."""
        return {
            "schema_version": 1,
            "verdict": self.verdict(),
            **self.quantised.to_json(),
            "accuracy": {"source": self.exam.source, **self.accuracy.to_json()},
            "guard": self.guarded.to_json() if self.guarded else None,
            "bytes": dict(self.sizes),
            "latency": {
                "device": self.device,
                "machine": self.machine,
                "a": "float32",
                "b": self.precision,
                "batches": {str(batch): pair.to_json() for batch, pair in self.latency.items()},
            },
            "changed": [
                {k: v for k, v in asdict(image).items() if k != "pixels"} for image in self.changed
            ],
            "warnings": list(self.warnings),
        }

    def _chance(self, drop: float) -> str:
        """How far the drop is told apart from none."""
        accuracy = self.accuracy
        if not any((task.lost or 0) + (task.gained or 0) for task in accuracy.labelled):
            images = sum(task.images for task in accuracy.labelled)
            open_ = 100 * NEVER_SEEN / images
            return f"; no answer turned right or wrong, which leaves up to {open_:.1f} points open"
        error = accuracy.standard_error or 0.0
        unclear = ", not told apart from no loss" if 0 < drop <= TWO_SIDED_95 * error else ""
        return f", standard error {error:.2f}{unclear}"

    def _others_in_words(self) -> str:
        """Scores of labels and values."""
        told = [(t.task or "all", t.scores) for t in self.accuracy.tasks if t.scores is not None]
        return "".join(f"; {task}: {a} to {b}" for task, (a, b) in told)

    def _kept_in_words(self) -> str:
        kept, sites = len(self.kept), len(self.quantised.sites)
        if self.guarded is not None:
            bound = f"the bound of {self.guarded.max_drop:g} points"
            return f"; {f'{kept} of {sites}' if kept else 'no'} sites stay float to keep {bound}"
        return f"; {kept} of {sites} sites stay float" if kept else ""

    def _doubts(self) -> list[str]:
        doubts, error = [], self.accuracy.standard_error
        if self.guarded is not None and error is not None:
            if error > self.guarded.max_drop:
                doubts.append(
                    f"{self.accuracy.images} images cannot resolve a bound of "
                    f"{self.guarded.max_drop:g} points: the standard error is {error:.2f}. Pass "
                    "more as `eval_data`"
                )
            if self.guarded.kept:
                doubts.append(
                    "the guard chose the sites on the images that it reports: the drop on others "
                    "may be a little larger"
                )
        if self.replaced:
            doubts.append(
                f"the bundle's earlier {self.precision} graph was replaced: engines built from it "
                "are refused. Build them again with `build()`"
            )
        return doubts


def changed_images(
    feeder: Feeder, exam: Exam, reference: Logits, found: Logits, count: int
) -> tuple[Changed, ...]:
    """The ``count`` worst images: lost ones, other answers, then fallen probabilities.

    Args:
        feeder: knows labels and preprocessing.
        exam: n images.
        reference: of the float32 graph, [n, classes].
        found: of the quantised graph.
        count: at most this many; images whose answer did not get less probable never come, nor
            those of labels and values.
    """
    before, after = softmax(reference), softmax(found)
    answer, other = np.argmax(before, axis=1), np.argmax(after, axis=1)
    rows = np.arange(len(answer))
    fall = before[rows, answer] - after[rows, answer]
    fall[[q.problem_type != CLASSES for q in exam.questions]] = 0.0  # no one class to lose
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

    def answer(shares: NDArray[np.float64]) -> Guess:
        best = int(np.argmax(shares))
        return Guess(label(best), float(shares[best]))

    return Changed(
        question.source,
        adapter or "",
        None if question.truth is None else label(question.truth),
        answer(before),
        answer(after),
        pixels_of(question.load(), feeder.preprocess(adapter)),
    )


def pixels_of(image: NDArray[np.float32], preprocess: Preprocess) -> NDArray[np.float64]:
    """What a normalised input [channels, H, W] shows: [H, W, channels] from 0 to 1."""
    mean, std = np.asarray(preprocess.mean), np.asarray(preprocess.std)
    shown: NDArray[np.float64] = np.clip(image.transpose(1, 2, 0) * std + mean, 0, 1)
    return shown


def _worst(task: str, drop: float) -> str:
    if drop <= 0:
        return "; no task loses"
    return f"; the worst task, {task}, loses {drop:.2f}"
