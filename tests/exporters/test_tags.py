"""Which Linears a graph has as one node each, so that an adapter there changes all that it would
in the model; and models that are no function of their images."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.sites import sites_of
from hhdeploy.errors import BackboneError
from hhdeploy.exporters.branches import branched_model
from hhdeploy.exporters.fold import folded_model
from hhdeploy.exporters.tags import MIXED_TAG, tag_linears, tag_mixed
from hhdeploy.exporters.trace import base_graph
from hhdeploy.graph import LINEAR_TAG
from hhdeploy.plan import Reserve, plan_branches
from hhdeploy.training import attach
from tests.parity.ladder import run, session
from tests.support import assert_parity, images, random_adapter, tiny_spec

SITE = "mlp.fc2"


def reading(how: str):
    return load_backbone(replace(tiny_spec("python:tests.own_models:reading"), args={"how": how}))


@functools.cache
def traced(how: str):
    """The graph of a model of `reading`, to read only."""
    return base_graph(reading(how), None)


@pytest.mark.parametrize("form", ["additive", "sequential"])
@pytest.mark.parametrize("how", ["as a linear", "twice", "without its bias", "by hand"])
def test_a_weight_that_is_used_as_a_linear_alone_is_one(how, form):
    backbone, base = reading(how), traced(how)
    adapter = random_adapter(base.facts, form=form, targets=[SITE])
    inputs = images(3)
    with session(folded_model(base, adapter)) as runner:
        found = run(runner, inputs)
    attach(backbone.model, adapter)
    with torch.no_grad():
        expected = backbone.model(torch.from_numpy(inputs)).numpy()
    assert_parity(expected, found, "folded", "float32")


@pytest.mark.parametrize("how", ["as a linear", "by hand", "by hand, joined"])
def test_each_image_has_its_own_adapter_however_the_product_is_written(how):
    """A product by hand was taken for one in which the images do not lie one after the other."""
    backbone, base = reading(how), traced(how)
    adapters = {"one": random_adapter(base.facts, targets=[SITE], seed=1)}
    plan = plan_branches(base.facts, adapters, Reserve(keep_backbone_head=True))
    bank = np.stack(
        [np.zeros(plan.layout.size, np.float32), plan.layout.pack("one", adapters["one"])]
    )
    inputs = images(3)
    with session(branched_model(base, plan)) as runner:
        found = run(runner, inputs, adapter_ids=np.asarray([1, 0, 1]), adapter_bank=bank)
    with torch.no_grad():
        bare = backbone.model(torch.from_numpy(inputs)).numpy()
        attach(backbone.model, adapters["one"])
        changed = backbone.model(torch.from_numpy(inputs)).numpy()
    expected = np.stack([changed[0], bare[1], changed[2]])
    assert_parity(expected, found, "branches", "float32")


@pytest.mark.parametrize(
    "how",
    [
        *("not transposed", "and back", "by its norm", "scaled as well", "as a table", "in halves"),
        *("in chunks", "from the left", "by einsum", "by addmm", "by a convolution"),
        *("scaled", "moved"),
        *("bias elsewhere", "bias twice", "another bias", "another addend"),
    ],
)
def test_what_reads_a_weight_or_adds_a_constant_besides_makes_it_no_site(how):
    """A changed weight would change it in the model, and not in the graph."""
    assert list(sites_of(traced(how).facts.linears)) == ["mlp.fc1"]


PRODUCT = "t = Transpose<perm=[1,0]>(W)  p = MatMul(x, t)"
FC1, FC2, PACKED = "mlp.fc1", "mlp.fc2", "attn.in_proj"


def tagged(nodes: str, path: str, rank: int = 2) -> ir.Graph:
    """A graph in which W and B have the names of a Linear's weight and bias, and C has none."""
    start, _, last = path.rpartition(".in_proj")
    names = (
        {"W": f"{start}.in_proj_weight", "B": f"{start}.in_proj_bias"}
        if start
        else {"W": f"{last}.weight", "B": f"{last}.bias"}
    )
    kind = f"float[{','.join('4' * rank)}]"
    text = f"""<ir_version: 9, opset_import: ["": 20]> agraph ({kind} x) => ({kind} y)
        <{kind} W, float[4] B, float[4] C> {{ {nodes} }}"""
    proto = onnx.parser.parse_model(text)
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    del proto.graph.value_info[:]
    for name, array in (("W", np.ones((4,) * rank)), ("B", np.ones(4)), ("C", np.ones(4))):
        constant = onnx.numpy_helper.from_array(array.astype(np.float32), names.get(name, name))
        proto.graph.initializer.append(constant)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    tag_linears(model.graph)
    return model.graph


