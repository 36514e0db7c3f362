"""Linears as they stand in a graph: reading them, and giving them new weights and biases."""

from __future__ import annotations

import os
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from hhdeploy import verify, write_triton
from hhdeploy.errors import BackboneError
from hhdeploy.graph import (
    add_initializer,
    drop_unused_initializers,
    linears_at,
    linears_by_path,
    open_graph,
)
from tests.exporters.synthetic import graph, linear, random, shared_twice
from tests.parity.architectures import traced
from tests.parity.ladder import session
from tests.support import assert_caught, assert_parity
from tests.workshop import copy_bundle

OUT, IN = 5, 7
W, B, NEW_W, NEW_B = random(OUT, IN), random(OUT), random(OUT, IN, seed=8), random(OUT, seed=8)
TOKENS = "float[batch, 3, 7] x"
RESULT = "float[batch, 3, 5] logits"

# name -> (graph, weights, whether it has a bias); y = x Wᵀ (+ b), then what comes after it.
GRAPHS = {
    "gemm": (
        """agraph (float[batch, 7] x) => (float[batch, 5] logits)
        { logits = Gemm<transB=1>(x, w, b) }""",
        {"w": W, "b": B},
    ),
    "gemm, weight transposed": (
        "agraph (float[batch, 7] x) => (float[batch, 5] logits) { logits = Gemm(x, w, b) }",
        {"w": W.T, "b": B},
    ),
    "gemm, no bias": (
        "agraph (float[batch, 7] x) => (float[batch, 5] logits) { logits = Gemm<transB=1>(x, w) }",
        {"w": W},
    ),
    "gemm, no bias, relu": (
        """agraph (float[batch, 7] x) => (float[batch, 5] logits)
        { p = Gemm<transB=1>(x, w)  logits = Relu(p) }""",
        {"w": W},
    ),
    "matmul + bias": (
        f"agraph ({TOKENS}) => ({RESULT}) {{ p = MatMul(x, w)  logits = Add(p, b) }}",
        {"w": W.T, "b": B},
    ),
    "bias + matmul": (
        f"agraph ({TOKENS}) => ({RESULT}) {{ p = MatMul(x, w)  logits = Add(b, p) }}",
        {"w": W.T, "b": B},
    ),
    "matmul": (f"agraph ({TOKENS}) => ({RESULT}) {{ logits = MatMul(x, w) }}", {"w": W.T}),
    "matmul, relu": (
        f"agraph ({TOKENS}) => ({RESULT}) {{ p = MatMul(x, w)  logits = Relu(p) }}",
        {"w": W.T},
    ),
    "matmul, residual": (
        f"""agraph ({TOKENS}) => ({RESULT})
        {{ p = MatMul(x, w)  q = Relu(p)  r = Neg(p)  logits = Add(q, r) }}""",
        {"w": W.T},
    ),
    "matmul + another Linear": (
        f"""agraph ({TOKENS}) => ({RESULT})
        {{ o = MatMul(x, other)  p = MatMul(x, w)  logits = Add(p, o) }}""",
        {"w": W.T, "other": random(IN, OUT, seed=5)},
    ),
    "matmul + positions": (
        f"agraph ({TOKENS}) => ({RESULT}) {{ p = MatMul(x, w)  logits = Add(p, table) }}",
        {"w": W.T, "table": random(3, OUT)},
    ),
}
WITH_BIAS = ("gemm", "gemm, weight transposed", "matmul + bias", "bias + matmul")


def build(name: str) -> ir.Model:
    text, weights = GRAPHS[name]
    product = "p" if " p = " in text else "logits"
    return graph(text, weights, {product: "proj"})


def inputs(name: str) -> NDArray[np.float32]:
    return random(2, IN) if name.startswith("gemm") else random(2, 3, IN)


def expected(
    name: str, weight: NDArray[np.float32], bias: NDArray[np.float32] | None
) -> NDArray[np.float64]:
    """The graph's output in float64 for other weights."""
    x = inputs(name).astype(np.float64)
    y = x @ weight.T.astype(np.float64) + (0.0 if bias is None else bias)
    if name.endswith("relu"):
        return np.maximum(y, 0)
    if name.endswith("residual"):
        return np.maximum(y, 0) - y
    weights = GRAPHS[name][1]
    if "other" in weights:
        y = y + x @ weights["other"]
    if "table" in weights:
        y = y + weights["table"]
    return y


def result(name: str, model: ir.Model) -> NDArray[np.float32]:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    with session(model) as runner:
        found: NDArray[np.float32] = runner.run(["logits"], {"x": inputs(name)})[0]
    return found


def flat(values):
    return values.reshape(-1)


@pytest.mark.parametrize("name", GRAPHS)
def test_reading(name):
    found = linear(build(name))
    assert np.array_equal(found.weight, W)
    assert found.weight.shape == (OUT, IN)
    if name in WITH_BIAS:
        assert found.bias is not None
        assert np.array_equal(found.bias, B)
    else:
        assert found.bias is None
        assert found.output is found.node.outputs[0]
    assert found.input.name == "x"


@pytest.mark.parametrize("name", WITH_BIAS)
def test_the_output_is_after_the_bias(name):
    assert linear(build(name)).output.name == "logits"


