"""`calibrate_bundle`: from images to a judged graph in the bundle, or an unchanged bundle."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hhdeploy.bundle import Bundle
from hhdeploy.calibration import probe
from hhdeploy.calibration.data import CalibrationData
from hhdeploy.calibration.judging.range_check import check_adapter
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.errors import (
    BackboneError,
    BundleError,
    ConflictError,
    DataError,
    HhdeployError,
    MissingDependencyError,
    ParityError,
    PlanError,
    WriteError,
)
from hhdeploy.files.writing import sha256_of
from hhdeploy.parity import PARITY
from hhdeploy.preprocess import open_image
from hhdeploy.quantising import (
    _PICTURES,
    CalibrationOptions,
    CalibrationResult,
    calibrate_bundle,
)
from hhdeploy.runtime import open_session
from hhdeploy.verifying.bundles import verify_against_torch
from tests.labelled import make_undecided, write_close_calls
from tests.support import images as images_of_noise
from tests.workshop import AGE, PROBE, TAGS, contents, copy_bundle

pytest.importorskip("nncf", reason="NNCF is not installed")

PER_ADAPTER, CALIBRATED = 24, 16
SETTINGS = CalibrationSettings(images=CALIBRATED)
# Where only what comes after NNCF matters: ranges alone, in half of its time.
RANGES = replace(SETTINGS, smooth_quant=None, bias_correction=False)


@pytest.fixture(scope="module", autouse=True)
def timed_briefly():
    """What a graph gains in time is no concern of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hhdeploy.quantising._TIMED", {1: 2, 8: 2})
        yield


@pytest.fixture(scope="module")
def undecided(workshop, small, tmp_path_factory) -> Path:
    """Alpha and gamma with heads that are easily swayed. Read only."""
    return make_undecided(workshop, small, tmp_path_factory.mktemp("undecided"))


