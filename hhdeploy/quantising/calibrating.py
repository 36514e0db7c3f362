"""``hhdeploy calibrate``: from a float32 bundle and images to a judged Q/DQ graph in the bundle."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import PARITY_FILE, REFERENCE_FILE, calibration_files
from hhdeploy.bundle.reading import read_bundle
from hhdeploy.bundle.store import LOCK_TIMEOUT
from hhdeploy.calibration.data import CalibrationData, Source
from hhdeploy.calibration.feeds import Feeder
from hhdeploy.calibration.judging.accuracy import Logits
from hhdeploy.calibration.judging.exam import Exam, make_exam
from hhdeploy.calibration.judging.findings import Findings
from hhdeploy.calibration.judging.guard import guard
from hhdeploy.calibration.report.page import report_html
from hhdeploy.calibration.report.pictures import changed_images
from hhdeploy.calibration.scales_file import write_scales
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.errors import ParityError, PlanError, WriteError, require
from hhdeploy.files.writing import atomic_file, default_cache, write_json
from hhdeploy.parity import ParityReport, StageResult, compare
from hhdeploy.quantising.trials import Trials
from hhdeploy.verifying.bundles import Progress, verify_graphs

_PICTURES = 12


@dataclass(frozen=True)
class CalibrationOptions:
    """How `calibrate_bundle` judges; what it quantises is in `CalibrationSettings`.

    Attributes:
        eval_data: images to judge on; None: those of the data that calibration leaves over.
        max_drop: points of mean top-1 that may be lost; None: no guard.
        report: HTML file to write; None: none.
        device: of the sessions that judge; see ``open_session``.
        threads: of one run on the CPU; None leaves it to the runtime.
        cache: directory of earlier calibrations; "default": see ``default_cache``; None: none.
        lock_timeout: see `hhdeploy.bundle.store.edit`.
    """

    eval_data: Source | None = None
    max_drop: float | None = None
    report: str | Path | None = None
    device: str = "cpu"
    threads: int | None = None
    cache: str | Path | None = "default"
    lock_timeout: float = LOCK_TIMEOUT


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
    data: Source,
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
        PlanError: options that do not go together, or a graph that cannot be quantised.
        ParityError: the guard's bound cannot be kept, or the graph is far from the reference;
            the bundle is unchanged.
        BundleError, WriteError, MissingDependencyError: see their docstrings.
    """
    settings, options = settings or CalibrationSettings(), options or CalibrationOptions()
    bundle = read_bundle(path, Bundle.hold)
    for package in ("onnx", "onnx_ir", "onnxruntime", "nncf"):
        require(package, "calibrate", "calibrating")
    from hhdeploy.calibration.calibrate import calibrate
    from hhdeploy.exporters.writer import save_graph
    from hhdeploy.exporting.graphs import add_graph

    if not isinstance(data, str | Path):
        data = list(data)  # it is read twice: to calibrate, and for what is left over
    used = CalibrationData.open(bundle, data, images=settings.images, seed=settings.seed)
    source = data if options.eval_data is None else options.eval_data
    exam = make_exam(bundle, source, used, seed=settings.seed)
    _check_options(options, exam)
    progress(f"calibrating on {len(used)} images (cached for the next time)")
    cache = default_cache() if options.cache == "default" else options.cache
    found = calibrate(bundle, used, settings, cache=Path(cache) if cache is not None else None)
    trials = Trials(
        bundle,
        used,
        exam,
        found,
        settings,
        device=options.device,
        threads=options.threads,
        progress=progress,
    )
    guarded = None
    if options.max_drop is not None:
        guarded = guard(trials.most_sensitive_first, trials.drop, options.max_drop)
    quantised = trials.quantised(guarded.kept if guarded else (), trials.site_sqnr())
    measured = trials.measure(quantised)
    findings = Findings(
        bundle=bundle.path.resolve().name,
        model=bundle.manifest.backbone.model,
        quantised=quantised,
        exam=exam,
        accuracy=trials.accuracy(measured.logits),
        guarded=guarded,
        changed=changed_images(Feeder(bundle), exam, trials.reference, measured.logits, _PICTURES),
        sizes=measured.sizes,
        latency=measured.latency,
        device=measured.device,
        machine=_machine(),
        replaced=settings.precision in bundle.manifest.graphs,
    )
    stages: list[StageResult] = []

    def judge(candidate: Bundle) -> Sequence[StageResult]:
        progress("comparing it with the reference")
        stages.extend(
            _stages(candidate, settings.precision, exam, trials.reference, measured.logits)
        )
        return stages

    findings_file, scales_file = calibration_files(settings.precision)
    added = add_graph(
        bundle,
        settings.precision,
        lambda target: save_graph(quantised.model, target),
        judge,
        {
            findings_file: lambda target: write_json(target, findings.to_json()),
            scales_file: lambda target: write_scales(target, found.sites),
        },
        lock_timeout=options.lock_timeout,
        progress=progress,
    )
    if options.report is not None:
        with atomic_file(Path(options.report)) as scratch:
            scratch.write_text(report_html(findings), encoding="utf-8")
    file = added.manifest.graphs[settings.precision]
    return CalibrationResult(bundle.path, file, findings, tuple(stages))


def _stages(
    bundle: Bundle, precision: str, exam: Exam, reference: Logits, found: Logits
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
            figures = compare(reference[rows], found[rows])
            stages.append(StageResult.of("quantised", precision, "float32 graph", name, figures))
    report = ParityReport({}, stages)
    if not report.passed:
        raise ParityError(
            f"the {precision} graph is further from the reference than the parity table "
            f"allows:\n{report.explain_failures()}\nThe bundle is unchanged. Keep the most "
            "sensitive sites in floating point with --max-drop POINTS or --exclude PATTERN, "
            "or calibrate on more images of every adapter."
        )
    return stages


def _check_options(options: CalibrationOptions, exam: Exam) -> None:
    """Before anything slow: the report can be written, and the guard has what it needs, which
    is true classes of images that were not calibrated on."""
    if options.report is not None and not Path(options.report).resolve().parent.is_dir():
        raise WriteError(
            f"--report {options.report}: {Path(options.report).parent} is not a directory. Make "
            "it first, or choose another."
        )
    max_drop = options.max_drop
    if max_drop is None:
        return
    if not max_drop >= 0:
        raise PlanError(f"--max-drop: expected points of top-1, 0 or more, found {max_drop}.")
    if not exam.labelled:
        raise PlanError(
            f"--max-drop {max_drop:g} needs true classes, which {exam.source} does not tell. Pass "
            "a folder with --eval-data DIR: DIR/CLASS/image, for side branches "
            "DIR/ADAPTER/CLASS/image."
        )
    if not exam.held_out:
        raise PlanError(
            f"--max-drop {max_drop:g} needs images that calibration does not use; of {exam.source} "
            "none is left. Pass others with --eval-data DIR, or a smaller --images."
        )


def _reference_of_images(bundle: Bundle) -> bool:
    if not (bundle.manifest.has(REFERENCE_FILE) and bundle.manifest.has(PARITY_FILE)):
        return False
    return bool(bundle.parity()["data"].get("kind") == "images")


def _machine() -> str:
    """The processor's name and how many cores it shows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
