"""``hhdeploy calibrate``: from a float32 bundle and images to a judged Q/DQ graph in the bundle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.answers import Logits
from hhdeploy.bundle.locking import check_changeable, left_alone
from hhdeploy.bundle.manifest import PARITY_FILE, REFERENCE_FILE, calibration_files
from hhdeploy.bundle.reading import read_bundle
from hhdeploy.bundle.store import Progress
from hhdeploy.calibration.data import CalibrationData, ImageSource
from hhdeploy.calibration.judging.accuracy import Accuracy, answers, compare_answers
from hhdeploy.calibration.judging.exam import Exam, make_exam
from hhdeploy.calibration.judging.findings import Findings, changed_images
from hhdeploy.calibration.judging.guard import Guarded, check_bound, guard, most_sensitive_first
from hhdeploy.calibration.judging.order import settle_order
from hhdeploy.calibration.options import CalibrationOptions as CalibrationOptions
from hhdeploy.calibration.options import image_source
from hhdeploy.calibration.report.page import report_html
from hhdeploy.calibration.scales import Calibration, write_scales
from hhdeploy.calibration.settings import CalibrationSettings, excluded_sites
from hhdeploy.choices import Precision, QuantisedPrecision, listener, options_of
from hhdeploy.errors import ParityError, require
from hhdeploy.files.outputs import check_output, output_file
from hhdeploy.files.writing import cache_of, write_bytes, write_json
from hhdeploy.parity import ParityReport, StageResult, compare
from hhdeploy.runtime import Session
from hhdeploy.runtime.processor import cores
from hhdeploy.runtime.session import open_bundle
from hhdeploy.timing import Paired, paired, processor
from hhdeploy.verifying.answers import verify_graphs
from hhdeploy.verifying.graphs import commit_graph, graph_on_trial
from hhdeploy.verifying.survival import check_quantised, say

if TYPE_CHECKING:
    from hhdeploy.calibration.quantised import Float32Graph, Quantised

_PICTURES = 12
# Sensitivity is an order of sites, not a figure to rely on: a few images tell it.
_SENSITIVITY_IMAGES = 8
# Batch -> pairs of runs.
_TIMED: Mapping[int, int] = {1: 20, 8: 10}


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration made.

    Attributes:
        path: the bundle.
        file: name of the new graph in it.
        findings: figures, settings, warnings.
        parity: the stages that it passed.
    """

    path: Path
    file: str
    findings: Findings
    parity: tuple[StageResult, ...]


