"""Q/DQ graphs: what is written, that it computes what it should, and what is left alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from numpy.testing import assert_array_equal

from hhdeploy.bundle import Bundle
from hhdeploy.calibration.qdq import FORMATS, low_values, quantised_model, quantised_weight
from hhdeploy.calibration.quantised import Quantised, quantise
from hhdeploy.calibration.scales import SiteScale
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.choices import QUANTISED
from hhdeploy.errors import PlanError
from hhdeploy.exporters.writer import save_graph
from hhdeploy.parity import bound, compare
from hhdeploy.runtime.openvino_backend import shared_core
from hhdeploy.runtime.session import open_bundle
from hhdeploy.verifying.graphs import graph_on_trial
from tests.calibration.conftest import Calibrated, logits, saved
from tests.exporters.synthetic import graph, random
from tests.support import images as noise
from tests.workshop import copy_bundle

INT8, FP8 = FORMATS["int8"], FORMATS["fp8"]


def written(made: Calibrated, precision: str = "int8", **values) -> Quantised:
    settings = CalibrationSettings(precision, **values)
    return quantise(made.graph, made.calibration, settings)


def pairs(model: ir.Model) -> dict[str, list[ir.Node]]:
    """Operator type -> nodes."""
    found: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        found.setdefault(node.op_type, []).append(node)
    return found


# -- numbers ------------------------------------------------------------------------------------


def test_low_values_are_rounded_and_cut():
    values = np.asarray([0.5, 1.5, -2.5, 126.6, 400.0, -400.0], np.float32)
    assert low_values(values, INT8).tolist() == [0, 2, -2, 127, 127, -127]
    # E4M3: 3 bits of mantissa, 448 at most.
    found = low_values(np.asarray([1.0, 1.06, 1.2, 17.0, 500.0], np.float32), FP8)
    assert found.astype(np.float32).tolist() == [1.0, 1.0, 1.25, 16.0, 448.0]


@pytest.mark.parametrize("form", [INT8, FP8])
def test_weights_have_one_scale_an_output_column(form):
    weight = random(7, 5) * np.asarray([1, 10, 0, 0.01, 3], np.float32)
    smooth = np.linspace(0.5, 2, 7, dtype=np.float32)
    low, scales = quantised_weight(weight, SiteScale(1.0, smooth), form)
    assert (low.shape, scales.shape) == ((7, 5), (5,))
    back = low.astype(np.float32) * scales * smooth[:, None]
    step = np.max(np.abs(weight / smooth[:, None]), axis=0) / (127 if form is INT8 else 16)
    assert np.all(np.abs(back - weight) <= step * smooth[:, None])
    assert_array_equal(back[:, 2], 0)
    assert np.max(np.abs(low.astype(np.float32)), axis=0).tolist() == [
        form.largest if n != 2 else 0 for n in range(5)
    ]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_by_hand(transposed, tmp_path):
    """y = DQ(Q(x ∘ smooth)) DQ(W_q), both layouts of the weight."""
    operator = "Gemm<transB=1>(images, w)" if transposed else "MatMul(images, w)"
    weight, x = random(11, 13), random(3, 11, seed=8)
    stored = weight.T.copy() if transposed else weight
    text = (
        f"agraph (float[batch, 11] images) => (float[batch, 13] logits) {{ logits = {operator} }}"
    )
    model = graph(text, {"w": stored}, {"logits": "fc"})
    scale = SiteScale(2.0, np.linspace(0.5, 1.5, 11, dtype=np.float32))
    low_model = quantised_model(model, {"fc": scale}, INT8, "head")
    found = logits(saved(low_model, tmp_path), [{"images": x}])
    (dequantise,) = (node for node in low_model.graph if node.name == "fc/weight/dequantise")
    axis = dequantise.attributes.get_int("axis")
    assert axis == (0 if transposed else 1), "which ONNX Runtime does not look at in a Gemm"
    low, scales = quantised_weight(weight, scale, INT8)
    step = np.float32(2.0 / 127)
    assert scale.smooth is not None
    codes = np.clip(np.rint(x * scale.smooth / step), -128, 127)
    assert np.any(np.abs(codes) == 127)
    np.testing.assert_array_max_ulp(
        found, ((codes @ low.astype(np.float64)) * (step * scales)).astype(np.float32), maxulp=64
    )


@pytest.mark.parametrize("same", [True, False])
def test_an_input_is_smoothed_once_for_all_sites_of_the_same_factors(same):
    text = """agraph (float[batch, 11] images) => (float[batch, 13] logits) {
        a = MatMul(images, v)
        b = MatMul(images, w)
        logits = Add(a, b)
    }"""
    model = graph(text, {"v": random(11, 13), "w": random(11, 13)}, {"a": "fc1", "b": "fc2"})
    factors = np.linspace(0.5, 1.5, 11, dtype=np.float32)
    other = factors if same else factors[::-1].copy()
    scales = {"fc1": SiteScale(2.0, factors), "fc2": SiteScale(2.0, other)}
    found = pairs(quantised_model(model, scales, INT8, "head"))
    assert len(found["Mul"]) == (1 if same else 2)


# -- whole graphs -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["side", "plain"])
@pytest.mark.parametrize("precision", QUANTISED)
def test_every_site_is_quantised_and_the_graph_still_answers(kind, precision, tmp_path, request):
    made: Calibrated = request.getfixturevalue(kind)
    result = written(made, precision)
    sites = made.sites()
    assert list(result.sites) == list(sites) == list(result.ranges)
    assert all(info.quantised for info in result.sites.values())
    nodes = {node.name: node for node in result.model.graph}
    for name, site in sites.items():
        node = nodes[site.node.name]
        x, weight = (value.producer() for value in node.inputs[:2])
        assert weight.op_type == "DequantizeLinear"
        assert weight.inputs[0].const_value.dtype is FORMATS[precision].dtype
        assert weight.attributes.get_int("axis", 1) == 1
        assert weight.inputs[1].shape == (result.sites[name].weight_shape[1],)
        assert (x is not None and x.op_type == "DequantizeLinear") == (precision != "int8-weights")
        assert node.metadata_props == site.node.metadata_props
    operators = pairs(result.model)
    lines = [*operators.get("QuantizeLinear", []), *operators["DequantizeLinear"]]
    assert len(operators["DequantizeLinear"]) == len(sites) * (2 - (precision == "int8-weights"))
    assert not any(np.any(node.inputs[2].const_value.numpy()) for node in lines)
    comparison = compare(
        logits(made.path, made.feeds), logits(saved(result.model, tmp_path), made.feeds)
    )
    assert not comparison.failures(bound("quantised", precision)), comparison
    assert comparison.sqnr_db < 90  # something was quantised
    assert not [name for name in result.model.graph.initializers if name.endswith("weight_t")]


def test_openvino_computes_the_same(side, tmp_path):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    path = saved(written(side).model, tmp_path)
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = shared_core().compile_model(str(path), "CPU", config)
    found = np.concatenate([compiled(feed)["logits"].copy() for feed in side.feeds])
    comparison = compare(logits(side.path, side.feeds), found)
    assert not comparison.failures(bound("quantised", "int8")), comparison


def test_onnx_runtime_multiplies_every_site_in_int8(side, tmp_path):
    """A quantiser with several readers (q, k and v) would leave their products in float."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    path = saved(written(side).model, tmp_path)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert operators.count("MatMulIntegerToFloat") == len(side.calibration.sites) == 12
    assert "DequantizeLinear" not in operators


