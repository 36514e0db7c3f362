"""`verify` judges by what really ran, also where ``auto`` chose it."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from hhdeploy import verify
from hhdeploy.bundle import add_adapter, edit
from hhdeploy.bundle.manifest import MANIFEST
from hhdeploy.choices import BACKENDS, RUNNERS, TYPED
from hhdeploy.errors import BundleError, WriteError
from hhdeploy.exporters.writer import save_graph
from hhdeploy.files.writing import sha256_of
from hhdeploy.parity import PARITY, bound, stage_of
from hhdeploy.runtime import onnxruntime_backend as onnxruntime
from tests.onnxruntime_double import stand_in
from tests.workshop import copy_bundle

WITNESS = Path(__file__).parents[2] / "witnesses" / "v1"


@pytest.fixture(scope="module")
def typed(workshop, tmp_path_factory):
    """A bundle with a float16 and a bfloat16 graph."""
    out = tmp_path_factory.mktemp("typed") / "out"
    return workshop.export(out, ("alpha", "gamma"), precisions=["float16", "bfloat16"]).path


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose CUDA provider works, as far as a CPU can stand in for it."""
    monkeypatch.setattr(onnxruntime, "cuda_available", lambda: True)
    stand_in(monkeypatch, "cuda", "CPUExecutionProvider")


def stages(report):
    return {s.precision: s.stage for s in report.stages}


def test_auto_on_a_gpu_is_judged_by_the_gpu_s_bounds(typed, gpu):
    """The typed graphs themselves, not their twins; the CPU's bounds are ten times narrower."""
    report = verify(typed, device="auto", precisions=["float32", "float16"])
    assert stages(report) == {"float32": "engine", "float16": "engine"}
    assert report.passed
    assert bound("engine", "float32").range_error > bound("branches", "float32").range_error


def test_auto_on_a_cpu_is_judged_by_the_runtime_it_takes(typed, monkeypatch):
    monkeypatch.setattr(onnxruntime, "cuda_available", lambda: False)
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    report = verify(typed, device="auto")
    assert stages(report) | {"bfloat16": ""} == {
        "float32": "openvino",
        "float16": "twin",
        "bfloat16": "",
    }
    assert {s.runtime for s in report.stages if s.precision == "float32"} == {"openvino CPU"}
    assert report.passed


def test_without_temporary_files_what_needs_none_is_verified(typed, monkeypatch):
    """As in a container whose file systems are read-only."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    assert verify(typed, device="cpu", precisions=["float32"]).passed
    with pytest.raises(WriteError, match="set TMPDIR"):
        verify(typed, device="cpu", precisions=["float16"])


def test_auto_without_bfloat16_shows_the_twin(typed, monkeypatch):
    monkeypatch.setattr(onnxruntime, "cuda_available", lambda: False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    report = verify(typed, device="auto")
    assert stages(report) == {"float32": "branches", "float16": "twin", "bfloat16": "twin"}
    assert report.passed


@pytest.mark.parametrize("precision", TYPED)
def test_a_typed_graph_with_other_weights_is_told(typed, tmp_path, precision):
    """Its twin is made of the file that is shipped, not of the float32 graph beside it."""
    path = copy_bundle(typed, tmp_path / "bundle")
    manifest = json.loads((path / MANIFEST).read_text())
    name = manifest["graphs"][precision]
    graph = ir.load(path / name)
    (weights,) = (v for k, v in graph.graph.initializers.items() if "1.mlp.fc2.weight" in k)
    weights.const_value = ir.tensor(-weights.const_value.numpy())
    save_graph(graph, tmp_path / name)
    for file in (name, f"{name}.data"):
        shutil.copy(tmp_path / file, path)
        manifest["files"][file] = sha256_of(path / file)
    (path / MANIFEST).write_text(json.dumps(manifest))
    report = verify(path)
    assert {s.precision for s in report.stages if s.failures} == {precision}


@pytest.mark.parametrize("device", RUNNERS)
@pytest.mark.parametrize("kind", ["folded", "branches"])
def test_every_device_and_precision_has_a_bound(kind, device):
    precisions = {precision for stage, precision in PARITY if stage != "algebra"}
    assert {"float16", "int8-weights", "fp8"} < precisions
    found = {precision: stage_of(kind, device, precision) for precision in precisions}
    assert all((stage, precision) in PARITY for precision, stage in found.items())
    on_cpu = device in ("cpu", "openvino")
    assert ("engine" not in found.values()) is on_cpu


def test_an_adapter_that_is_not_in_the_reference(tmp_path):
    """It counts as verified by somebody's edit: nothing shows that it is."""
    path = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    add_adapter(path, "guest", WITNESS / "rival")
    with edit(path) as change:
        marked = tuple(replace(a, verified=True) for a in change.manifest.adapters)
        change.manifest = replace(change.manifest, adapters=marked)
    with pytest.raises(BundleError, match=r"guest: expected images of it in the reference"):
        verify(path)


@pytest.mark.parametrize("device", BACKENDS)
def test_a_bundle_without_engines_has_none_to_compare(device):
    with pytest.raises(
        BundleError, match=rf"engines for {device} to compare, found none\. Build one"
    ):
        verify(WITNESS / "branches", device=device)
