"""Quantised graphs on trial: written to scratch files, answered, timed, never in the manifest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.store import work_directory
from hhdeploy.calibration.data import CalibrationData
from hhdeploy.calibration.judging.accuracy import Accuracy, Logits, answers, judge
from hhdeploy.calibration.judging.exam import Exam
from hhdeploy.calibration.judging.guard import most_sensitive_first
from hhdeploy.calibration.settings import CalibrationSettings, excluded_sites
from hhdeploy.files.writing import os_errors, sha256_of
from hhdeploy.runtime import Session
from hhdeploy.runtime.session import open_bundle
from hhdeploy.timing import Paired, paired
from hhdeploy.verifying.bundles import Progress

if TYPE_CHECKING:
    from hhdeploy.calibration.calibrate import Quantised
    from hhdeploy.calibration.scales import Calibration

# Sensitivity is an order of sites, not a figure to rely on: a few images tell it.
_SENSITIVITY_IMAGES = 8
# Batch -> pairs of runs.
_TIMED: Mapping[int, int] = {1: 20, 8: 10}


@dataclass(frozen=True)
class Measured:
    """A trial that ran.

    Attributes:
        logits: [images, classes].
        latency: batch -> float32 (a) and quantised (b), in turn.
        sizes: precision -> bytes of every graph, the tried one included.
        device: what computed.
    """

    logits: Logits
    latency: Mapping[int, Paired]
    sizes: Mapping[str, int]
    device: str


class Trials:
    """Graphs of one calibration that differ in the sites they keep in floating point.

    Args:
        bundle: that was calibrated; it is not changed.
        used: what it was calibrated on.
        exam: images to judge on.
        found: the calibration.
        settings: precision, and sites that are kept in any case.
        device: of the sessions.
        threads: of one run on the CPU.
        progress: called with a few words at each step.
    """

    def __init__(
        self,
        bundle: Bundle,
        used: CalibrationData,
        exam: Exam,
        found: Calibration,
        settings: CalibrationSettings,
        *,
        device: str,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self._bundle, self._used, self._exam = bundle, used, exam
        self._found, self._settings, self._progress = found, settings, progress
        self._device, self._threads = device, threads
        progress(f"answering {len(exam.questions)} images in float32")
        with self._session(bundle, "float32") as session:
            self.reference: Logits = answers(session.run, exam.questions)

    def quantised(
        self, kept: tuple[str, ...], sqnr_db: Mapping[str, float] | None = None
    ) -> Quantised:
        """The graph that keeps these sites in floating point."""
        from hhdeploy.calibration.calibrate import quantise

        settings = replace(self._settings, exclude=(*self._settings.exclude, *kept))
        return quantise(self._bundle, self._found, settings, sqnr_db=sqnr_db)

    def accuracy(self, logits: Logits) -> Accuracy:
        """A trial's answers against float32's."""
        exam = self._exam
        return judge(exam.questions, self.reference, logits, held_out=exam.held_out)

    def drop(self, kept: tuple[str, ...]) -> float:
        """Points of mean top-1 that the graph loses which keeps these sites."""
        self._progress(f"judging it with {len(kept)} sites in floating point")
        with self._trial(self.quantised(kept)) as (_, session):
            drop = self.accuracy(answers(session.run, self._exam.questions)).drop
        assert drop is not None, "the caller checks that true classes are known"
        return drop

    def measure(self, quantised: Quantised) -> Measured:
        """Answer every image and time the graph against float32."""
        count, precision = len(self._exam.questions), quantised.precision
        self._progress(f"answering {count} images in {precision}")
        with self._trial(quantised) as (trial, session):
            logits = answers(session.run, self._exam.questions)
            self._progress("timing both graphs in turn")
            with self._session(self._bundle, "float32") as plain:
                latency = self._latency(plain, session)
            sizes = {name: _bytes(trial, name) for name in trial.manifest.graphs}
            return Measured(logits, latency, sizes, session.device)

    def site_sqnr(self) -> dict[str, float]:
        """Of every site's product, in dB; one that only ever gives zeros has none."""
        import onnx_ir as ir

        from hhdeploy.calibration.judging.sensitivity import site_sqnr
        from hhdeploy.calibration.qdq import FORMATS
        from hhdeploy.calibration.sites import find_sites

        self._progress("measuring the signal to noise of every site")
        graph = self._bundle.graph("float32")
        sites = find_sites(ir.load(graph).graph, self._bundle.manifest.backbone.classifier)
        feeds = islice(self._used, _SENSITIVITY_IMAGES)
        form = FORMATS[self._settings.precision]
        figures = site_sqnr(graph, sites, self._found.sites, form, feeds)
        return {name: db for name, db in figures.items() if math.isfinite(db)}

    def most_sensitive_first(self) -> tuple[str, ...]:
        """The sites that are quantised, by what each alone does to the logits."""
        from hhdeploy.calibration.judging.sensitivity import logits_sqnr
        from hhdeploy.calibration.qdq import FORMATS

        self._progress("measuring what every site alone does to the logits")
        names = tuple(self._found.sites)
        excluded = excluded_sites(self._settings, names)
        figures = logits_sqnr(
            self._bundle.graph("float32"),
            self._bundle.manifest.backbone.classifier,
            self._found.sites,
            FORMATS[self._settings.precision],
            list(islice(self._used, _SENSITIVITY_IMAGES)),
            [name for name in names if name not in excluded],
        )
        return most_sensitive_first(figures)

    def _latency(self, plain: Session, session: Session) -> dict[int, Paired]:
        questions, found = self._exam.questions, {}
        for batch, pairs in _TIMED.items():
            chosen = [questions[i % len(questions)] for i in range(batch)]
            images = np.stack([question.load() for question in chosen])
            names = [question.adapter for question in chosen]

            def runs(session: Session) -> Logits:
                return session.run(images, names)  # noqa: B023 (called in this turn of the loop)

            found[batch] = paired(lambda: runs(plain), lambda: runs(session), pairs=pairs)
        return found

    def _session(self, bundle: Bundle, precision: str) -> Session:
        return open_bundle(bundle, device=self._device, precision=precision, threads=self._threads)

    @contextmanager
    def _trial(self, quantised: Quantised) -> Iterator[tuple[Bundle, Session]]:
        """The bundle with the graph in a scratch directory of it, and a session of the graph."""
        from hhdeploy.exporters.writer import graph_name, save_graph

        bundle, name = self._bundle, graph_name(quantised.precision)
        with work_directory(bundle.path) as place:
            with os_errors(place):
                save_graph(quantised.model, place / name)
            files = {f"{place.name}/{n}": sha256_of(place / n) for n in (name, f"{name}.data")}
            manifest = replace(
                bundle.manifest,
                graphs={**bundle.manifest.graphs, quantised.precision: f"{place.name}/{name}"},
                files={**bundle.manifest.files, **files},
            )
            trial = replace(bundle, manifest=manifest)
            with self._session(trial, quantised.precision) as session:
                yield trial, session


def _bytes(bundle: Bundle, precision: str) -> int:
    """Of a graph and its weights on disk."""
    name = bundle.manifest.graphs[precision]
    files = (bundle.path / name, bundle.path / f"{name}.data")
    return sum(file.stat().st_size for file in files if file.is_file())