@pytest.mark.parametrize("name", GRAPHS)
def test_a_new_weight(name):
    model = build(name)
    old = linear(model).node.inputs[1]
    linear(model).replace_weight(model.graph, "fresh", NEW_W)
    assert np.array_equal(linear(model).weight, NEW_W)
    assert old is not None and old.name == "w" and "w" in model.graph.initializers
    bias = B if name in WITH_BIAS else None
    found = result(name, model)
    assert_parity(flat(expected(name, NEW_W, bias)), flat(found), "folded", "float32")
    assert_caught(flat(expected(name, W, bias)), flat(found), "folded", "float32")


@pytest.mark.parametrize("name", GRAPHS)
def test_a_new_bias(name):
    model = build(name)
    before = [(v.name, v.shape, v.dtype) for v in model.graph.outputs]
    linear(model).set_bias(model.graph, "fresh", NEW_B)
    assert [(v.name, v.shape, v.dtype) for v in model.graph.outputs] == before
    found = result(name, model)
    assert_parity(flat(expected(name, W, NEW_B)), flat(found), "folded", "float32")
    old = B if name in WITH_BIAS else None
    assert_caught(flat(expected(name, W, old)), flat(found), "folded", "float32")
    bias = linear(model).bias
    assert bias is not None
    assert np.array_equal(bias, NEW_B)


def test_a_bias_of_zeros_that_the_optimiser_drops():
    """The tracer's optimiser removes an addition of zeros: the bias comes back when set."""
    base = traced("zero bias")[1]
    head = linear(base.model, base.facts.classifier)
    assert head.bias is None or not head.bias.any()
    model = base.model.clone()
    bias = random(len(head.weight))
    linear(model, base.facts.classifier).set_bias(model.graph, "fresh", bias)
    x = np.random.default_rng(1).standard_normal((2, 3, 32, 32)).astype(np.float32)
    with session(base.model) as ours, session(model) as theirs:
        old, new = (runner.run(["logits"], {"images": x})[0] for runner in (ours, theirs))
    assert_parity(old.astype(np.float64) + bias, new, "folded", "float32")
    assert_caught(old, new, "folded", "float32")


def test_a_shared_initializer_is_not_edited():
    base = shared_twice()
    model = base.model.clone()
    first, second = linears_by_path(model.graph)["blocks.0.attn.proj"]
    assert first.node.inputs[1] is second.node.inputs[1]
    weight, bias = second.weight.copy(), second.bias.copy()
    first.replace_weight(model.graph, "w", weight + 1)
    first.set_bias(model.graph, "b", bias + 1)
    first, second = linears_by_path(model.graph)["blocks.0.attn.proj"]
    assert np.array_equal(second.weight, weight)
    assert np.array_equal(second.bias, bias)
    assert np.array_equal(first.weight, weight + 1)
    assert np.array_equal(first.bias, bias + 1)


def test_names_of_new_initializers_are_unique():
    model = build("gemm")
    names = [add_initializer(model.graph, "w", W).name for _ in range(3)]
    assert names == ["w_2", "w_3", "w_4"]


def test_only_constants_that_nothing_reads_are_dropped():
    model = build("gemm")
    spare = add_initializer(model.graph, "spare", W)
    answer = add_initializer(model.graph, "answer", B)
    model.graph.outputs.append(answer)
    drop_unused_initializers(model.graph)
    assert spare.name not in model.graph.initializers
    assert list(model.graph.initializers) == ["w", "b", "answer"]


def test_further_uses_of_a_linear_have_names_of_their_own():
    uses = linears_by_path(shared_twice().model.graph)["blocks.0.attn.proj"]
    assert [use.name for use in uses] == ["blocks.0.attn.proj", "blocks.0.attn.proj@1"]


def test_a_linear_that_is_not_there():
    found = linears_by_path(build("gemm").graph)
    assert list(found) == ["proj"]
    with pytest.raises(BackboneError, match=r"no Linear blocks\.0\.attn\.qkv"):
        linears_at(found, "blocks.0.attn.qkv")


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_weights_of_several_names_are_read(small, tmp_path, link):
    """`cp -al` and `cp -as` of a bundle, which onnx-ir takes for an attack."""
    own = copy_bundle(small, tmp_path / "own")  # other tests read `small`
    expected = {
        name: value.const_value.numpy()
        for name, value in ir.load(own / "model.onnx").graph.initializers.items()
    }
    shutil.copytree(own, tmp_path / "bundle", copy_function=link)
    path = tmp_path / "bundle" / "model.onnx"
    assert verify(path.parent, device="cpu").passed
    found = open_graph(path).graph.initializers
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name].const_value.numpy(), value), name
    write_triton(path.parent, tmp_path / "models")
    (path.parent / "model.onnx.data").rename(path.parent / "other.data")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "other.data" if entry.key == "location" else entry.value
    path.unlink()
    onnx.save(proto, path)
    values = [v.const_value for v in open_graph(path).graph.initializers.values()]
    (first, *_) = (v for v in values if isinstance(v, ir.ExternalTensor))
    with pytest.raises(ValueError, match="attack"):
        first.numpy()
