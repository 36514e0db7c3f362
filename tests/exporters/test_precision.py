"""The precision passes: what is low and what stays float32, and that the twin really rounds."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from hhdeploy.adapters.format import Adapter
from hhdeploy.choices import TYPED
from hhdeploy.errors import PlanError
from hhdeploy.exporters.bake import baked
from hhdeploy.exporters.branches import branched_model
from hhdeploy.exporters.precision.typed import (
    CUDA_BFLOAT16,
    ISLANDS,
    PRECISION_TAG,
    rounding_twin,
    typed_model,
)
from hhdeploy.exporters.trace import BaseGraph
from hhdeploy.plan import Plan, Reserve, plan_branches
from tests.exporters.synthetic import fingerprint
from tests.parity.architectures import traced
from tests.support import random_adapter

LOW = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FLOAT = ir.DataType.FLOAT
# Storage rounding of 11 and 8 significant bits moves the tiny ViT by 1.8e-7 and 1.9e-5, a tenth of
# these bounds; a wrong adapter moves it by 1.8.
COSINE = {"float16": 1 - 2e-6, "bfloat16": 1 - 2e-4}


@pytest.fixture(scope="module")
def base() -> BaseGraph:
    return traced("vit")[1]


@pytest.fixture(scope="module")
def adapters(base: BaseGraph) -> dict[str, Adapter]:
    return {
        "additive": random_adapter(base.facts, classes=7, seed=1),
        "sequential": random_adapter(
            base.facts, form="sequential", targets=("proj", "fc2"), classes=3, seed=2
        ),
    }


@pytest.fixture(scope="module")
def plan(base: BaseGraph, adapters: dict[str, Adapter]) -> Plan:
    return plan_branches(base.facts, adapters, Reserve(keep_backbone_head=True))


@pytest.fixture(scope="module")
def bank(plan: Plan, adapters: dict[str, Adapter]) -> NDArray[np.float32]:
    """The backbone, then the two adapters."""
    rows = [plan.layout.pack(name, adapter) for name, adapter in adapters.items()]
    return np.stack([np.zeros(plan.layout.size, np.float32), *rows])


def graph(text: str, opset: int = 20) -> ir.Model:
    """A model in ONNX's textual form, shapes and types inferred."""
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": {opset}]>\n{text}')
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def run(model: ir.Model, **feeds: NDArray[Any]) -> NDArray[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), options)
    output: NDArray[Any] = session.run(None, feeds)[0]
    return output


def node(model: ir.Model, op: str, index: int = 0) -> ir.Node:
    return [found for found in model.graph if found.op_type == op][index]


def dtypes(found: ir.Node) -> list[ir.DataType | None]:
    return [value.dtype for value in found.inputs if value is not None]


def placement(model: ir.Model) -> dict[str | None, str]:
    return {
        found.name: found.metadata_props[PRECISION_TAG]
        for found in model.graph
        if PRECISION_TAG in found.metadata_props
    }


def casts(model: ir.Model) -> list[str | None]:
    return [found.name for found in model.graph if (found.name or "").startswith("cast/")]


def twin_of(model: ir.Model, *how: Any) -> ir.Model:
    return rounding_twin(typed_model(model, *how))


