"""Wrong weights that the bounds of 8 and 16 bits, or noise, do not show; wrong manifests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from hhdeploy import verify, verify_against_torch
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import calibration_files, write_manifest
from hhdeploy.choices import Precision
from hhdeploy.errors import BundleError
from hhdeploy.exporters.writer import rename_weights, save_graph
from hhdeploy.files.tensors import read_tensors, tensor_bytes
from hhdeploy.files.writing import sha256_of
from hhdeploy.verifying.contents import _not_rounded, check_contents
from hhdeploy.verifying.graphs import add_typed_graph
from tests.once import made_once
from tests.workshop import copy_bundle, run_python

INT8 = Path(__file__).parents[2] / "witnesses" / "v1" / "int8"


@pytest.fixture(scope="module", params=["small", "folded", "constant"])
def typed(request) -> Path:
    """A bundle with both graphs in 16 bits. Read only."""
    source = request.getfixturevalue(request.param)

    def make(out: Path) -> None:
        copy_bundle(source, out)
        add_typed_graph(out, "float16")
        add_typed_graph(out, "bfloat16")

    return made_once(f"typed-{request.param}", make)


def test_whole_graphs_pass(typed):
    check_contents(Bundle.open(typed), None)
    check_contents(Bundle.open(INT8), None)
    assert verify(INT8).passed


def plant(path: Path, precision: Precision, name: str, change: Callable[[NDArray], None]) -> None:
    """Change a constant of a graph, and give the bundle the hashes of what is there then."""
    bundle = Bundle.open(path)
    file = bundle.manifest.graphs[precision]
    model = ir.load(path / file)
    (full,) = (n for n in model.graph.initializers if n.endswith(name))
    value = model.graph.initializers[full]
    array = value.const_value.numpy().copy()
    change(array)
    value.const_value = ir.tensor(array, name=full)
    save_graph(model, path / "planted.onnx")
    rename_weights(path / "planted.onnx", f"{file}.data")
    (path / "planted.onnx").replace(path / file)
    made_right(path)


def made_right(path: Path) -> None:
    manifest = Bundle.open(path).manifest
    files = {name: sha256_of(path / name) for name in manifest.files}
    write_manifest(path, replace(manifest, files=files))


def negate(weight: NDArray) -> None:
    """One output of a Linear has the other sign."""
    weight[:, 5] *= -1


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_one_row_of_a_weight_in_16_bits(typed, tmp_path, precision):
    path = "blocks.0.mlp.fc1"
    bundle = copy_bundle(typed, tmp_path / "bundle")
    plant(bundle, precision, f"{path}.weight_t", negate)
    message = (
        f"{path}.weight_t. The graph is damaged, or another bundle's. Get the bundle's files again"
    )
    with pytest.raises(BundleError) as caught:
        verify(bundle)
    assert message in str(caught.value)
    assert f"those of model.onnx, in {precision}; found others" in str(caught.value)
    verify(bundle, precisions=["float32"])


def test_a_constant_that_a_graph_in_16_bits_does_not_have(typed, tmp_path):
    """A norm of one block reads the other's: every constant that is left has its value."""
    bundle = copy_bundle(typed, tmp_path / "bundle")
    path = bundle / Bundle.open(bundle).manifest.graphs["float16"]
    model = ir.load(path)
    lost, other = (model.graph.initializers[f"blocks.{i}.norm1.weight"] for i in (0, 1))
    lost.replace_all_uses_with(other)
    del model.graph.initializers[str(lost.name)]
    save_graph(model, bundle / "planted.onnx")
    rename_weights(bundle / "planted.onnx", f"{path.name}.data")
    (bundle / "planted.onnx").replace(path)
    made_right(bundle)
    with pytest.raises(BundleError, match=r"found others: blocks.0.norm1.weight\."):
        check_contents(Bundle.open(bundle), ["float16"])


def test_constants_in_16_bits_are_those_of_float32_and_no_others():
    """Rounded, clamped and beside a copy in float32; infinities stay."""

    def constants(**arrays: NDArray) -> ir.Graph:
        values = [
            ir.Value(name=name, const_value=ir.tensor(array, name=name))
            for name, array in arrays.items()
        ]
        return ir.Graph([], [], nodes=[], initializers=values)

    mask = np.asarray([-3e38, -np.inf, 1.0001], np.float32)
    plain = {"w": np.asarray([1.0001, 2], np.float32), "mask": mask, "size": np.asarray([1, 3])}
    low = np.asarray([-65504, -np.inf, 1], np.float16)
    w = plain["w"].astype(np.float16)
    right = {**plain, "w/float16": w, "mask": low}

    def wrong(**changed: NDArray) -> list[str]:
        return list(_not_rounded(constants(**plain), constants(**{**right, **changed}), "float16"))

    assert not wrong()
    assert wrong(more=w) == ["more"]
    assert wrong(mask=np.asarray([-np.inf, -np.inf, 1], np.float16)) == ["mask"]
    assert wrong(size=np.asarray([1, 4])) == ["size"]
    assert wrong(size=np.asarray([[1, 3]])) == ["size"]
    assert wrong(size=np.asarray([1, 3], np.uint64)) == ["size"]
    assert wrong(size=np.asarray([1, 3], np.float16)) == ["size"]
    assert wrong(**{"w/float16": w[::-1]}) == ["w/float16"]
    del right["size"]
    assert wrong() == ["size"]