def calibrate_bundle(
    path: str | Path,
    data: ImageSource,
    settings: CalibrationSettings | None = None,
    options: CalibrationOptions | None = None,
    *,
    progress: Progress = lambda step: None,
) -> CalibrationResult:
    """Calibrate, quantise and judge a bundle's float32 graph; add the Q/DQ graph to the bundle.

    A graph of the same precision is replaced; engines built from it are refused from then on.

    Args:
        path: the bundle.
        data: image folder, ``.npz`` file or iterable of arrays; see `CalibrationData.open`.
        settings: what to quantise, and how.
        options: how to judge it.
        progress: called with a few words at each step.

    Raises:
        DataError: images are missing, too few, or do not belong to the bundle.
        PlanError: options that do not go together, a graph that cannot be quantised, or an adapter
            of which rounding leaves nothing.
        ParityError: the guard's bound cannot be kept, or the graph is far from the reference;
            the bundle is unchanged.
        BundleError, WriteError, MissingDependencyError: see their docstrings.
    """
    progress = listener(progress)
    settings = options_of(settings, CalibrationSettings, "settings")
    options = options_of(options, CalibrationOptions, "options")
    bundle = read_bundle(path, Bundle.hold)
    bundle.manifest.check_logits_alone("calibration")
    # A weight in float32 has four bytes, and in no other graph less than one.
    check_changeable(bundle.path, _bytes(bundle, "float32") // 4)
    if options.report is not None:
        check_output(Path(options.report), "`report`: ")
    for package in ("onnx", "onnx_ir", "onnxruntime"):
        require(package, "calibrate", "calibrating")
    from hhdeploy.calibration.int8 import import_nncf
    from hhdeploy.calibration.quantised import Float32Graph, find_scales

    import_nncf()

    data = image_source(data, "data")
    used = CalibrationData.open(bundle, data, images=settings.images, seed=settings.seed)
    source = data if options.eval_data is None else options.eval_data
    exam = make_exam(source, used, seed=settings.seed)
    if options.max_drop is not None:
        check_bound(options.max_drop, exam)
    with left_alone(bundle):
        graph = Float32Graph.open(bundle)
        excluded_sites(settings, tuple(graph.sites))  # a pattern that fits none, not after the work
        if options.device != "cpu":
            _session(bundle, "float32", options).close()  # nor a device that is not there
        progress(f"calibrating on {len(used)} images (cached for the next time)")
        found = find_scales(graph, used, settings, cache=cache_of(options.cache))
        with _session(bundle, "float32", options) as plain:
            trials = _Trials(bundle, graph, found, used, exam, settings, options, plain, progress)
            return trials.add()


@dataclass(frozen=True)
class _Measured:
    """A trial that ran.

    Attributes:
        logits: [images, classes].
        latency: batch -> float32 (a) and quantised (b), in turn.
        sizes: precision -> bytes of every graph, the tried one included.
        device: what computed.
    """

    logits: Logits
    latency: Mapping[int, Paired]
    sizes: Mapping[Precision, int]
    device: str


class _Trials:
    """Graphs of one calibration that differ in the sites they keep in floating point; the chosen
    one joins the bundle.

    Args:
        bundle: that was calibrated.
        graph: its float32 graph.
        found: the calibration.
        used: what it was calibrated on.
        exam: images to judge on.
        settings: precision, and sites that are kept in any case.
        options: how to judge.
        plain: a session of the float32 graph.
        progress: called with a few words at each step.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: Float32Graph,
        found: Calibration,
        used: CalibrationData,
        exam: Exam,
        settings: CalibrationSettings,
        options: CalibrationOptions,
        plain: Session,
        progress: Progress,
    ) -> None:
        self._bundle, self._graph, self._found, self._used = bundle, graph, found, used
        self._settings, self._options = settings, options
        self._plain, self._progress = plain, progress
        progress(f"answering {len(exam.questions)} images in float32")
        self._reference: Logits = answers(plain.run, exam.questions)
        self._exam = settle_order(exam, self._reference)
        if options.max_drop is not None:  # again: whose classes are whose is known only now
            check_bound(options.max_drop, self._exam)

    def add(self) -> CalibrationResult:
        """Choose the sites, judge the graph and add it to the bundle, with what was found."""
        options, precision = self._options, self._settings.precision
        guarded = None
        if options.max_drop is not None:
            guarded = guard(self._most_sensitive_first, self._drop, options.max_drop)
        quantised = self._quantised(guarded.kept if guarded else (), self._site_sqnr())
        with self._trial(quantised) as trial:
            measured = self._measure(trial)
            findings = self._findings(quantised, guarded, measured)
            self._progress("comparing it with the reference")
            stages = _stages(trial, precision, self._exam, self._reference, measured.logits)
            say(self._progress, check_quantised(trial, quantised, self._exam))
            findings_file, scales_file = calibration_files(precision)
            with _report(options.report, findings):
                added = commit_graph(
                    self._bundle,
                    trial,
                    precision,
                    stages,
                    {
                        findings_file: lambda target: write_json(target, findings.to_json()),
                        scales_file: lambda target: write_scales(target, self._found.sites),
                    },
                    lock_timeout=options.lock_timeout,
                    progress=self._progress,
                )
        file = added.manifest.graphs[precision]
        return CalibrationResult(self._bundle.path, file, findings, tuple(stages))

    def _findings(
        self, quantised: Quantised, guarded: Guarded | None, measured: _Measured
    ) -> Findings:
        exam, reference = self._exam, self._reference
        return Findings(
            bundle=self._bundle.path.resolve().name,
            model=self._bundle.manifest.backbone.model,
            quantised=quantised,
            exam=exam,
            accuracy=self._accuracy(measured.logits),
            guarded=guarded,
            changed=changed_images(self._used.feeder, exam, reference, measured.logits, _PICTURES),
            sizes=measured.sizes,
            latency=measured.latency,
            device=measured.device,
            machine=f"{processor()}, {cores()}",
            replaced=quantised.precision in self._bundle.manifest.graphs,
        )

    def _quantised(
        self, kept: tuple[str, ...], sqnr_db: Mapping[str, float] | None = None
    ) -> Quantised:
        """The graph that keeps these sites in floating point."""
        from hhdeploy.calibration.quantised import quantise

        settings = replace(self._settings, exclude=(*self._settings.exclude, *kept))
        return quantise(self._graph, self._found, settings, sqnr_db=sqnr_db)

    def _trial(self, quantised: Quantised) -> AbstractContextManager[Bundle]:
        from hhdeploy.exporters.writer import save_graph

        return graph_on_trial(
            self._bundle, quantised.precision, lambda target: save_graph(quantised.model, target)
        )

    def _accuracy(self, logits: Logits) -> Accuracy:
        """A trial's answers against float32's."""
        exam = self._exam
        return compare_answers(exam.questions, self._reference, logits, held_out=exam.held_out)

    def _drop(self, kept: tuple[str, ...]) -> float:
        """Points of mean top-1 that the graph loses which keeps these sites."""
        self._progress(f"judging it with {len(kept)} sites in floating point")
        with (
            self._trial(self._quantised(kept)) as trial,
            _session(trial, self._settings.precision, self._options) as session,
        ):
            drop = self._accuracy(answers(session.run, self._exam.questions)).drop
        assert drop is not None, "the caller checks that true classes are known"
        return drop

    def _measure(self, trial: Bundle) -> _Measured:
        """Answer every image and time the graph against float32."""
        count, precision = len(self._exam.questions), self._settings.precision
        self._progress(f"answering {count} images in {precision}")
        with _session(trial, precision, self._options) as session:
            logits = answers(session.run, self._exam.questions)
            self._progress("timing both graphs in turn")
            latency = self._latency(session)
            sizes = {name: _bytes(trial, name) for name in trial.manifest.graphs}
            return _Measured(logits, latency, sizes, session.device)

    def _site_sqnr(self) -> dict[str, float]:
        """Of every site's product, in dB; one that only ever gives zeros has none."""
        from hhdeploy.calibration.probe import site_sqnr
        from hhdeploy.calibration.qdq import FORMATS

        self._progress("measuring the signal to noise of every site")
        graph, form = self._graph, FORMATS[self._settings.precision]
        feeds = islice(self._used, _SENSITIVITY_IMAGES)
        figures = site_sqnr(graph.path, graph.sites, self._found.sites, form, feeds)
        return {name: db for name, db in figures.items() if math.isfinite(db)}

    def _most_sensitive_first(self) -> tuple[str, ...]:
        """The sites that are quantised, by what each alone does to the logits."""
        from hhdeploy.calibration.probe import logits_sqnr
        from hhdeploy.calibration.qdq import FORMATS

        self._progress("measuring what every site alone does to the logits")
        names = tuple(self._found.sites)
        excluded = excluded_sites(self._settings, names)
        figures = logits_sqnr(
            self._graph.path,
            self._graph.classifier,
            self._found.sites,
            FORMATS[self._settings.precision],
            list(islice(self._used, _SENSITIVITY_IMAGES)),
            [name for name in names if name not in excluded],
        )
        return most_sensitive_first(figures)

    def _latency(self, session: Session) -> dict[int, Paired]:
        questions, found = self._exam.questions, {}
        for batch, pairs in _TIMED.items():
            chosen = [questions[i % len(questions)] for i in range(batch)]
            images = np.stack([question.load() for question in chosen])
            names = [question.adapter for question in chosen]

            def runs(session: Session) -> Logits:
                return session.run(images, names)  # noqa: B023 (called in this turn of the loop)

            found[batch] = paired(lambda: runs(self._plain), lambda: runs(session), pairs=pairs)
        return found


@contextmanager
def _report(path: str | Path | None, findings: Findings) -> Iterator[None]:
    """The report is written before the block, which commits the graph, and appears after it: where
    there is no room for it, or the graph is refused, neither is there."""
    if path is None:
        yield
        return
    with output_file(Path(path)) as scratch:
        # Names of images are not always text.
        page = report_html(findings).encode(errors="backslashreplace")
        write_bytes(scratch, page)
        yield


def _session(bundle: Bundle, precision: Precision, options: CalibrationOptions) -> Session:
    return open_bundle(bundle, device=options.device, precision=precision, threads=options.threads)


def _stages(
    bundle: Bundle, precision: QuantisedPrecision, exam: Exam, reference: Logits, found: Logits
) -> list[StageResult]:
    """Parity with the stored reference if it is of images, else with the float32 graph on the
    exam's; never on noise, which leaves every calibrated range.

    Raises:
        ParityError: outside the table; unlike `add_graph`'s, it says what to do.
    """
    if _reference_of_images(bundle):
        stages = list(verify_graphs(bundle, "cpu", [precision]).stages)
    else:
        only = bundle.manifest.adapters[0].name if bundle.manifest.kind == "folded" else ""
        names = [question.adapter or only for question in exam.questions]
        stages = []
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            kind = bundle.manifest.problem_type(name)
            figures = compare(reference[rows], found[rows], kind)
            stages.append(StageResult.of("quantised", precision, "float32 graph", name, figures))
    report = ParityReport({}, stages)
    if not report.passed:
        raise ParityError(
            f"the {precision} graph is further from the reference than the parity table "
            f"allows:\n{report.explain_failures()}\nThe bundle is unchanged. Keep the most "
            "sensitive sites in floating point with `max_drop` or `exclude`, "
            "or calibrate on more images of every adapter."
        )
    return stages


def _reference_of_images(bundle: Bundle) -> bool:
    if not (bundle.manifest.has(REFERENCE_FILE) and bundle.manifest.has(PARITY_FILE)):
        return False
    return bool(bundle.parity()["data"].get("kind") == "images")


def _bytes(bundle: Bundle, precision: Precision) -> int:
    """Of a graph and its weights on disk."""
    name = bundle.manifest.graphs[precision]
    files = (bundle.path / name, bundle.path / f"{name}.data")
    return sum(file.stat().st_size for file in files if file.is_file())
