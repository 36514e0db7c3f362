"""What others did while a long piece of work ran: its result is kept as far as it is still true."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import hhdeploy.quantising
from hhdeploy.bundle import Bundle, add_adapter, remove_adapter
from hhdeploy.bundle.locking import BUNDLE
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.errors import ConflictError
from hhdeploy.files.directories import atomic_directory
from hhdeploy.files.tensors import read_tensors
from hhdeploy.quantising import CalibrationOptions, calibrate_bundle
from hhdeploy.runtime import open_session
from hhdeploy.verifying.bundles import verify, verify_against_torch
from hhdeploy.verifying.graphs import add_typed_graph
from tests.calibration.conftest import write_pictures
from tests.support import assert_parity
from tests.workshop import contents, copy_bundle

WITNESS = Path(__file__).parents[2] / "witnesses" / "v1"
LOGITS, _ = read_tensors(WITNESS / "added.safetensors", AssertionError)


@pytest.fixture(scope="module", autouse=True)
def timed_briefly():
    """What a graph gains in time is no concern of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hhdeploy.quantising._TIMED", {1: 2, 8: 2})
        yield


@pytest.fixture
def bundle(tmp_path) -> Path:
    """Alpha, gamma, verified, and rival, added later."""
    return copy_bundle(WITNESS / "added", tmp_path / "bundle")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for number, adapter in enumerate(("alpha", "gamma", "rival")):
        write_pictures(root / adapter / "a", 8, number)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


# --- what others do ------------------------------------------------------------------------------


def added(path):
    add_adapter(path, "guest", WITNESS / "rival")


def removed(path):
    remove_adapter(path, "gamma")


def replaced(path):
    """Gamma is another adapter, in the same row."""
    remove_adapter(path, "gamma")
    add_adapter(path, "gamma", WITNESS / "rival")


def often(path):
    """So often that nothing of the old bundle is left on the disk but its graph."""
    for name in ("a", "b", "c"):
        add_adapter(path, name, WITNESS / "rival")
    remove_adapter(path, "b")


def exported(path):
    """`export --overwrite` of another graph."""
    with atomic_directory(path, overwrite=True, kind=BUNDLE) as scratch:
        shutil.copytree(WITNESS / "folded", scratch, dirs_exist_ok=True)


# What others do -> adapters that are there afterwards and were not verified by the work.
OTHERS = {
    added: {"guest"},
    removed: set(),
    replaced: {"gamma"},
    often: {"a", "c"},
}


@pytest.fixture(params=OTHERS, ids=lambda other: other.__name__)
def other(request):
    return request.param


def meanwhile(monkeypatch, module, function, other, path):
    """``other`` happens once, right after ``module.function`` has done its slow work."""
    real, done = getattr(module, function), []

    def slow(*arguments, **options):
        found = real(*arguments, **options)
        if not done:
            done.append(True)
            other(path)
        return found

    monkeypatch.setattr(module, function, slow)


def names(path):
    return {a.name for a in Bundle.open(path).manifest.adapters}


def unverified(path):
    return {a.name for a in Bundle.open(path).manifest.adapters if not a.verified}


def stages(path, precision):
    found = Bundle.open(path).parity()["stages"]
    return {s["adapter"] for s in found if s["precision"] == precision}


def answers(path, precision="float32"):
    """Every adapter answers as it should, whatever became of the others."""
    bundle = Bundle.open(path)
    bundle.check_files()
    with open_session(path, device="cpu", precision=precision, threads=1) as session:
        for name in session.adapters:
            is_rival = contents(path / "adapters" / name) == contents(WITNESS / "rival")
            known = LOGITS["float32/rival" if is_rival else f"float32/{name}"]
            stage = ("branches", "float32") if precision == "float32" else ("quantised", precision)
            assert_parity(known, session.run(LOGITS["images"], name), *stage)


# --- verify --against-torch ----------------------------------------------------------------------


def test_verification(bundle, other, monkeypatch):
    import hhdeploy.verifying.reference

    meanwhile(monkeypatch, hhdeploy.verifying.reference, "training_time_reference", other, bundle)
    report = verify_against_torch(bundle, checkpoint=WITNESS / "backbone.safetensors")
    assert report.passed
    assert unverified(bundle) == OTHERS[other]
    assert stages(bundle, "float32") == names(bundle) - OTHERS[other]
    found = verify(bundle)
    assert found.passed
    assert {s.adapter for s in found.stages} == names(bundle) - OTHERS[other]
    answers(bundle)


