"""Side branches: every adapter of a bank beside one backbone, chosen per image.

Per branch, with x the Linear's input, y its output and d, R, L the image's own row:

    additive:    y + d∘x + L (R x)          sequential:    z = y;  z + d∘z + L (R z)

The first thing the graph does with the bank is one Gather of ``batch`` rows and one Split, so
the cost does not depend on the number of slots; all else is views and thin products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from hhdeploy.errors import BackboneError
from hhdeploy.exporters.linears import (
    GraphLinear,
    add_initializer,
    linears_at,
    linears_by_path,
)
from hhdeploy.exporters.qkv import HEADS_SECOND, QkvViews, qkv_views
from hhdeploy.exporters.trace import BaseGraph
from hhdeploy.plan import Plan
from hhdeploy.rows import Branch

BANK, IDS = "adapter_bank", "adapter_ids"
# Marks the sum of a Linear's product and one of its branches.
_SUM = "hhdeploy.sum"


class Inserter:
    """Adds nodes to a graph, in order, behind (or in front of) one node.

    Names: ``branch/<site>/<what>``, so that quantisation and inspection can tell the inserted
    nodes from the backbone's.
    """

    def __init__(
        self,
        graph: ir.Graph,
        prefix: str,
        *,
        after: ir.Node | None = None,
        before: ir.Node | None = None,
    ) -> None:
        self.graph, self.prefix = graph, prefix
        self._after, self._before = after, before

    def __call__(
        self,
        op: str,
        what: str,
        inputs: Sequence[ir.Value],
        *,
        outputs: int = 1,
        dtype: ir.DataType = ir.DataType.FLOAT,
        shape: ir.Shape | Sequence[int | str | None] | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add one node; returns its (first) output."""
        node = ir.node(op, inputs, attributes, num_outputs=outputs, name=f"{self.prefix}/{what}")
        for index, value in enumerate(node.outputs):
            value.name = node.name if outputs == 1 else f"{node.name}_{index}"
            value.dtype = dtype
            if shape is not None:
                value.shape = ir.Shape(list(shape))
        if self._after is not None:
            self.graph.insert_after(self._after, node)
            self._after = node
        else:
            assert self._before is not None
            self.graph.insert_before(self._before, node)
        return node.outputs[0]

    def ints(self, what: str, *values: int) -> ir.Value:
        """An int64 vector constant."""
        return self.constant(what, np.asarray(values, np.int64))

    def constant(self, what: str, array: NDArray[Any]) -> ir.Value:
        """An initializer."""
        return add_initializer(self.graph, f"{self.prefix}/{what}", array)


@dataclass(frozen=True)
class _Rows:
    """The gathered rows, split: part name -> [batch, elements]; and [1] int64 batch size."""

    parts: dict[str, ir.Value]
    ids: ir.Value
    bank: ir.Value


def branched_model(
    base: BaseGraph, plan: Plan, *, bank_constant: NDArray[np.float32] | None = None
) -> ir.Model:
    """A new graph with all side branches of a plan; ``base`` is not changed.

    1. Inputs ``adapter_ids`` int64 [batch] and ``adapter_bank`` float32 [slots, row].
    2. One Gather, one Split into the parts of the row.
    3. A branch per (Linear, form): additive first, then sequential on the sum.
    4. The head: ``head.own`` selects the row's head or the backbone's; columns past the
       adapter's classes are -inf.

    Args:
        base: the traced backbone.
        plan: names, order and row layout.
        bank_constant: bakes this bank in instead of the input; ids outside [0, slots) then
            give NaN logits, since no caller can check them.
    """
    model = base.model.clone()
    graph = model.graph
    rows = _insert_rows(graph, plan, bank_constant)
    by_path = linears_by_path(graph)
    sequential = {b.linear for b in plan.layout.branches if b.form == "sequential"}
    for branch in plan.layout.branches:
        for use, linear in enumerate(linears_at(by_path, branch.linear)):
            views = qkv_views(linear) if len(branch.sites) == 3 else None
            if views is not None:
                _insert_qkv_branches(graph, linear, branch, rows, use, views)
                continue
            ride = branch.linear not in sequential and _bias_may_ride(linear)
            _insert_branch(graph, linear, branch, rows, use, ride)
    head = linears_at(by_path, base.facts.classifier)[-1]
    _insert_head(graph, head, plan, rows)
    if bank_constant is not None:
        _poison_bad_ids(graph, rows, bank_constant.shape[0])
    graph.outputs[0].shape = ir.Shape(["batch", plan.classes])
    RemoveUnusedNodesPass()(model)
    return model


