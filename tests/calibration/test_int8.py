"""What is read out of NNCF's calibration, and that NNCF keeps quiet."""

from __future__ import annotations

import logging
import os
import random as standard
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from hhdeploy.calibration import int8
from hhdeploy.calibration.int8 import calibrate_int8
from hhdeploy.calibration.probe import range_excess
from hhdeploy.calibration.qdq import FORMATS, find_sites, quantised_model
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.errors import PlanError
from tests.calibration.conftest import logits, saved
from tests.exporters.synthetic import graph, random
from tests.workshop import run_python

# Behind a Relu NNCF has unsigned codes; one channel of fc2's input is 30 times the others.
MLP = """agraph (float[batch, 5, 24] images) => (float[batch, 5, 11] logits) {
    hidden = MatMul(images, w1)  biased = Add(hidden, b1)  positive = Relu(biased)
    product = MatMul(positive, w2)  logits = Add(product, b2)
}"""


@pytest.fixture(scope="module")
def mlp(tmp_path_factory) -> Path:
    """A hand-written graph of two Linears, every node with a name."""
    w1 = random(24, 17)
    w1[:, 3] *= 30
    weights = {"w1": w1, "b1": random(17), "w2": random(17, 11), "b2": random(11)}
    model = graph(MLP, weights, {"hidden": "fc1", "product": "fc2"})
    for node in model.graph:
        node.name = f"{node.outputs[0].name}/{node.op_type}"
    return saved(model, tmp_path_factory.mktemp("mlp"))


@pytest.fixture(scope="module")
def feeds():
    return [{"images": random(1, 5, 24, seed=seed)} for seed in range(6)]


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_weights_of_several_names_are_read(mlp, feeds, tmp_path, link):
    """onnx, which NNCF reads them with, takes a link and a file of several names for an attack."""
    copy = tmp_path / "copy"
    shutil.copytree(mlp.parent, copy)
    assert (copy / f"{mlp.name}.data").exists()
    shutil.copytree(copy, tmp_path / "linked", copy_function=link)
    settings = CalibrationSettings(smooth_quant=None, bias_correction=False)
    sites = find_sites(ir.load(mlp).graph, "head")
    one, other = (
        calibrate_int8(path, sites, feeds, settings)
        for path in (mlp, tmp_path / "linked" / mlp.name)
    )
    assert one == other


@pytest.mark.parametrize("smooth", [0.7, None])
def test_ranges_are_the_largest_values_of_all_images(mlp, feeds, smooth, tmp_path):
    """Also for codes that NNCF chose unsigned: nothing is outside, and nothing is too wide."""
    sites = find_sites(ir.load(mlp).graph, "head")
    scales = calibrate_int8(mlp, sites, feeds, CalibrationSettings(smooth_quant=smooth))
    assert [scale.smooth is not None for scale in scales.values()] == [smooth is not None] * 2
    found = range_excess(mlp, sites, scales, feeds, FORMATS["int8"], tolerance=0.0)
    assert {excess.site for excess in found} == {"fc1", "fc2"}
    for excess in found:
        assert excess.ratio == pytest.approx(1.0)
        assert excess.clipped == 0.0
    if smooth is not None:
        assert np.argmin(scales["fc2"].smooth) == 3
    quantised = quantised_model(ir.load(mlp), scales, FORMATS["int8"], "head")
    before, after = logits(mlp, feeds), logits(saved(quantised, tmp_path), feeds)
    assert 0 < np.max(np.abs(after - before)) < 0.05 * np.ptp(before)


def test_corrected_biases_reach_the_graph(plain):
    scales = plain.calibration.sites
    assert any(scale.bias is not None for scale in scales.values())
    quantised = quantised_model(ir.load(plain.path), scales, FORMATS["int8"], plain.classifier)
    nodes = {node.name: node for node in quantised.graph}
    for name, site in plain.sites().items():
        before, index = site.bias, site.bias_index
        after = nodes[site.bias_node.name].inputs[index].const_value.numpy().reshape(-1)
        corrected = scales[name].bias
        np.testing.assert_array_equal(after, before if corrected is None else corrected)
        assert np.array_equal(after, before) == (corrected is None)


def test_nncf_says_nothing_and_leaves_the_loggers_alone(mlp, feeds, capfd):
    logger = logging.getLogger("nncf")
    before = (logger.level, logging.getLoggerClass())
    sites = find_sites(ir.load(mlp).graph, "head")
    calibrate_int8(mlp, sites, feeds, CalibrationSettings(bias_correction=False))
    assert capfd.readouterr() == ("", "")
    assert (logger.level, logging.getLoggerClass()) == before


def test_nncf_draws_none_of_the_caller_s_random_numbers(monkeypatch):
    """The styles of its progress bars take some: when it is imported, and when it quantises."""
    before = standard.getstate()
    with int8._quiet():
        standard.random()
    monkeypatch.setattr(int8, "require", lambda *names: standard.random())
    int8.import_nncf()
    assert standard.getstate() == before


def test_importing_nncf_says_nothing_and_sends_nothing():
    code = """
        import logging, os
        from hhdeploy.calibration.int8 import nncf_version
        before = logging.getLoggerClass(), dict(os.environ)
        assert nncf_version()
        assert (logging.getLoggerClass(), dict(os.environ)) == before
        from unittest.mock import MagicMock
        from nncf.telemetry.wrapper import telemetry
        assert isinstance(telemetry, MagicMock), telemetry
    """
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_nncf_the_extra_is_named():
    code = """
        from hhdeploy.calibration.int8 import nncf_version
        from hhdeploy.errors import MissingDependencyError
        try:
            nncf_version()
        except MissingDependencyError as error:
            print(error)
    """
    done = run_python(code, blocked=("nncf",))
    assert "pip install 'hhdeploy[calibrate]'" in done.stdout, done.stderr


def test_nodes_without_names_are_refused(mlp, feeds, tmp_path):
    proto = onnx.load(mlp)
    proto.graph.node[1].name = ""
    onnx.save(proto, tmp_path / "model.onnx")
    sites = find_sites(ir.load(mlp).graph, "head")
    with pytest.raises(PlanError, match="nodes without a name"):
        calibrate_int8(tmp_path / "model.onnx", sites, feeds, CalibrationSettings())