def images(batch: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((batch, 3, 32, 32)).astype(np.float32)


def worst_cosine(reference: NDArray[Any], found: NDArray[Any]) -> float:
    cosines = []
    for wanted, got in zip(reference.astype(float), found.astype(float), strict=True):
        finite = np.isfinite(wanted)
        assert np.array_equal(wanted[~finite], got[~finite])
        wanted, got = wanted[finite], got[finite]
        cosines.append(wanted @ got / np.linalg.norm(wanted) / np.linalg.norm(got))
    return float(min(cosines))


# --- a real ViT ---------------------------------------------------------------------------------


def test_vit_islands_are_float32_and_products_are_low(base: BaseGraph) -> None:
    typed = typed_model(base.model, "float16")
    for found in typed.graph:
        if found.op_type in ("LayerNormalization", "Softmax"):
            assert set(dtypes(found)) == {FLOAT}
            assert found.outputs[0].dtype == FLOAT
        elif found.op_type in ("MatMul", "Gemm", "Conv", "Gelu"):
            assert set(dtypes(found)) == {LOW["float16"]}
            assert found.outputs[0].dtype == LOW["float16"]
    assert typed.graph.initializers["blocks.0.attn.qkv.weight_t"].dtype == LOW["float16"]
    assert typed.graph.initializers["blocks.0.norm1.weight"].dtype == FLOAT


@pytest.mark.parametrize("name", ["vit", "swin", "beit"])
def test_bfloat16_is_computed_where_cuda_does(name: str) -> None:
    """A GPU's ONNX Runtime refuses a graph with a bfloat16 operator that it has no kernel for."""
    _, base = traced(name)
    targets = ("q", "k", "v", "proj", "fc1", "fc2")
    adapters = {
        "all": random_adapter(base.facts, targets=targets, parts=("s_in", "s_out", "db")),
        "bias": random_adapter(base.facts, targets=targets, classes=5),
        "after": random_adapter(base.facts, targets=("proj", "fc2"), form="sequential"),
    }
    model = branched_model(base, plan_branches(base.facts, adapters, Reserve()))
    low = {
        found.op_type
        for found in typed_model(model, "bfloat16").graph
        if any(
            v is not None and v.dtype == LOW["bfloat16"] for v in (*found.inputs, *found.outputs)
        )
    }
    assert {"MatMul", "Add", "Mul", "Split", "Gelu"} <= low <= CUDA_BFLOAT16
    assert not low & {"Pad", "Greater", "Less", "Equal", "Clip", "Sin", "Cos", "HardSwish", "Conv"}
    pads = [found for found in typed_model(model, "float16").graph if found.op_type == "Pad"]
    assert pads
    assert all(found.outputs[0].dtype == LOW["float16"] for found in pads)


@pytest.mark.parametrize("precision", TYPED)
@pytest.mark.parametrize("rewrite", [typed_model, twin_of])
def test_recorded_types_are_those_that_onnx_infers(
    base: BaseGraph, rewrite: Any, precision: str
) -> None:
    onnx.checker.check_model(ir.to_proto(rewrite(base.model, precision)), full_check=True)


def test_conv_has_no_bfloat16_before_opset_22(base: BaseGraph) -> None:
    typed = typed_model(base.model, "bfloat16")
    assert set(dtypes(node(typed, "Conv"))) == {FLOAT}
    assert set(dtypes(node(typed, "MatMul"))) == {LOW["bfloat16"]}


@pytest.mark.parametrize("precision", TYPED)
def test_interface_keeps_names_and_types(base: BaseGraph, plan: Plan, precision: str) -> None:
    model = branched_model(base, plan)
    for made in (typed_model(model, precision), twin_of(model, precision)):
        found = [(v.name, v.dtype) for v in (*made.graph.inputs, *made.graph.outputs)]
        assert found == [
            ("images", FLOAT),
            ("adapter_ids", ir.DataType.INT64),
            ("adapter_bank", FLOAT),
            ("logits", FLOAT),
        ]


@pytest.mark.parametrize("precision", TYPED)
def test_bank_is_cast_after_its_gather(base: BaseGraph, plan: Plan, precision: str) -> None:
    typed = typed_model(branched_model(base, plan), precision)
    bank = typed.graph.inputs[2]
    assert [use.node.op_type for use in bank.uses()] == ["Gather"]
    gather = bank.uses()[0].node
    assert gather.outputs[0].dtype == FLOAT
    (cast,) = [use.node for use in gather.outputs[0].uses()]
    assert cast.name == f"cast/branch/bank/gather/{precision}"
    assert [use.node.op_type for use in cast.outputs[0].uses()] == ["Split"]


@pytest.mark.parametrize("precision", TYPED)
@pytest.mark.parametrize("rewrite", [typed_model, twin_of])
def test_source_is_unchanged(base: BaseGraph, plan: Plan, rewrite: Any, precision: str) -> None:
    model = branched_model(base, plan)
    before = fingerprint(model)
    rewrite(model, precision)
    assert fingerprint(model) == before


@pytest.mark.parametrize("precision", TYPED)
def test_twin_and_typed_agree(base: BaseGraph, plan: Plan, precision: str) -> None:
    model = branched_model(base, plan)
    typed = placement(typed_model(model, precision))
    assert placement(twin_of(model, precision)) == typed
    assert set(typed.values()) == {precision, "float32"}


@pytest.mark.parametrize("precision", TYPED)
def test_twin_of_branches_is_near_float32_and_pads_with_infinity(
    base: BaseGraph, plan: Plan, bank: NDArray[np.float32], precision: str
) -> None:
    model = branched_model(base, plan)
    feeds = {"images": images(), "adapter_ids": np.array([1, 0, 2]), "adapter_bank": bank}
    exact, rounded = run(model, **feeds), run(twin_of(model, precision), **feeds)
    assert np.isneginf(exact[0, 7:]).all()
    assert np.isneginf(rounded[2, 3:]).all()
    assert COSINE[precision] < worst_cosine(exact, rounded) < 1
    finite = rounded[np.isfinite(rounded)]
    assert np.array_equal(finite, finite.astype(NUMPY[precision]).astype(np.float32))
    if precision == "float16":  # ONNX Runtime has no bfloat16 product on a CPU
        assert worst_cosine(exact, run(typed_model(model, precision), **feeds)) > COSINE[precision]


def test_a_wrong_adapter_is_not_taken_for_rounding(
    base: BaseGraph, plan: Plan, bank: NDArray[np.float32]
) -> None:
    model = branched_model(base, plan)
    feeds = {"images": images(1), "adapter_bank": bank}
    own = run(model, adapter_ids=np.array([1]), **feeds)[:, :7]
    other = run(twin_of(model, "bfloat16"), adapter_ids=np.array([2]), **feeds)[:, :7]
    own, other = own[:, :3], other[:, :3]  # the other adapter has three classes
    assert worst_cosine(own, other) < COSINE["bfloat16"]


# --- small graphs -------------------------------------------------------------------------------

SUM = """agraph (float[n] x) => (float[n] y)
<float b = {2048}> { a = Add(x, b)  y = Sub(a, b) }"""


def test_twin_rounds_what_float16_cannot_hold() -> None:
    x = np.array([0.25, 1.0, 3.0], np.float32)
    model = graph(SUM)
    assert np.array_equal(run(model, x=x), x)
    assert np.array_equal(run(twin_of(model, "float16"), x=x), [0.0, 0.0, 4.0])
    assert np.array_equal(run(twin_of(model, "bfloat16"), x=x), [0.0, 0.0, 0.0])


def test_twin_rounds_weights_and_inputs() -> None:
    model = graph(
        "agraph (float[1,1] x) => (float[1,1] y) <float[1,1] w = {2049}> {y = MatMul(x, w)}"
    )
    x = np.array([[1.0]], np.float32)
    assert run(twin_of(model, "float16"), x=x).item() == 2048
    model = graph("agraph (float[1,1] x) => (float[1,1] y) <float[1,1] w = {1}> {y = MatMul(x, w)}")
    assert run(twin_of(model, "float16"), x=x * 2049).item() == 2048


def test_movement_needs_no_pair() -> None:
    model = graph(
        """agraph (float[2,3] x) => (float[3,2] y)
        { a = Relu(x)  b = Transpose<perm=[1,0]>(a)  c = Identity(b)  y = Concat<axis=0>(c) }"""
    )
    twin = twin_of(model, "float16")
    assert casts(twin) == [
        "cast/x/float16", "cast/x/float16/float32", "cast/a/float16", "cast/a/float16/float32",
        "cast/y/float32",
    ]  # fmt: skip
    x = np.array([[2049, -1, 7], [1e-9, 5.3, 0]], np.float32)
    expected = np.maximum(x, 0).T.astype(np.float16).astype(np.float32)
    assert np.array_equal(run(twin, x=x), expected)


def test_islands_side_by_side_stay_float32() -> None:
    model = graph(
        """agraph (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}>
        { a = MatMul(x, w)  b = Softmax(a)  c = Transpose<perm=[1,0]>(b)  y = Softmax(c) }"""
    )
    typed = typed_model(model, "float16")
    assert casts(typed) == ["cast/x/float16", "cast/a/float32"]
    assert dtypes(node(typed, "Transpose")) == [FLOAT]


@pytest.mark.parametrize(
    ("nodes", "op", "high"),
    [
        # Arithmetic is float32 where nothing but islands reads it, movement where any does.
        ("s = Softmax(x)  a = Mul(s, w)  y = Softmax(a)", "Mul", True),
        ("s = Softmax(x)  a = Mul(s, w)  b = Softmax(a)  y = MatMul(a, b)", "Mul", False),
        ("s = Softmax(x)  t = Transpose(s)  b = Softmax(t)  y = MatMul(t, b)", "Transpose", True),
        ("s = Softmax(x)  y = Transpose(s)", "Transpose", True),
        (
            "s = Softmax(x)  a = Mul(s, w)  t = Transpose(a)  b = Softmax(t)  y = MatMul(a, b)",
            "Transpose",
            False,
        ),
        (
            "r = Relu(x)  m = ReduceMean(r, axis)  t = Transpose(m)  y = MatMul(m, t)",
            "Transpose",
            False,
        ),
        ("s = Softmax(x)  y = Mul(s, w)", "Mul", False),
        (
            "s = Softmax(x)  t = Transpose(s)  m = ReduceMean(t, axis)  n = MatMul(t, w)"
            "  y = Mul(n, m)",
            "Transpose",
            True,
        ),
        # What is joined with an island's result stays with it.
        (
            "s = Softmax(x)  r = Relu(x)  c = Concat<axis=1>(s, r)  d = Softmax(c)"
            "  y = MatMul(d, v)",
            "Concat",
            True,
        ),
        # A statistic of a row is one also once it is moved, and beside a constant.
        (
            "r = Relu(x)  m = ReduceMean<keepdims=0>(r, axis)  u = Unsqueeze(m, axis)"
            "  c = Sub(r, u)  y = MatMul(c, w)",
            "Sub",
            True,
        ),
        (
            "r = Relu(x)  m = ReduceMax(r, axis)  e = Exp(m)  c = Mul(r, e)  y = MatMul(c, w)",
            "Mul",
            True,
        ),
        # What a statistic was taken from is none.
        (
            "r = Relu(x)  m = ReduceMean(r, axis)  c = Sub(r, m)  d = Mul(c, w)  y = MatMul(d, w)",
            "Mul",
            False,
        ),
        ("s = Softmax(x)  e = Exp(s)  r = Relu(x)  c = Mul(r, e)  y = MatMul(c, w)", "Mul", False),
    ],
)
@pytest.mark.parametrize("precision", TYPED)
def test_which_side_it_is_on(precision: str, nodes: str, op: str, high: bool) -> None:
    model = graph(
        f"""agraph (float[2,2] x) => (float[2,2] y)
        <float[2,2] w = {{1,2,3,4}}, float[4,2] v = {{1,2,3,4,5,6,7,8}}, int64[1] axis = {{1}}>
        {{ {nodes} }}"""
    )
    typed = typed_model(model, precision)
    assert node(typed, op).metadata_props[PRECISION_TAG] == ("float32" if high else precision)
    onnx.checker.check_model(ir.to_proto(typed), full_check=True)


def test_scales_of_a_resize_are_float32() -> None:
    model = graph(
        """agraph (float[1,1,2,2] x) => (float[1,1,4,4] y) <float[4] scales = {1,1,2,2}>
        { r = Relu(x)  y = Resize(r, , scales) }"""
    )
    typed = typed_model(model, "float16")
    assert dtypes(node(typed, "Resize")) == [LOW["float16"], FLOAT]
    onnx.checker.check_model(ir.to_proto(typed), full_check=True)


def test_a_graph_with_branches_is_refused() -> None:
    model = graph(
        """agraph (float[2] x, bool which) => (float[2] y)
        { y = If(which) < then_branch = one () => (float[2] a) { a = Relu(x) },
                          else_branch = two () => (float[2] b) { b = Neg(x) } > }"""
    )
    with pytest.raises(PlanError, match=r"subgraphs \(If, Loop\) cannot be typed"):
        typed_model(model, "float16")


def test_casts_are_shared_and_placed_before_movement() -> None:
    model = graph(
        """agraph (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}>
        { s = Softmax(x)  t = Transpose<perm=[1,0]>(s)  a = MatMul(s, w)  b = MatMul(t, w)
          y = Add(a, b) }"""
    )
    typed = typed_model(model, "float16")
    assert casts(typed) == ["cast/s/float16", "cast/y/float32"]
    assert node(typed, "Transpose").outputs[0].dtype == LOW["float16"]


def test_a_weight_that_both_sides_read_has_one_copy_each() -> None:
    model = graph(
        """agraph (float[2,2] x) => (float[2,2] y) <float[2] w = {1,2}>
        { a = Relu(x)  b = Mul(a, w)  c = Mul(b, w)  y = LayerNormalization(c, w) }"""
    )
    typed = typed_model(model, "float16")
    stored = {name: value.dtype for name, value in typed.graph.initializers.items()}
    assert stored == {"w": FLOAT, "w/float16": LOW["float16"]}


RMS = """agraph (float[2,8] x, float[8,4] w) => (float[2,4] y)
<float two = {2}, float eps = {1e-12}, int64[1] axis = {-1}, float one = {1}>
{ h = Relu(x)  p = Pow(h, two)  m = ReduceMean(p, axis)  e = Add(m, eps)  r = Sqrt(e)
  q = Div(one, r)  n = Mul(h, q)  y = MatMul(n, w) }"""


def test_a_written_out_norm_is_one_island() -> None:
    model = graph(RMS)
    typed = typed_model(model, "float16")
    ops = {n.op_type: n.metadata_props[PRECISION_TAG] for n in typed.graph if n.op_type != "Cast"}
    high = {"Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"}
    assert ops == {op: "float32" for op in high} | {"Relu": "float16", "MatMul": "float16"}
    assert sorted(filter(None, casts(typed))) == [
        "cast/h/float32", "cast/n/float16", "cast/w/float16", "cast/x/float16", "cast/y/float32",
    ]  # fmt: skip


def test_a_norm_outside_the_islands_overflows() -> None:
    model = graph(RMS)
    feeds = {"x": np.full((2, 8), 400, np.float32), "w": np.ones((8, 4), np.float32)}
    assert np.array_equal(run(twin_of(model, "float16"), **feeds), np.full((2, 4), 8))
    bare = twin_of(model, "float16", frozenset())
    assert not np.array_equal(run(bare, **feeds), np.full((2, 4), 8))


def test_division_by_a_constant_is_a_scale() -> None:
    model = graph("agraph (float[2] x) => (float[2] y) <float c = {8}> {y = Div(x, c)}")
    assert dtypes(node(typed_model(model, "float16"), "Div")) == [LOW["float16"]] * 2


def test_weight_that_overflows_is_an_error() -> None:
    model = graph(
        """agraph (float[1,2] x) => (float[1,1] y) <float[2,1] fat = {-70000, 66000}>
        { y = MatMul(x, fat) }"""
    )
    with pytest.raises(PlanError, match=r"^fat: its largest value, -70000, .*65504.*bfloat16"):
        typed_model(model, "float16")
    with pytest.raises(PlanError, match="fat"):
        twin_of(model, "float16")
    typed_model(model, "bfloat16")


@pytest.mark.parametrize(
    ("nodes", "weight"),
    [
        ("a = Add(r, c)  y = Softmax(a)", False),
        ("a = Add(r, c)  b = Mul(a, half)  t = Transpose<perm=[1,0]>(b)  y = Softmax(t)", False),
        ("e = Expand(c, shape)  a = Add(r, e)  y = Softmax(a)", False),
        ("y = Max(r, c)", False),
        ("a = Add(r, c)  y = Relu(a)", True),
        ("a = Mul(r, c)  y = Softmax(a)", True),
        ("e = Expand(c, shape)  y = MatMul(r, e)", True),
        ("p = Pad(c, pads)  y = MatMul(r, p)", True),
        ("g = Greater(r, half)  y = Where(g, r, c)", True),
        # As a mask, and otherwise.
        ("a = Add(r, c)  s = Softmax(a)  y = MatMul(s, c)", True),
        (
            "d, e = Split<axis=0, num_outputs=2>(both)  a = Add(r, d)  s = Softmax(a)"
            "  y = MatMul(s, e)",
            True,
        ),
    ],
)
def test_what_masks_or_bounds_is_clamped_and_no_weight_is(nodes: str, weight: bool) -> None:
    model = graph(
        f"""agraph (float[2,2] x) => (float[2,2] y)
        <float[2,2] c = {{0, -70000, 0, 0}}, float[4,2] both = {{0, -70000, 0, 0, 1, 1, 1, 1}},
        float half = {{0.5}}, int64[2] shape = {{2, 2}}, int64[4] pads = {{0, 0, 0, 0}}>
        {{ r = Relu(x)  {nodes} }}"""
    )
    if weight:
        with pytest.raises(PlanError, match=r"^(c|both): its largest value, -70000"):
            typed_model(model, "float16")
        return
    low = typed_model(model, "float16").graph.initializers["c"].const_value
    assert low is not None
    assert np.array_equal(low.numpy(), np.array([[0, -65504], [0, 0]], np.float16))


def test_bank_constant_that_overflows_is_an_error(base: BaseGraph, plan: Plan) -> None:
    bank = np.zeros((2, plan.layout.size), np.float32)
    bank[1, 5] = 1e6
    model = baked(branched_model(base, plan), bank)
    with pytest.raises(PlanError, match="adapter_bank: its largest value, 1e"):
        typed_model(model, "float16")


MASK = """agraph (float[2,2] x) => (float[2,2] y) <float[2,2] mask = {0, -3.4028235e38, 0, 0}>
{ r = Relu(x)  a = Add(r, mask)  y = Softmax(a) }"""


@pytest.mark.parametrize(
    ("precision", "largest"), [("float16", 65504.0), ("bfloat16", 3.3895314e38)]
)
def test_mask_is_clamped(precision: str, largest: float) -> None:
    typed = typed_model(graph(MASK), precision)
    mask = typed.graph.initializers["mask"].const_value
    assert mask is not None
    expected = np.array([[0, -largest], [0, 0]], np.float32).astype(NUMPY[precision])
    assert np.array_equal(mask.numpy(), expected)
    found = run(twin_of(graph(MASK), precision), x=np.zeros((2, 2), np.float32))
    assert np.array_equal(found, [[1, 0], [0.5, 0.5]])
    model = graph(MASK)
    both = np.array([[0, -np.finfo(np.float32).max], [0, -np.inf]], np.float32)
    model.graph.initializers["mask"].const_value = ir.tensor(both, name="mask")
    low = typed_model(model, precision).graph.initializers["mask"].const_value
    assert low is not None
    expected[1, 1] = -np.inf
    assert np.array_equal(low.numpy(), expected)


def test_infinite_fill_and_nan_stay() -> None:
    model = graph(
        """agraph (float[1,2] x, bool bad) => (float[1,3] y)
        <int64[4] pads = {0,0,0,1}, float inf = {0}, float nan = {0}>
        { a = Relu(x)  b = Pad(a, pads, inf)  y = Where(bad, nan, b) }"""
    )
    for name, value in (("inf", -np.inf), ("nan", np.nan)):
        model.graph.initializers[name].const_value = ir.tensor(np.float32(value), name=name)
    x = np.array([[1.5, 2.0]], np.float32)
    for made in (typed_model(model, "float16"), twin_of(model, "float16")):
        assert np.array_equal(run(made, x=x, bad=np.array(False)), [[1.5, 2.0, -np.inf]])
        assert np.isnan(run(made, x=x, bad=np.array(True))).all()


def test_casts_of_the_source_are_retargeted() -> None:
    model = graph(
        """agraph (float[n] x, int64[n] i) => (float[n] y)
        { r = Relu(x)  c = Cast<to=1>(i)  l = CastLike(i, r)  same = Cast<to=1>(r)
          a = Add(same, c)  y = Add(a, l) }"""
    )
    typed, twin = typed_model(model, "float16"), twin_of(model, "float16")
    assert not [n for n in typed.graph if n.op_type == "CastLike"]
    assert {n.outputs[0].dtype for n in typed.graph if n.op_type == "Add"} == {LOW["float16"]}
    feeds = {"x": np.zeros(1, np.float32), "i": np.array([2049])}
    assert run(twin, **feeds).item() == 4096


def test_shapes_integers_and_comparisons_are_left_alone() -> None:
    model = graph(
        """agraph (float[n,2] x) => (float[n,2] y) <int64[1] two = {2}, float half = {0.5}>
        { r = Relu(x)  s = Shape(r)  z = ConstantOfShape<value = float[1] {1.5}>(s)
          g = Greater(r, half)  y = Where(g, r, z) }"""
    )
    typed = typed_model(model, "float16")
    assert node(typed, "Shape").outputs[0].dtype == ir.DataType.INT64
    assert node(typed, "Greater").outputs[0].dtype == ir.DataType.BOOL
    assert node(typed, "ConstantOfShape").outputs[0].dtype == LOW["float16"]
    x = np.array([[0.25, 1.0]], np.float32)
    for made in (typed, rounding_twin(typed)):
        assert np.array_equal(run(made, x=x), [[1.5, 1.0]])


def test_an_output_of_integers_stays_one() -> None:
    model = graph(
        """agraph (float[2,3] x) => (int64[2,1] y) <float[3,3] w = {0,1,0, 1,0,0, 0,0,1}>
        { a = MatMul(x, w)  y = ArgMax<axis=1>(a) }"""
    )
    for made in (typed_model(model, "float16"), twin_of(model, "float16")):
        (output,) = made.graph.outputs
        assert (output.name, output.dtype) == ("y", ir.DataType.INT64)


def test_missing_types_are_inferred() -> None:
    model = graph(SUM)
    for found in model.graph:
        found.outputs[0].type = None
    model.graph.outputs[0].type = ir.TensorType(FLOAT)
    assert node(typed_model(model, "float16"), "Add").outputs[0].dtype == LOW["float16"]


def test_an_island_that_is_no_operator_is_refused() -> None:
    with pytest.raises(PlanError, match="no operator LayerNorm"):
        typed_model(graph(SUM), "float16", ISLANDS | {"LayerNorm"})


def test_a_typed_graph_is_not_typed_again() -> None:
    with pytest.raises(PlanError, match="start from float32"):
        typed_model(typed_model(graph(SUM), "float16"), "bfloat16")