def test_the_branches_stay_float(side):
    before = {n.name: n for n in ir.load(side.path).graph if (n.name or "").startswith("branch/")}
    after = {n.name: n for n in written(side).model.graph if (n.name or "").startswith("branch/")}
    assert len(before) > 100
    for name, node in before.items():
        assert [v and v.name for v in after[name].inputs] == [v and v.name for v in node.inputs]


def test_excluded_sites_are_as_they_were(side, tmp_path):
    kept = "blocks.0.attn.qkv.k"
    result = written(side, exclude=(kept,))
    assert [name for name, info in result.sites.items() if not info.quantised] == [kept]
    assert result.sites[kept].activation_scale is None
    nodes = {node.name: node for node in result.model.graph}
    site = side.sites()[kept]
    node = nodes[site.node.name]
    assert node.inputs[0].name == site.input.name
    assert_array_equal(node.inputs[1].const_value.numpy(), site.weight.T)


def test_without_any_site_the_graph_is_the_float_one(side, tmp_path):
    model = ir.load(side.path)
    untouched = quantised_model(model, {}, INT8, side.classifier)
    assert_array_equal(
        logits(saved(untouched, tmp_path), side.feeds), logits(side.path, side.feeds)
    )


def test_the_float_graph_is_not_changed(side):
    model = ir.load(side.path)
    before = ir.to_proto(model).SerializeToString()
    quantised_model(model, side.calibration.sites, INT8, side.classifier)
    assert ir.to_proto(model).SerializeToString() == before


