"""Graphs that travel: an older opset, one file, and what a graph says of itself."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.calibration.quantised import Float32Graph, find_scales
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.errors import OptionError, PlanError
from hhdeploy.exporters.portable import form as forms
from hhdeploy.exporters.portable.form import GraphForm
from hhdeploy.exporters.trace import OPSET
from hhdeploy.runtime import open_session
from hhdeploy.verifying.bundles import verify
from tests.support import assert_parity, images
from tests.workshop import TAGS


def props(bundle, precision="float32"):
    path = bundle / Bundle.open(bundle).manifest.graphs[precision]
    model = onnx.load(path, load_external_data=False)
    assert model.ir_version == 9
    return {p.key: p.value for p in model.metadata_props}


@pytest.fixture(scope="module")
def travelling(workshop, tmp_path_factory):
    """Opset 18 in one file, two precisions, side branches and labels."""
    out = tmp_path_factory.mktemp("travelling") / "out"
    return workshop.export(
        out, ("alpha", "gamma", TAGS), opset=18, single_file=True, precisions=["float16"],
    ).path  # fmt: skip


def test_opset_18_has_no_gelu_and_the_same_answers(travelling, workshop):
    assert verify(travelling).passed
    x = images(3)
    for precision, stage in (("float32", "branches"), ("float16", "twin")):
        path = travelling / Bundle.open(travelling).manifest.graphs[precision]
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
        kinds = [n.op_type for n in model.graph.node]
        assert kinds.count("Erf") == 2
        assert "Gelu" not in kinds
        with open_session(travelling, device="cpu", precision=precision, threads=1) as session:
            assert_parity(
                workshop.truth("alpha", x), session.run(x, "alpha")[:, :7], stage, precision
            )


def test_in_one_file_there_is_no_other(travelling):
    assert sorted(p.name for p in travelling.glob("model*")) == ["model.float16.onnx", "model.onnx"]
    loaded = ort.InferenceSession(
        (travelling / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"]
    )
    assert loaded.get_modelmeta().custom_metadata_map == props(travelling)


def test_a_graph_says_nothing_that_another_adapter_makes_wrong(travelling, branches):
    for bundle, precision in (
        (travelling, "float32"),
        (travelling, "float16"),
        (branches, "float32"),
    ):
        told = props(bundle, precision)
        facts = Bundle.open(bundle).manifest.backbone
        assert told["adapters"] == "see hhdeploy.json"
        assert told["backbone"] == facts.model
        assert told["backbone_sha256"] == facts.sha256
        assert json.loads(told["input_size"]) == list(facts.preprocess.input_size)
        assert json.loads(told["mean"]) == list(facts.preprocess.mean)
        assert json.loads(told["std"]) == list(facts.preprocess.std)


def test_adapters_that_are_fixed_are_told_with_their_labels(folded, constant):
    for bundle, rows in ((folded, {"alpha": None}), (constant, {"alpha": 1, "gamma": 2})):
        told = json.loads(props(bundle)["adapters"])
        entries = {a.name: a for a in Bundle.open(bundle).manifest.adapters}
        assert {name: entry["row"] for name, entry in told.items()} == rows
        for name, entry in told.items():
            assert entry["labels"] == list(entries[name].class_names)
            assert entry["problem_type"] == entries[name].problem_type


def test_fp8_is_refused_before_its_type_was_there(travelling):
    graph = Float32Graph.open(Bundle.open(travelling))
    with pytest.raises(PlanError, match=r"opset 19 or newer.*opset=20"):
        find_scales(graph, None, CalibrationSettings(precision="fp8"))


def test_weights_of_two_gigabytes_are_refused_in_one_file(monkeypatch, tiny_model):
    monkeypatch.setattr(forms, "_LARGEST", 27)
    with pytest.raises(PlanError, match=r"`single_file`.*2 GB"):
        forms._check_size(tiny_model("Gelu(x)"))


def test_an_unknown_opset_is_refused():
    with pytest.raises(OptionError, match="`opset=19`: expected 18 or 20"):
        GraphForm(19)


@pytest.fixture
def tiny_model():
    """A graph of one expression of x [2, 7] and a weight of 7 values."""

    def make(expression):
        text = f"""<ir_version: 9, opset_import: ["": {OPSET}]>
            g (float[batch, 7] x) => (float[batch, 7] y)
            <float[7] w = {{1, 2, 3, 4, 5, 6, 7}}> {{ z = {expression} y = Mul(z, w) }}"""
        model = ir.from_proto(onnx.parser.parse_model(text))
        for index, node in enumerate(model.graph):
            node.name = f"n{index}"
        return model

    return make


def answers(model, x):
    proto = ir.to_proto(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("kind", ["Gelu(x)", 'Gelu<approximate="tanh">(x)'])
def test_gelu_of_both_kinds_is_written_out(tiny_model, kind):
    x = np.random.default_rng(5).normal(0, 3, (11, 7)).astype(np.float32)
    x[0] = [0.0, -300.0, 300.0, 1e-6, -1e-6, 7.0, -7.0]
    model = tiny_model(kind)
    expected = answers(model, x)
    forms._write_out_gelu(model.graph)
    forms._lower(model, 18)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert model.opset_imports[""] == 18
    assert_parity(expected, answers(model, x), "folded", "float32")


@pytest.mark.parametrize(
    ("kind", "named"),
    [("Gelu(x)", "Gelu"), ("Cast<to=1, saturate=1>(x)", "Cast")],
)
def test_what_an_older_opset_lacks_is_refused(tiny_model, kind, named):
    with pytest.raises(PlanError, match=rf"18 has no {named}.*opset=20"):
        forms._lower(tiny_model(kind), 18)