def test_verification_says_nothing_of_another_strength(bundle, monkeypatch):
    """The same files in the same row are another adapter at another strength."""
    import hhdeploy.verifying.reference

    def weakened(path):
        source = shutil.copytree(path / "adapters" / "gamma", path.parent / "gamma")
        row = Bundle.open(path).manifest.adapter("gamma").row
        remove_adapter(path, "gamma")
        assert add_adapter(path, "gamma", source, strength=0.5).row == row

    meanwhile(
        monkeypatch, hhdeploy.verifying.reference, "training_time_reference", weakened, bundle
    )
    verify_against_torch(bundle, checkpoint=WITNESS / "backbone.safetensors")
    assert unverified(bundle) == {"gamma"}
    assert stages(bundle, "float32") == {"alpha", "rival"}
    assert verify(bundle).passed


def test_verification_of_some_graphs_keeps_what_is_known_of_the_others(bundle):
    add_typed_graph(bundle, "float16")
    before = stages(bundle, "float16")
    verify_against_torch(
        bundle, checkpoint=WITNESS / "backbone.safetensors", precisions=["float32"]
    )
    assert stages(bundle, "float16") == before == {"alpha", "gamma"}
    assert stages(bundle, "float32") == {"alpha", "gamma", "rival"}


def test_verification_of_a_bundle_that_was_exported_again(bundle, monkeypatch):
    import hhdeploy.verifying.reference

    meanwhile(
        monkeypatch, hhdeploy.verifying.reference, "training_time_reference", exported, bundle
    )
    with pytest.raises(ConflictError):
        verify_against_torch(bundle, checkpoint=WITNESS / "backbone.safetensors")
    assert contents(bundle) == contents(WITNESS / "folded")


def test_verification_while_a_graph_is_added(bundle, monkeypatch):
    """Its stages stay those that the graph brought; the others are the new ones."""
    import hhdeploy.verifying.reference

    def typed(path):
        add_typed_graph(path, "float16")

    meanwhile(monkeypatch, hhdeploy.verifying.reference, "training_time_reference", typed, bundle)
    verify_against_torch(bundle, checkpoint=WITNESS / "backbone.safetensors")
    assert stages(bundle, "float32") == {"alpha", "gamma", "rival"}
    assert stages(bundle, "float16") == {"alpha", "gamma"}
    assert unverified(bundle) == set()
    assert verify(bundle).passed


def test_verification_while_another_verifies_more(bundle, monkeypatch):
    """What was added and verified meanwhile is not in the reference that comes later."""
    import hhdeploy.verifying.reference

    def verified(path):
        added(path)
        verify_against_torch(path, checkpoint=WITNESS / "backbone.safetensors")
        assert unverified(path) == set()

    meanwhile(
        monkeypatch, hhdeploy.verifying.reference, "training_time_reference", verified, bundle
    )
    verify_against_torch(bundle, checkpoint=WITNESS / "backbone.safetensors")
    assert unverified(bundle) == {"guest"}
    assert {s.adapter for s in verify(bundle).stages} == {"alpha", "gamma", "rival"}


# --- calibrate -----------------------------------------------------------------------------------


def calibrate(path, pictures, cache):
    return calibrate_bundle(
        path, pictures, CalibrationSettings(images=12), CalibrationOptions(cache=cache, threads=1)
    )


def test_calibration(bundle, other, monkeypatch, pictures, cache):
    meanwhile(monkeypatch, hhdeploy.quantising, "make_exam", other, bundle)
    result = calibrate(bundle, pictures, cache)
    assert result.file == Bundle.open(bundle).manifest.graphs["int8"]
    kept = {"alpha", "gamma", "rival"} & names(bundle) - OTHERS[other]
    assert stages(bundle, "int8") == kept
    assert unverified(bundle) == OTHERS[other] | {"rival"}
    answers(bundle)
    answers(bundle, "int8")
    story = json.loads(Bundle.open(bundle).read(Bundle.open(bundle).manifest.named(
        "calibration.int8.json")))  # fmt: skip
    assert story["settings"]["images"] == 12


def test_calibration_of_a_bundle_that_was_exported_again(bundle, monkeypatch, pictures, cache):
    meanwhile(monkeypatch, hhdeploy.quantising, "make_exam", exported, bundle)
    with pytest.raises(ConflictError):
        calibrate(bundle, pictures, cache)
    assert contents(bundle) == contents(WITNESS / "folded")


def test_calibration_of_a_bundle_that_was_exported_again_at_the_last_moment(
    bundle, monkeypatch, pictures, cache
):
    meanwhile(monkeypatch, hhdeploy.quantising, "_stages", exported, bundle)
    with pytest.raises(ConflictError, match="exported again meanwhile"):
        calibrate(bundle, pictures, cache)
    assert contents(bundle) == contents(WITNESS / "folded")