def test_noise_grows_with_wrong_scales(side, tmp_path):
    """The parity bound sees a range that is ten times too small."""
    wrong = {n: replace(s, absmax=s.absmax / 10) for n, s in side.calibration.sites.items()}
    model = quantised_model(ir.load(side.path), wrong, INT8, side.classifier)
    comparison = compare(logits(side.path, side.feeds), logits(saved(model, tmp_path), side.feeds))
    assert comparison.failures(bound("quantised", "int8")), comparison


def test_the_result_is_told_in_json(side):
    figures = dict.fromkeys(side.calibration.sites, 41.5)
    settings = CalibrationSettings(exclude=("*.fc2",))
    result = quantise(side.graph, side.calibration, settings, sqnr_db=figures)
    told = result.to_json()
    assert told["settings"]["exclude"] == ["*.fc2"]
    site = told["sites"]["blocks.0.attn.qkv.q"]
    assert site["weight_shape"] == (48, 48)
    assert (site["weight_scales"], site["sqnr_db"], site["smoothed"]) == (48, 41.5, True)
    step = side.calibration.sites["blocks.0.attn.qkv.q"].absmax / 127
    assert math.isclose(site["activation_scale"], step)
    assert told["data"]["images"] == 36
    assert told["versions"]["nncf"]


def test_another_graph_than_the_calibrated_one_is_refused(side, plain):
    with pytest.raises(PlanError, match="not the graph that was calibrated"):
        quantise(side.graph, plain.calibration, CalibrationSettings())


@pytest.mark.parametrize("device", ["cpu", "openvino"])
@pytest.mark.parametrize("which", ["plain", "side"])
def test_an_image_that_is_no_numbers_has_no_answer(which, device, request, tmp_path):
    """A quantiser makes a number of NaN: a folded graph's answer was one of a picture."""
    made = request.getfixturevalue(which)
    path = copy_bundle(made.bundle.path, tmp_path / "bundle")
    low = written(made).model
    with (
        graph_on_trial(Bundle.open(path), "int8", lambda target: save_graph(low, target)) as trial,
        open_bundle(trial, device=device, precision="int8") as session,
    ):
        names = None if which == "plain" else "alpha"
        clean = noise(3)
        expected = session.run(clean, names)
        for value in (np.nan, np.inf, -np.inf):
            spoilt = clean.copy()
            spoilt[1, 0, 3, 2] = value
            found = session.run(spoilt, names)
            assert np.isnan(found[1, :7]).all()
            assert_array_equal(found[[0, 2]], expected[[0, 2]])
        vast = clean.copy()
        vast[1] = 1e36  # numbers, though their sum is none
        assert np.isfinite(session.run(vast, names)[1, :7]).all()