def test_against_torch_too(typed, workshop, tmp_path):
    bundle = copy_bundle(typed, tmp_path / "bundle")
    plant(bundle, "bfloat16", "blocks.0.mlp.fc1.weight_t", negate)
    before = (bundle / "hhdeploy.json").read_bytes()
    with pytest.raises(BundleError, match=r"found others: blocks.0.mlp.fc1.weight_t"):
        verify_against_torch(bundle, checkpoint=workshop.checkpoint)
    assert (bundle / "hhdeploy.json").read_bytes() == before


@pytest.mark.parametrize("part", ["weight/low", "weight/scale", "input/scale"])
def test_one_number_of_a_site_in_int8(tmp_path, part):
    def change(array: NDArray) -> None:
        array[...] = array * 2 if array.dtype == np.float32 else -array

    bundle = copy_bundle(INT8, tmp_path / "bundle")
    plant(bundle, "int8", f"blocks.1.mlp.fc1/{part}", change)
    with pytest.raises(BundleError, match=rf"found others: blocks.1.mlp.fc1/{part}.*calibrate it"):
        verify(bundle)


def test_scales_of_another_calibration(tmp_path):
    bundle = copy_bundle(INT8, tmp_path / "bundle")
    name = Bundle.open(bundle).manifest.named(calibration_files("int8")[1])
    tensors, _ = read_tensors(bundle / name, BundleError)
    site = "blocks.1.mlp.fc1/absmax"
    (bundle / name).write_bytes(tensor_bytes({**tensors, site: tensors[site] * 2}))
    made_right(bundle)
    with pytest.raises(BundleError, match=r"calibration.int8.*fc1/input/scale. The graph is dam"):
        verify(bundle)


def test_the_graph_of_another_precision(typed, tmp_path):
    bundle = copy_bundle(typed, tmp_path / "bundle")
    manifest = Bundle.open(bundle).manifest
    one, other = manifest.graphs["float16"], manifest.graphs["bfloat16"]
    swapped = {**manifest.graphs, "float16": other, "bfloat16": one}
    write_manifest(bundle, replace(manifest, graphs=swapped))
    with pytest.raises(BundleError, match=r"in float16; found others: .* in all\)"):
        check_contents(Bundle.open(bundle), ["float16"])


@pytest.mark.parametrize(
    ("which", "key"),
    [("small", "mean"), ("small", "std"), ("small", "backbone_sha256"), ("whole", "adapters")],
)
def test_a_manifest_that_the_graph_contradicts(request, workshop, tmp_path, which, key):
    bundle = tmp_path / "bundle"
    if which == "whole":
        arguments = workshop.backbone.facts.args
        workshop.export(bundle, (), fold=True, model_args=arguments)
    else:
        copy_bundle(request.getfixturevalue(which), bundle)
    file = bundle / "hhdeploy.json"
    content = json.loads(file.read_text())
    backbone = content["backbone"]
    if key in ("mean", "std"):  # where clients without Python read it, too
        backbone["preprocess"][key][0] = 0.25
        backbone["preprocess_graph"]["inputs"][key]["value"][0] = 0.25
    elif key == "adapters":
        for entry in (backbone, *content["adapters"]):
            entry["class_names"] = [f"other {i}" for i in range(backbone["classes"])]
    else:
        backbone["sha256"] = "0" * 64
    file.write_text(json.dumps(content))
    with pytest.raises(
        BundleError, match=rf"hhdeploy.json: {key}: expected .*, as model.onnx says"
    ):
        verify(bundle)


def test_one_is_one_in_both(small, tmp_path):
    """A transform's numbers may be integers where it was read from, as image_std is."""
    bundle = copy_bundle(small, tmp_path / "bundle")
    manifest = Bundle.open(bundle).manifest
    preprocess = replace(manifest.backbone.preprocess, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    backbone = replace(manifest.backbone, preprocess=preprocess)
    model = ir.load(bundle / "model.onnx")
    model.metadata_props.update(mean="[0, 0, 0]", std="[1, 1, 1]")
    save_graph(model, bundle / "planted.onnx")
    rename_weights(bundle / "planted.onnx", "model.onnx.data")
    (bundle / "planted.onnx").replace(bundle / "model.onnx")
    write_manifest(bundle, replace(manifest, backbone=backbone))
    made_right(bundle)
    check_contents(Bundle.open(bundle), None)


def test_a_graph_that_was_added_without_its_calibration(tmp_path):
    bundle = copy_bundle(INT8, tmp_path / "bundle")
    manifest = Bundle.open(bundle).manifest
    lost = {*map(manifest.named, calibration_files("int8"))}
    files = {name: digest for name, digest in manifest.files.items() if name not in lost}
    write_manifest(bundle, replace(manifest, files=files))
    check_contents(Bundle.open(bundle), None)


@pytest.mark.parametrize("blocked", ["onnx", "onnx_ir"])
def test_where_a_package_is_missing_the_rest_is_verified(blocked):
    code = """
        import sys
        from hhdeploy import verify

        assert verify(sys.argv[1], precisions=["float32", "int8"]).passed
    """
    found = run_python(code, INT8, blocked=[blocked])
    assert found.returncode == 0, found.stderr