@pytest.fixture(scope="module")
def images(undecided, tmp_path_factory) -> Path:
    return write_close_calls(undecided, tmp_path_factory.mktemp("close"), PER_ADAPTER)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """NNCF runs once for all tests that calibrate on the same images."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def calibrate(undecided, images, cache, tmp_path):
    """Calibrate a copy of the undecided bundle; keywords go to the options."""
    path = copy_bundle(undecided, tmp_path / "bundle")

    def run(data=images, settings=SETTINGS, **options) -> CalibrationResult:
        chosen = CalibrationOptions(**{"cache": cache, "threads": 1, **options})
        return calibrate_bundle(path, data, settings, chosen)

    run.path = path  # type: ignore[attr-defined]
    return run


def test_the_graph_and_its_story_are_in_the_bundle(calibrate, tmp_path):
    result = calibrate(report=tmp_path / "report.html")
    bundle = Bundle.open(result.path)
    assert bundle.graph("int8").name == result.file == bundle.manifest.named("model.int8.onnx")
    story = json.loads(bundle.read(bundle.manifest.named("calibration.int8.json")))
    assert story["settings"]["images"] == CALIBRATED
    assert story["data"]["images"] == CALIBRATED
    assert story["accuracy"]["images"] == 2 * PER_ADAPTER - CALIBRATED
    assert story["accuracy"]["held_out"] is True
    assert story["verdict"] == result.findings.verdict()
    assert set(story["bytes"]) == {"float32", "int8"}
    assert story["bytes"]["int8"] < story["bytes"]["float32"]
    assert all(site["sqnr_db"] > 10 for site in story["sites"].values())
    stages = bundle.parity()["stages"]
    assert {s["adapter"] for s in stages if s["precision"] == "int8"} == {"alpha", "gamma"}
    assert "int8 calibration of bundle" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [p.name for p in bundle.path.glob(".*")] == [".old"], "scratch files are gone"


def test_the_accuracy_is_that_of_the_graph_in_the_bundle(calibrate, images):
    """Counted again from the files, with the session that a user opens."""
    result = calibrate()
    lost = 0
    with open_session(result.path, device="cpu", precision="int8", threads=1) as session:
        for question in result.findings.exam.questions:
            logits = session.run(question.load()[None], [question.adapter])
            lost += int(np.argmax(logits) != question.truth)
    tasks = result.findings.accuracy.tasks
    assert sum(task.float_right for task in tasks) == result.findings.accuracy.images
    assert sum(task.lost for task in tasks) == lost > 0, "close calls were chosen to be lost"
    shown = result.findings.changed[: min(lost, _PICTURES)]  # the lost ones come first
    assert len(shown) == min(lost, _PICTURES)
    assert all(c.after.label != c.before.label for c in shown)


def test_the_guard_keeps_sites_until_the_bound_holds(calibrate):
    drop = calibrate().findings.accuracy.drop
    findings = calibrate(max_drop=drop / 2).findings
    guarded = findings.guarded
    assert guarded.kept
    assert findings.accuracy.drop <= drop / 2 < guarded.trials[0].drop == drop
    assert set(findings.kept) == set(guarded.kept)
    assert any("was replaced" in warning for warning in findings.warnings)
    assert any("engines built from it are refused" in warning for warning in findings.warnings)
    free = calibrate(max_drop=drop).findings
    assert (free.guarded.kept, len(free.guarded.trials)) == ((), 1)


def test_all_precisions_come_from_one_calibration(calibrate):
    for precision in ("int8", "fp8", "int8-weights"):
        calibrate(settings=replace(SETTINGS, precision=precision))
    bundle = Bundle.open(calibrate.path)
    assert set(bundle.manifest.graphs) == {"float32", "int8", "fp8", "int8-weights"}
    for precision in bundle.manifest.graphs:
        bundle.graph(precision)


def test_other_images_to_judge_on(calibrate, images, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(images / "gamma", other / "gamma")
    result = calibrate(eval_data=other)
    assert [task.task for task in result.findings.accuracy.tasks] == ["gamma"]
    assert result.findings.exam.source == "other"


def test_a_report_has_names_that_are_not_utf8(calibrate, images, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(images, odd)
    calibrate(settings=RANGES, eval_data=odd, report=tmp_path / "report.html")
    assert "images from “caf\\udce9”" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_arrays_give_agreement_and_are_read_once(calibrate):
    noise = np.random.default_rng(0).standard_normal((10, 3, 32, 32)).astype(np.float32)
    batches = (
        {"images": noise[i : i + 2], "adapters": ["alpha", "gamma"]} for i in range(0, 10, 2)
    )
    findings = calibrate(data=batches, settings=replace(RANGES, images=6)).findings
    assert findings.accuracy.images == 4
    assert findings.accuracy.drop is None
    assert "true classes are unknown" in findings.verdict()


def test_a_reference_of_images_judges_the_graph(workshop, images, cache):
    path = workshop.export(workshop.root / "seen", ("alpha", "gamma"), verify_data=images).path
    options = CalibrationOptions(cache=cache, threads=1)
    result = calibrate_bundle(path, images, RANGES, options)
    assert {stage.comparison.images for stage in result.parity} == {2}
    assert {stage.runtime for stage in result.parity} == {"onnxruntime CPUExecutionProvider"}


def test_graphs_are_judged_by_the_images_that_they_are_compared_on(workshop, images, cache):
    """Not by those of the reference that was there before: noise says nothing of INT8."""
    path = workshop.export(workshop.root / "judged", ("alpha", "gamma")).path  # on noise
    calibrate_bundle(path, images, RANGES, CalibrationOptions(cache=cache, threads=1))

    def compared(**options):
        report = verify_against_torch(
            path, checkpoint=workshop.checkpoint, verify_images=2, **options
        )
        return {stage.precision for stage in report.stages}

    assert compared() == {"float32"}
    assert compared(verify_data=images) == {"float32", "int8"}
    assert compared() == {"float32"}


def test_refusals_leave_the_bundle_as_it_was(calibrate, images, tmp_path, monkeypatch):
    before = contents(calibrate.path)
    shutil.copytree(images / "alpha", tmp_path / "judge" / "alpha")
    of_alpha = CalibrationOptions(eval_data=tmp_path / "judge", max_drop=0.0)
    with pytest.raises(PlanError, match=r"`max_drop=0` needs true classes of gamma, which judge"):
        calibrate_bundle(calibrate.path, images, SETTINGS, of_alpha)
    unlabelled = [{"images": images_of_noise(9), "adapters": ["alpha"] * 9}]
    everything = replace(SETTINGS, images=2 * PER_ADAPTER)
    refused = (
        ({"data": tmp_path / "none"}, DataError, "is not a directory"),
        ({"data": unlabelled, "max_drop": 1.0}, PlanError, "needs true classes"),
        ({"settings": everything, "max_drop": 1.0}, PlanError, "none is left"),
        ({"max_drop": -1.0}, PlanError, "0 or more"),
        ({"settings": replace(SETTINGS, exclude=("nothing.*",))}, PlanError, "fits no site"),
        ({"report": tmp_path / "no" / "report.html"}, WriteError, "report.html"),
    )
    for arguments, error, message in refused:
        with pytest.raises(error, match=message):
            calibrate(**arguments)
        assert contents(calibrate.path) == before, arguments
    strict = replace(PARITY["quantised", "int8"], range_error=0.0)
    monkeypatch.setitem(PARITY, ("quantised", "int8"), strict)  # type: ignore[arg-type]
    with pytest.raises(ParityError, match="`max_drop` or `exclude`"):
        calibrate()
    assert contents(calibrate.path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": replace(SETTINGS, exclude=("nothing.*",))}, "fits no site"),
        ({"settings": replace(SETTINGS, exclude=("*",))}, "nothing is left to quantise"),
        ({"device": "tensorrt"}, "tensorrt"),
    ],
)
def test_what_could_not_be_judged_is_not_calibrated(calibrate, monkeypatch, options, message):
    found = "hhdeploy.calibration.quantised.find_scales"
    monkeypatch.setattr(found, lambda *args, **options: pytest.fail("it was calibrated"))
    with pytest.raises(HhdeployError, match=message):
        calibrate(**options)


def test_a_bundle_that_cannot_be_changed_is_refused_before_slow_work(
    calibrate, workshop, monkeypatch
):
    before = contents(calibrate.path)
    usage = SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr("hhdeploy.bundle.locking.shutil.disk_usage", lambda path: usage)
        with pytest.raises(WriteError, match=r"expected \d\d,\d+ bytes .* found 1,000"):
            calibrate(data="nowhere")
        with pytest.raises(WriteError, match=r"expected \d+,\d+ bytes .* found 1,000"):
            verify_against_torch(calibrate.path, model="no_such_model")

    def read_only(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("hhdeploy.files.scratch.os.mkdir", read_only)
    for change in (
        lambda: calibrate(data="nowhere"),
        lambda: verify_against_torch(calibrate.path, model="no_such_model"),
    ):
        with pytest.raises(WriteError, match="bundle: Read-only file system"):
            change()
    with pytest.raises(BackboneError, match="no_such_model"):  # which would store nothing
        verify_against_torch(calibrate.path, model="no_such_model", precisions=["float16"])
    assert contents(calibrate.path) == before


def test_without_room_for_the_report_the_bundle_stays_as_it_was(calibrate, tmp_path, monkeypatch):
    """It was changed, and the message said that nothing was."""
    before, report = contents(calibrate.path), tmp_path / "report.html"

    def no_room(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hhdeploy.quantising.write_bytes", no_room)
    with pytest.raises(WriteError, match=r"No space left .* Nothing that was there before was"):
        calibrate(settings=RANGES, report=report)
    assert contents(calibrate.path) == before
    assert not report.exists()


def test_a_bundle_that_goes_while_it_is_calibrated_is_no_fault_of_its_graph(
    calibrate, tmp_path, monkeypatch
):
    def gone(graph, *arguments, **options):
        calibrate.path.rename(tmp_path / "elsewhere")
        raise PlanError("NNCF could not quantise the graph")

    monkeypatch.setattr("hhdeploy.calibration.quantised.find_scales", gone)
    with pytest.raises(ConflictError, match="bundle was changed, moved or removed by another"):
        calibrate()
    with pytest.raises(BundleError, match="is not a bundle"):
        calibrate()


def calibrated_files(folder: Path, used: CalibrationData, target: Path) -> Path:
    """Copies of the files of a folder that were calibrated on."""
    target.mkdir()
    digests = {sample.digest for sample in used.samples}
    for file in folder.rglob("*.png"):
        if sha256_of(file) in digests:
            shutil.copyfile(file, target / file.name)
    return target


def test_nncf_is_imported_as_calibration_imports_it(calibrate, monkeypatch):
    """Which puts back what that changes of the caller's: its logger class, its random numbers."""

    def missing(package, *what):
        raise MissingDependencyError(package)

    monkeypatch.setattr(
        "hhdeploy.quantising.require", lambda package, *what: package != "nncf" or missing(package)
    )
    monkeypatch.setattr("hhdeploy.calibration.int8.require", lambda *what: missing("int8's"))
    with pytest.raises(MissingDependencyError, match="int8's"):
        calibrate()