def _insert_rows(graph: ir.Graph, plan: Plan, bank_constant: NDArray[np.float32] | None) -> _Rows:
    layout = plan.layout
    insert = Inserter(graph, "branch/bank", before=next(iter(graph)))
    ids = ir.Value(name=IDS, shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(ids)
    if bank_constant is None:
        bank = ir.Value(
            name=BANK,
            shape=ir.Shape(["slots", layout.size]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        graph.inputs.append(bank)
        index = ids
    else:
        bank = add_initializer(graph, BANK, bank_constant)
        last = insert.constant("last", np.asarray(bank_constant.shape[0] - 1, np.int64))
        zero = insert.constant("first", np.asarray(0, np.int64))
        index = insert("Clip", "clip", [ids, zero, last], dtype=ir.DataType.INT64, shape=["batch"])
    gathered = insert("Gather", "gather", [bank, index], axis=0, shape=["batch", layout.size])
    sizes = [int(np.prod(shape)) for shape in layout.parts.values()]
    # A Constant node, not an initializer: a long one would move to the external data file, where
    # shape inference does not look.
    split_sizes = insert(
        "Constant",
        "sizes",
        [],
        dtype=ir.DataType.INT64,
        shape=[len(sizes)],
        value=ir.tensor(np.asarray(sizes, np.int64)),
    )
    first = insert(
        "Split",
        "split",
        [gathered, split_sizes],
        outputs=len(sizes),
        axis=1,
    )
    split = first.producer()
    assert split is not None
    for value, size in zip(split.outputs, sizes, strict=True):
        value.shape = ir.Shape(["batch", size])
    return _Rows(dict(zip(layout.parts, split.outputs, strict=True)), ids, bank)


def _insert_branch(
    graph: ir.Graph, linear: GraphLinear, branch: Branch, rows: _Rows, use: int, ride: bool
) -> None:
    """Insert one branch between a Linear's product and its bias.

    The backbone's own pattern (bias, residual, norm) stays last, so a runtime fuses it exactly
    as in the bare backbone, and a row of zeros gives the same bits. The sequential form reads
    the Linear's whole output, z = product + bias, from an Add of its own.

    ``ride``: the bias is one more row of L, met by a column of ones, instead of an Add of its
    own: one pass over the output less (of five; 1.5 % of ViT-B/16 in ONNX Runtime).
    """
    product = _product(linear)
    producer = product.producer()
    assert producer is not None
    suffix = f"@{use}" if use else ""
    insert = Inserter(graph, f"branch/{branch.name}{suffix}", after=producer)
    consumers = list(product.uses())
    x = linear.input if branch.form == "additive" else _with_bias(insert, linear, product)
    tokens = _as_tokens(insert, x, branch.in_)
    low = _low(insert, branch, rows, tokens)
    left = _left(insert, branch, rows)
    if ride:
        assert linear.bias_node is not None
        bias = linear.bias_node.inputs[linear.bias_index]
        assert bias is not None
        low, left = _with_bias_row(insert, bias, low, left)
    low_rank = insert("MatMul", "matmul_left", [low, left])
    diag = rows.parts[f"{branch.name}/diag"]
    delta = insert("Add", "delta", [low_rank, _scaled(insert, branch, tokens, diag)])
    total = insert("Add", "sum", [product, _like(insert, delta, product)], shape=product.shape)
    sum_node = total.producer()
    assert sum_node is not None
    sum_node.metadata_props[_SUM] = linear.path
    if ride:
        assert linear.bias_node is not None
        consumers = list(linear.output.uses())  # the bias Add is left without a use
    for consumer, index in consumers:
        consumer.replace_input_with(index, total)


def _insert_qkv_branches(
    graph: ir.Graph,
    linear: GraphLinear,
    branch: Branch,
    rows: _Rows,
    use: int,
    views: QkvViews,
) -> None:
    """Replace a fused qkv by three products, each with its own branch (see `qkv`)."""
    k, in_, out = branch.rank, branch.in_, branch.out
    suffix = f"@{use}" if use else ""
    anchor = views.reshape
    shared = Inserter(graph, f"branch/{branch.name}{suffix}", before=anchor)
    tokens = _as_tokens(shared, linear.input, in_)
    lows = _split(shared, "low", _low(shared, branch, rows, tokens), 3, k, ["batch", None, k])
    parts = {
        name: _split(shared, name, rows.parts[f"{branch.name}/{name}"], 3, size, ["batch", size])
        for name, size in (("left_t", k * out), ("diag", min(out, in_)))
    }
    weight, bias = linear.weight, linear.bias
    for i, site in enumerate(branch.sites):
        third = slice(i * out, (i + 1) * out)
        backbone = Inserter(graph, f"{site}{suffix}", before=anchor)
        product = backbone(
            "MatMul",
            "MatMul",
            [linear.input, backbone.constant("weight_t", weight[third].T)],
            shape=_last_dimension(linear.node.outputs[0], out),
        )
        insert = Inserter(graph, f"branch/{site}/{branch.form}{suffix}", before=anchor)
        left = insert(
            "Reshape", "left", [parts["left_t"][i], insert.ints("left_shape", -1, k, out)],
            shape=["batch", k, out],
        )  # fmt: skip
        low = lows[i]
        if bias is not None:
            row = backbone.constant("bias", bias[third])
            low, left = _with_bias_row(insert, row, low, left)
        low_rank = insert("MatMul", "matmul_left", [low, left])
        one_site = replace(branch, sites=(site,))
        scaled = _scaled(insert, one_site, tokens, parts["diag"][i])
        delta = _like(insert, insert("Add", "delta", [low_rank, scaled]), product)
        total = insert("Add", "sum", [product, delta], shape=product.shape)
        heads = insert("Reshape", "heads", [total, insert.ints("heads_shape", *views.shape)])
        transposed = insert(
            "Transpose", "heads_second", [heads], perm=list(HEADS_SECOND),
            shape=views.parts[i].shape,
        )  # fmt: skip
        for consumer, index in list(views.parts[i].uses()):
            consumer.replace_input_with(index, transposed)


def _split(
    insert: Inserter,
    what: str,
    value: ir.Value,
    count: int,
    size: int,
    shape: Sequence[int | str | None],
) -> list[ir.Value]:
    """``count`` equal parts of the last axis."""
    axis = len(shape) - 1
    first = insert(
        "Split", f"{what}_split", [value, insert.ints(f"{what}_sizes", *[size] * count)],
        outputs=count, axis=axis,
    )  # fmt: skip
    node = first.producer()
    assert node is not None
    for part in node.outputs:
        part.shape = ir.Shape(list(shape))
    return list(node.outputs)


def _last_dimension(value: ir.Value, size: int) -> ir.Shape | None:
    """The shape of ``value`` with another last dimension."""
    if value.shape is None:
        return None
    return ir.Shape([*value.shape[:-1], size])


def _low(insert: Inserter, branch: Branch, rows: _Rows, tokens: ir.Value) -> ir.Value:
    """R x of all n sites at once: [batch, tokens, n·k]."""
    wide, in_ = len(branch.sites) * branch.rank, branch.in_
    right = insert(
        "Reshape",
        "right",
        [rows.parts[f"{branch.name}/right"], insert.ints("right_shape", -1, wide, in_)],
        shape=["batch", wide, in_],
    )
    right_t = insert("Transpose", "right_t", [right], perm=[0, 2, 1], shape=["batch", in_, wide])
    return insert("MatMul", "matmul_right", [tokens, right_t], shape=["batch", None, wide])


def _bias_may_ride(linear: GraphLinear) -> bool:
    """Whether the bias Add can go: not where runtimes fuse it with what follows.

    fc1's is fused with the activation and fc2's with residual and norm, in other bits than a
    plain Add; q, k, v and proj are followed by views, scales and residuals alone.
    """
    if linear.bias_node is None or linear.bias_node is linear.node:
        return False
    return linear.path.rpartition(".")[2] not in ("fc1", "fc2")


def _with_bias_row(
    insert: Inserter, bias: ir.Value, low: ir.Value, left: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """[R x, 1] and [L ; b]: their product is L R x + b, exactly b where L R x is zero."""
    one = insert.constant("one", np.asarray(1.0, np.float32))
    low = insert("Pad", "low_and_one", [low, insert.ints("one_pads", 0, 0, 0, 0, 0, 1), one])
    ids = next(v for v in insert.graph.inputs if v.name == IDS)
    batch = insert("Shape", "bias_batch", [ids], dtype=ir.DataType.INT64, shape=[1])
    shape = insert(
        "Concat", "bias_shape", [batch, insert.ints("bias_ones", 1, 1)], axis=0,
        dtype=ir.DataType.INT64, shape=[3],
    )  # fmt: skip
    row = insert("Expand", "bias_row", [bias, shape])
    return low, insert("Concat", "left_and_bias", [left, row], axis=1)


def _product(linear: GraphLinear) -> ir.Value:
    """Where a branch is added: W x before the bias (a Gemm has the bias inside), plus the
    branches that were inserted before."""
    value = linear.node.outputs[0]
    while sums := [n for n, _ in value.uses() if n.metadata_props.get(_SUM) == linear.path]:
        value = sums[0].outputs[0]
    return value


def _with_bias(insert: Inserter, linear: GraphLinear, product: ir.Value) -> ir.Value:
    if linear.bias_node is None or linear.bias_node is linear.node:
        return product
    bias = linear.bias_node.inputs[linear.bias_index]
    assert bias is not None
    return insert("Add", "input", [product, bias], shape=product.shape)


def _as_tokens(insert: Inserter, x: ir.Value, features: int) -> ir.Value:
    """x as [batch, tokens, features].

    Windows and other groups are folded into the batch dimension batch-major by timm's models
    ([batch·windows, tokens, features]), so unfolding the images is a reshape.
    """
    shape = x.shape
    if shape is not None and len(shape) == 3 and str(shape[0]) == "batch":
        return x
    return insert(
        "Reshape",
        "tokens",
        [x, _batch_shape(insert, features)],
        shape=["batch", None, features],
    )


def _batch_shape(insert: Inserter, features: int) -> ir.Value:
    """[batch, -1, features], with batch read from the adapter ids."""
    ids = next(v for v in insert.graph.inputs if v.name == IDS)
    batch = insert("Shape", "batch", [ids], dtype=ir.DataType.INT64, shape=[1])
    rest = insert.ints("rest", -1, features)
    return insert(
        "Concat", "tokens_shape", [batch, rest], axis=0, dtype=ir.DataType.INT64, shape=[3]
    )


def _left(insert: Inserter, branch: Branch, rows: _Rows) -> ir.Value:
    """[batch, n·k, n·out]: left_t, for a fused qkv on the diagonal blocks of a wider matrix.

    One product over a block-diagonal matrix instead of three products and a concatenation over
    all tokens: the zeros cost 2 k columns a row, the concatenation would cost a pass over q,
    k and v.
    """
    n, k, out = len(branch.sites), branch.rank, branch.out
    part = rows.parts[f"{branch.name}/left_t"]
    if n == 1:
        return insert(
            "Reshape",
            "left_t",
            [part, insert.ints("left_shape", -1, k, out)],
            shape=["batch", k, out],
        )
    blocks = insert(
        "Reshape",
        "left_blocks",
        [part, insert.ints("left_shape", -1, n, k, 1, out)],
        shape=["batch", n, k, 1, out],
    )
    eye = insert.constant("eye", np.eye(n, dtype=np.float32).reshape(n, 1, n, 1))
    wide = insert("Mul", "left_wide", [blocks, eye], shape=["batch", n, k, n, out])
    return insert(
        "Reshape",
        "left_t",
        [wide, insert.ints("wide_shape", -1, n * k, n * out)],
        shape=["batch", n * k, n * out],
    )


def _scaled(insert: Inserter, branch: Branch, tokens: ir.Value, diag: ir.Value) -> ir.Value:
    """[batch, tokens, n·out]: D x for each of the n sites, x cut or padded to fit."""
    n, out, in_ = len(branch.sites), branch.out, branch.in_
    common = min(out, in_)
    x = tokens
    if common < in_:
        x = insert(
            "Slice",
            "x_cut",
            [
                x,
                insert.ints("cut_start", 0),
                insert.ints("cut_end", common),
                insert.ints("axis", 2),
            ],
            shape=["batch", None, common],
        )
    if n > 1:
        x = insert(
            "Unsqueeze",
            "x_sites",
            [x, insert.ints("sites_axis", 2)],
            shape=["batch", None, 1, common],
        )
    diag = insert(
        "Reshape",
        "diag",
        [diag, insert.ints("diag_shape", *([-1, 1, n, common] if n > 1 else [-1, 1, common]))],
        shape=["batch", 1, n, common] if n > 1 else ["batch", 1, common],
    )
    scaled = insert("Mul", "scale", [x, diag])
    if common < out:
        pads = [0] * (2 * (4 if n > 1 else 3))
        pads[-1] = out - common
        scaled = insert("Pad", "scale_pad", [scaled, insert.ints("pads", *pads)])
    if n > 1:
        scaled = insert(
            "Reshape",
            "scale_flat",
            [scaled, insert.ints("flat_shape", 0, -1, n * out)],
            shape=["batch", None, n * out],
        )
    return scaled


def _like(insert: Inserter, delta: ir.Value, target: ir.Value) -> ir.Value:
    """[batch, tokens, features] in the shape of ``target``."""
    shape = target.shape
    if shape is not None and len(shape) == 3 and str(shape[0]) == "batch":
        return delta
    if shape is not None and all(isinstance(d, int) for d in shape[1:]):
        dims = [int(d) for d in shape[1:]]  # type: ignore[arg-type]
        wanted = insert.ints("out_shape", -1, *dims)
    else:
        wanted = insert("Shape", "out_shape", [target], dtype=ir.DataType.INT64)
    return insert("Reshape", "delta_out", [delta, wanted], shape=shape)


def _insert_head(graph: ir.Graph, head: GraphLinear, plan: Plan, rows: _Rows) -> None:
    layout, backbone_classes = plan.layout, plan.facts.classes
    if not layout.classes:
        return  # every adapter uses the backbone's classifier as it is
    y, features = head.output, head.input
    output = graph.outputs[0]
    if output is not y:
        raise BackboneError(
            f"{plan.facts.model}: the classifier {head.path} is not the last operation of the "
            "model; adapters with heads of their own cannot be kept as side branches."
        )
    producer = y.producer()
    assert producer is not None
    insert = Inserter(graph, f"branch/{head.path}", after=producer)
    rank2 = features.shape is not None and len(features.shape) == 2
    if not rank2:
        raise BackboneError(
            f"{plan.facts.model}: the classifier {head.path} takes {features.shape}; expected "
            "[batch, features]."
        )
    weight = insert(
        "Reshape",
        "weight",
        [rows.parts["head.weight"], insert.ints("weight_shape", -1, layout.classes, layout.dim)],
        shape=["batch", layout.classes, layout.dim],
    )
    column = insert(
        "Unsqueeze",
        "features",
        [features, insert.ints("last_axis", 2)],
        shape=["batch", layout.dim, 1],
    )
    product = insert("MatMul", "matmul", [weight, column], shape=["batch", layout.classes, 1])
    flat = insert(
        "Squeeze",
        "flat",
        [product, insert.ints("squeeze_axis", 2)],
        shape=["batch", layout.classes],
    )
    own = insert("Add", "logits", [flat, rows.parts["head.bias"]], shape=["batch", layout.classes])
    own = _padded(insert, own, layout.classes, plan.classes, "own")
    if layout.backbone_head:
        theirs = _padded(insert, y, backbone_classes, plan.classes, "backbone")
        half = insert.constant("half", np.asarray(0.5, np.float32))
        choice = insert(
            "Greater",
            "is_own",
            [rows.parts["head.own"], half],
            dtype=ir.DataType.BOOL,
            shape=["batch", 1],
        )
        own = insert("Where", "select", [choice, own, theirs], shape=["batch", plan.classes])
    _rename_output(graph, own)


def _padded(insert: Inserter, logits: ir.Value, classes: int, wanted: int, what: str) -> ir.Value:
    """Columns of -inf up to ``wanted``."""
    if classes == wanted:
        return logits
    return insert(
        "Pad",
        f"{what}_pad",
        [
            logits,
            insert.ints(f"{what}_pads", 0, 0, 0, wanted - classes),
            insert.constant(f"{what}_inf", np.asarray(-np.inf, np.float32)),
        ],
        shape=["batch", wanted],
    )


def _poison_bad_ids(graph: ir.Graph, rows: _Rows, slots: int) -> None:
    """NaN logits for ids outside [0, slots): a constant bank has no caller that checks."""
    logits = graph.outputs[0]
    producer = logits.producer()
    assert producer is not None
    insert = Inserter(graph, "branch/bank/check", after=producer)
    bad_low = insert(
        "Less",
        "below",
        [rows.ids, insert.constant("zero", np.asarray(0, np.int64))],
        dtype=ir.DataType.BOOL,
        shape=["batch"],
    )
    bad_high = insert(
        "GreaterOrEqual",
        "above",
        [rows.ids, insert.constant("slots", np.asarray(slots, np.int64))],
        dtype=ir.DataType.BOOL,
        shape=["batch"],
    )
    bad = insert("Or", "bad", [bad_low, bad_high], dtype=ir.DataType.BOOL, shape=["batch"])
    column = insert(
        "Unsqueeze",
        "bad_column",
        [bad, insert.ints("axis", 1)],
        dtype=ir.DataType.BOOL,
        shape=["batch", 1],
    )
    nan = insert.constant("nan", np.asarray(np.nan, np.float32))
    _rename_output(graph, insert("Where", "checked", [column, nan, logits], shape=logits.shape))


def _rename_output(graph: ir.Graph, value: ir.Value) -> None:
    """Make ``value``, so far called after its node, the graph's output."""
    old = graph.outputs[0]
    name = old.name
    producer = old.producer()
    assert producer is not None
    old.name = f"{producer.name}/replaced"
    graph.outputs[0] = value
    value.name = name
