"""An open session reads no file any more: what is written into its files changes no answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from hhdeploy.errors import BundleError
from hhdeploy.runtime import open_session
from tests.support import assert_parity, images

# What hands weights over, from ONNX Runtime 1.24 on.
GIVEN = "add_external_initializers_from_files_in_memory"
WITNESS = Path(__file__).parents[1] / "witnesses" / "v1"


def runtime_of(device):
    if device == "openvino":
        pytest.importorskip("openvino")
        return
    if not hasattr(pytest.importorskip("onnxruntime").SessionOptions, GIVEN):
        pytest.skip("ONNX Runtime before 1.24 maps the file")


def mapped(folder):
    """Files in a folder that this process has mapped."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return {line[line.index(str(folder)) :] for line in lines if str(folder) in line}


def written_in_place(folder):
    """Every file of a folder, of the same length and full of something else; then cut off."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    random = np.random.default_rng(0)
    for path in files:
        with path.open("r+b") as stream:
            stream.write(random.normal(size=path.stat().st_size // 4).astype("<f4").tobytes())
    yield
    for path in files:
        path.write_bytes(b"x" * 10)
    yield


@pytest.mark.parametrize("device", ["cpu", "openvino"])
@pytest.mark.parametrize(
    ("bundle", "precision"), [("branches", "float32"), ("folded", "float32"), ("int8", "int8")]
)
def test_files_that_are_written_while_a_session_is_open(tmp_path, device, bundle, precision):
    runtime_of(device)
    shutil.copytree(WITNESS / bundle, tmp_path / "bundle")
    with open_session(
        tmp_path / "bundle", device=device, precision=precision, threads=1, cache=None
    ) as session:
        name = session.bundle.manifest.adapters[0].name
        before = session.run(images(3), name)
        for _ in written_in_place(tmp_path / "bundle"):
            assert np.array_equal(session.run(images(3), name), before)
            # OpenVINO would compile a single image's own model now, from files that it refuses.
            stage = "quantised" if precision == "int8" else "openvino"
            assert_parity(before[:1], session.run(images(3)[:1], name), stage, precision)
            assert not mapped(tmp_path)


def test_a_mapped_file_that_is_written_is_not_answered_with(tmp_path, monkeypatch):
    """ONNX Runtime before 1.24 cannot be given its weights."""
    options = pytest.importorskip("onnxruntime").SessionOptions
    for kind in options.__mro__:
        if GIVEN in vars(kind):
            monkeypatch.delattr(kind, GIVEN)
    shutil.copytree(WITNESS / "branches", tmp_path / "bundle")
    with open_session(tmp_path / "bundle", device="cpu", threads=1) as session:
        before = session.run(images(3), "alpha")
        data = tmp_path / "bundle" / "model.onnx.data"
        data.rename(tmp_path / "moved")  # as a bundle that is replaced: harms nothing
        shutil.copy(tmp_path / "moved", data)
        assert np.array_equal(session.run(images(3), "alpha"), before)
        with (tmp_path / "moved").open("r+b") as stream:
            stream.write(bytes(1000))
        with pytest.raises(BundleError, match=r"model\.onnx\.data was written while it is in use"):
            session.run(images(3), "alpha")