def test_an_adapter_is_checked_against_the_ranges(calibrate, images, tmp_path, monkeypatch):
    def check(data, precision="int8"):
        return check_adapter(calibrate.path, "alpha", data, precision=precision, images=48)

    with pytest.raises(BundleError, match="holds no int8 calibration"):
        check(images)
    calibrate(settings=replace(SETTINGS, exclude=("blocks.0.attn.*",)))
    used = CalibrationData.open(Bundle.open(calibrate.path), images, images=CALIBRATED, seed=0)
    known = check(calibrated_files(images / "alpha", used, tmp_path / "known"))
    own = sum(sample.adapter == "alpha" for sample in used.samples)
    assert (known.images, known.sites) == (own, 8)
    assert known.excess == ()
    assert "stays inside" in known.advice()
    bright = tmp_path / "bright"
    bright.mkdir()
    for index in range(3):
        pixels = np.full((32, 32, 3), 255, np.uint8)
        pixels[:: index + 2] = 0
        Image.fromarray(pixels).save(bright / f"{index}.png")
    narrow = check(bright)
    assert narrow.excess[0].ratio == max(e.ratio for e in narrow.excess) > 1
    assert not [e for e in narrow.excess if e.site.startswith("blocks.0.attn")]
    assert "calibrate again with its images" in narrow.advice()
    # Of a folder for every adapter it reads its own, in its own way, evenly spread.
    files = sorted((images / "gamma").rglob("*.png"))
    transform = Bundle.open(calibrate.path).manifest.preprocess_of(
        Bundle.open(calibrate.path).manifest.adapter("gamma")
    )
    seen: list[Any] = []
    monkeypatch.setattr(probe, "range_excess", lambda *given: seen.extend(given[3]) or [])
    check_adapter(calibrate.path, "gamma", images, precision="int8", images=5)
    for i, feed in enumerate(seen):
        own = transform(open_image(files[i * len(files) // 5]))
        np.testing.assert_array_equal(feed["images"], own[None])
    assert len(seen) == 5
    calibrate(settings=replace(SETTINGS, precision="int8-weights"))
    with pytest.raises(PlanError, match="quantises no activations"):
        check(images, "int8-weights")
    with pytest.raises(BundleError, match="unknown adapter 'nobody'"):
        check_adapter(calibrate.path, "nobody", images, precision="int8", images=4)


def test_labels_and_values_are_judged_by_their_own_scores(heads, cache, tmp_path):
    path, root = copy_bundle(heads, tmp_path / "bundle"), tmp_path / "images"
    random = np.random.default_rng(5)
    for name in ("alpha/class 3", TAGS, AGE, f"{PROBE}/class 0"):
        (root / name).mkdir(parents=True)
        for i in range(8):
            pixels = random.integers(0, 256, (37, 41, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    tags = "\n".join(f"{i}.png,class {i % 3}" for i in range(8))
    (root / TAGS / "labels.csv").write_text(tags)
    (root / AGE / "labels.csv").write_text("\n".join(f"{i}.png,{i}" for i in range(8)))
    options = CalibrationOptions(cache=cache, threads=1, report=tmp_path / "report.html")
    result = calibrate_bundle(path, root, replace(RANGES, images=12), options)
    scores = {t.task: t.score for t in result.findings.accuracy.tasks}
    assert scores == {"alpha": None, TAGS: "mAP", AGE: "MAE", PROBE: None}
    assert f"; {AGE}: MAE" in result.findings.verdict()
    assert f"; {TAGS}: mAP" in result.findings.verdict()
    assert {c.task for c in result.findings.changed} <= {"alpha", PROBE}
    (values,) = [s for s in result.parity if s.adapter == AGE]
    assert (values.comparison.top1, values.comparison.cosine) == (None, None)
    assert "MAE" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("data", [None, {"images": 1}, 5])
def test_what_is_no_data_is_refused_by_its_name(undecided, data):
    with pytest.raises(DataError, match="`data`: expected mappings of arrays in a list or tuple"):
        calibrate_bundle(undecided, data)