@pytest.mark.parametrize(
    ("nodes", "path", "is_one"),
    [
        (f"{PRODUCT}  y = Add(p, B)", FC2, True),
        (f"{PRODUCT}  y = Add(p, B)", PACKED, True),
        ("y = Gemm<transB=1>(x, W, B)", FC2, True),
        ("y = Gemm<transB=1>(x, W)", FC2, True),
        # Another product, or another place in it.
        ("y = Gemm(x, W, B)", FC2, False),
        ("y = Gemm<transB=1>(x, x, W)", FC1, False),
        ("t = Transpose<perm=[1,0]>(W)  y = MatMul(t, x)", FC2, False),
        ("t = Transpose<perm=[1,0]>(W)  y = Mul(x, t)", FC2, False),
        # What reads the weight or the bias besides.
        (f"{PRODUCT}  n = ReduceSum(W)  y = Add(p, n)", FC1, False),
        (f"{PRODUCT}  a = Add(p, B)  y = Mul(a, B)", FC1, False),
        (f"{PRODUCT}  a = Add(p, B)  y = Mul(a, B)", PACKED, False),
        (f"{PRODUCT}  y = Mul(p, B)", FC1, False),
        (f"{PRODUCT}  a = Add(p, B)  b = Add(x, B)  y = Mul(a, b)", FC1, False),
        # Another constant, which the sequential form would multiply.
        (f"{PRODUCT}  y = Add(p, C)", FC1, True),
        (f"{PRODUCT}  y = Add(p, C)", FC2, False),
        (f"{PRODUCT}  y = Add(C, p)", FC2, False),
        (f"{PRODUCT}  c = Sqrt(C)  y = Add(p, c)", FC2, False),
        ("y = Gemm<transB=1>(x, W, C)", FC2, False),
        (f"{PRODUCT}  y = Add(p, x)", FC2, True),
        (f"{PRODUCT}  r = Relu(x)  y = Add(p, r)", FC2, True),
        (f"{PRODUCT}  a = Add(p, C)  y = Mul(a, p)", FC2, True),  # not to all that reads it
    ],
)
def test_which_products_are_a_linear(nodes, path, is_one):
    found = [node.metadata_props.get(LINEAR_TAG) for node in tagged(nodes, path)]
    assert [name for name in found if name] == ([path] if is_one else [])


def test_a_weight_of_three_dimensions_is_no_linear_s():
    graph = tagged("t = Transpose<perm=[0,2,1]>(W)  y = MatMul(x, t)", FC1, rank=3)
    assert not any(LINEAR_TAG in node.metadata_props for node in graph)


def test_a_linear_that_mixes_the_images_is_marked():
    for mixed, count in (({FC2}, 1), ({FC1}, 0), (set(), 0)):
        graph = tagged(f"{PRODUCT}  y = Add(p, B)", FC2)
        tag_mixed(graph, mixed)
        assert sum(MIXED_TAG in node.metadata_props for node in graph) == count


@pytest.mark.parametrize("how", ["dropout", "noise", "python", "calls", "attention"])
def test_a_model_that_answers_otherwise_at_every_call_is_refused(how):
    backbone = load_backbone(
        replace(tiny_spec("python:tests.own_models:drawing"), args={"how": how})
    )
    with pytest.raises(BackboneError, match=r"called twice .* two answers.*random numbers"):
        base_graph(backbone, None)
