"""Which products of a graph can be quantised."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.calibration.qdq import find_sites, other_products
from hhdeploy.errors import BundleError
from tests.exporters.synthetic import graph, random
from tests.parity.architectures import traced


def graph_of(bundle_path):
    bundle = Bundle.open(bundle_path)
    return ir.load(bundle.graph("float32")).graph, bundle.manifest.backbone.classifier


def test_every_linear_of_a_folded_graph(folded):
    graph, classifier = graph_of(folded)
    sites = find_sites(graph, classifier)
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert list(sites) == [f"blocks.{n}.{part}" for n in range(2) for part in parts]
    assert sites["blocks.0.attn.qkv"].weight.shape == (144, 48)
    assert sites["blocks.1.mlp.fc2"].weight.shape == (48, 192)
    assert len(other_products(graph, sites.values())) == 2  # patch embedding, classifier


def test_every_linear_of_a_side_branch_graph(branches):
    """q, k and v are products of their own; branches and heads are none."""
    graph, classifier = graph_of(branches)
    sites = find_sites(graph, classifier)
    parts = ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert list(sites) == [f"blocks.{n}.{part}" for n in range(2) for part in parts]
    assert len(other_products(graph, sites.values())) == 2


TWO_LINEARS = """agraph (float[batch, 24] images) => (float[batch, 11] one, float[batch, 11] two) {
    one = MatMul(images, w)
    two = Gemm<transB=1>(images, w_t, b)
}"""


def test_the_weight_is_out_by_in_however_it_is_stored():
    weight = random(24, 11)
    weights = {"w": weight, "w_t": weight.T.copy(), "b": random(11)}
    made = graph(TWO_LINEARS, weights, {"one": "a.b", "two": "c"})
    sites = find_sites(made.graph, "head")
    assert [(name, site.transposed) for name, site in sites.items()] == [
        ("a.b", False),
        ("c", True),
    ]
    for site in sites.values():
        np.testing.assert_array_equal(site.weight, weight.T)
        assert site.weight.shape == (11, 24)


def test_two_uses_of_one_module_are_two_sites():
    weight = random(24, 11)
    weights = {"w": weight, "w_t": weight.T.copy(), "b": random(11)}
    made = graph(TWO_LINEARS, weights, {"one": "a", "two": "a"})
    assert list(find_sites(made.graph, "head")) == ["a", "a@1"]


def test_products_of_constants_and_of_few_heads_are_no_sites():
    """A position MLP sees the batch size alone; talking heads mix 4 features."""
    text = """agraph (float[batch, 24, 4] images)
            => (float[batch, 24, 4] mixed, float[n, 11] bias) {
        mixed = MatMul(images, few)
        size = Shape<start=0, end=1>(images)
        column = Unsqueeze(size, axis)
        wide = Cast<to=1>(column)
        tokens = Expand(wide, wanted)
        bias = MatMul(tokens, w)
    }"""
    weights = {
        "few": random(4, 4),
        "w": random(24, 11),
        "axis": np.asarray([1], np.int64),
        "wanted": np.asarray([1, 24], np.int64),
    }
    made = graph(text, weights, {"mixed": "talking", "bias": "position"})
    with pytest.raises(BundleError, match="no Linear to quantise"):
        find_sites(made.graph, "head")


def test_the_classifier_is_no_site():
    weight = random(24, 11)
    weights = {"w": weight, "w_t": weight.T.copy(), "b": random(11)}
    made = graph(TWO_LINEARS, weights, {"one": "a", "two": "head"})
    assert list(find_sites(made.graph, "head")) == ["a"]


def test_a_quantised_graph_is_refused():
    text = """agraph (float[batch, 24] images) => (float[batch, 24] y) {
        low = QuantizeLinear(images, step, zero)
        y = DequantizeLinear(low, step, zero)
    }"""
    weights = {"step": np.asarray(0.5, np.float32), "zero": np.asarray(0, np.int8)}
    with pytest.raises(BundleError, match="quantised already"):
        find_sites(graph(text, weights, {}).graph, "head")


@pytest.mark.parametrize("name", ["swin", "beit"])
def test_no_frozen_linear_is_missed(name):
    """All that an adapter may change, and what else the blocks have, is quantised."""
    _, base = traced(name)
    sites = find_sites(base.model.graph, base.facts.classifier)
    assert {linear.path for linear in base.facts.linears} <= set(sites)
    left = other_products(base.model.graph, sites.values())
    assert len(left) == 2, left  # patch embedding, classifier
