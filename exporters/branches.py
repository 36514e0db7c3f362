"""Side branches: every adapter of a bank beside one backbone, chosen per image.

Per branch, with x the Linear's input, y its output and d, R, L the image's own row:

    additive:    y + d∘x + L (R x)          sequential:    z = y;  z + d∘z + L (R z)

The first thing the graph does with the bank is one Gather of ``batch`` rows and one Split, so
the cost does not depend on the number of slots; all else is views and thin products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from hhdeploy.bundle.layout import Branch
from hhdeploy.errors import PlanError
from hhdeploy.exporters.heads import insert_head
from hhdeploy.exporters.inserter import BANK, IDS, Inserter, Rows, as_tokens, like, per_image
from hhdeploy.exporters.qkv import HEADS_SECOND, QkvViews, qkv_views
from hhdeploy.exporters.trace import MIXED_TAG, BaseGraph
from hhdeploy.graph import GraphLinear, linears_at, linears_by_path
from hhdeploy.plan import Plan

# Marks the sum of a Linear's product and one of its branches.
_SUM = "hhdeploy.sum"


def branched_model(base: BaseGraph, plan: Plan) -> ir.Model:
    """A new graph with all side branches of a plan; ``base`` is not changed.

    1. Inputs ``adapter_ids`` int64 [batch] and ``adapter_bank`` float32 [slots, row].
    2. One Gather, one Split into the parts of the row.
    3. A branch per (Linear, form): additive first, then sequential on the sum.
    4. The head: ``head.own`` selects the row's head or the backbone's; columns past the
       adapter's classes are -inf.

    Args:
        base: the traced backbone.
        plan: names, order and row layout.

    Raises:
        PlanError: a branch at a Linear whose input does not keep the images of a batch apart.
    """
    model = base.model.clone()
    graph = model.graph
    rows = _insert_rows(graph, plan)
    by_path = linears_by_path(graph)
    sequential = {b.linear for b in plan.layout.branches if b.form == "sequential"}
    for branch in plan.layout.branches:
        for use, linear in enumerate(linears_at(by_path, branch.linear)):
            if MIXED_TAG in linear.node.metadata_props:
                raise PlanError(
                    f"{base.facts.model}: {branch.linear} takes an input in which the images of a "
                    "batch do not lie one after the other, so they cannot have an adapter each "
                    "there. Fold the adapter, or leave out that site."
                )
            views = qkv_views(linear) if len(branch.sites) == 3 else None
            if views is not None:
                _insert_qkv_branches(graph, linear, branch, rows, use, views)
                continue
            ride = branch.linear not in sequential and _bias_may_ride(linear)
            _insert_branch(graph, linear, branch, rows, use, ride)
    head = linears_at(by_path, base.facts.classifier)[-1]
    insert_head(graph, head, plan, rows)
    graph.outputs[0].shape = ir.Shape(["batch", plan.classes])
    CommonSubexpressionEliminationPass()(model)  # every site asks for the batch size
    RemoveUnusedNodesPass()(model)
    return model


def _insert_rows(graph: ir.Graph, plan: Plan) -> Rows:
    layout = plan.layout
    insert = Inserter(graph, "branch/bank", before=next(iter(graph)))
    ids = ir.Value(name=IDS, shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(ids)
    bank = ir.Value(
        name=BANK,
        shape=ir.Shape(["slots", layout.size]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    graph.inputs.append(bank)
    gathered = insert("Gather", "gather", [bank, ids], axis=0, shape=["batch", layout.size])
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
    return Rows(dict(zip(layout.parts, split.outputs, strict=True)))


def _insert_branch(
    graph: ir.Graph, linear: GraphLinear, branch: Branch, rows: Rows, use: int, ride: bool
) -> None:
    """Insert one branch between a Linear's product and its bias.

    The backbone's own pattern (bias, residual, norm) stays last, so a runtime fuses it exactly
    as in the bare backbone, and a row of zeros gives the same bits. The sequential form reads
    the Linear's whole output, z = product + bias, from an Add of its own.

    ``ride``: the bias is one more row of L, met by a column of ones, instead of an Add of its
    own: one pass over the output less.
    """
    product = _product(linear)
    producer = product.producer()
    assert producer is not None
    suffix = f"@{use}" if use else ""
    insert = Inserter(graph, f"branch/{branch.name}{suffix}", after=producer)
    consumers = list(product.uses())
    x = linear.input if branch.form == "additive" else _with_bias(insert, linear, product)
    tokens = as_tokens(insert, x, branch.in_)
    low = _low(insert, branch, rows, tokens)
    left = _left(insert, branch, rows)
    if ride:
        assert linear.bias_node is not None
        bias = linear.bias_node.inputs[linear.bias_index]
        assert bias is not None
        low, left = _with_bias_row(insert, bias, low, left)
    low_rank = insert("MatMul", "matmul_left", [low, left])
    diag = _diag(insert, branch, rows)
    delta = insert("Add", "delta", [low_rank, _scaled(insert, branch, tokens, diag)])
    total = insert("Add", "sum", [product, like(insert, delta, product)], shape=product.shape)
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
    rows: Rows,
    use: int,
    views: QkvViews,
) -> None:
    """Replace a fused qkv by three products, each with its own branch (see `qkv`)."""
    out = branch.out
    suffix = f"@{use}" if use else ""
    anchor = views.reshape
    shared = Inserter(graph, f"branch/{branch.name}{suffix}", before=anchor)
    tokens = as_tokens(shared, linear.input, branch.in_)
    lows, lefts, diags = _qkv_parts(shared, branch, rows, tokens, linear.bias)
    weight = linear.weight
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
        low_rank = insert("MatMul", "matmul_left", [lows[i], lefts[i]])
        one_site = replace(branch, sites=(site,))
        scaled = _scaled(insert, one_site, tokens, diags[i])
        delta = like(insert, insert("Add", "delta", [low_rank, scaled]), product)
        total = insert("Add", "sum", [product, delta], shape=product.shape)
        heads = insert("Reshape", "heads", [total, insert.ints("heads_shape", *views.shape)])
        transposed = insert(
            "Transpose", "heads_second", [heads], perm=list(HEADS_SECOND),
            shape=views.parts[i].shape,
        )  # fmt: skip
        for consumer, index in list(views.parts[i].uses()):
            consumer.replace_input_with(index, transposed)


def _qkv_parts(
    insert: Inserter,
    branch: Branch,
    rows: Rows,
    tokens: ir.Value,
    bias: NDArray[np.float32] | None,
) -> tuple[list[ir.Value], list[ir.Value], list[ir.Value]]:
    """R x [batch, tokens, K], L [batch, K, out] and d [batch, 1, min] of q, k and v.

    K is k, or k + 1 with a bias: a column of ones meets the bias as one more row of L. All three
    are prepared together and split last, for the sake of few nodes.
    """
    k, in_, out, common = branch.rank, branch.in_, branch.out, min(branch.out, branch.in_)
    right = insert(
        "Reshape", "right",
        [rows.parts[f"{branch.name}/right"], insert.ints("right_shape", -1, 3, k, in_)],
        shape=["batch", 3, k, in_],
    )  # fmt: skip
    left = insert(
        "Reshape", "left",
        [rows.parts[f"{branch.name}/left_t"], insert.ints("left_shape", -1, 3, k, out)],
        shape=["batch", 3, k, out],
    )  # fmt: skip
    flat = insert("Reshape", "right_flat", [right, insert.ints("flat_shape", -1, 3 * k, in_)])
    right_t = insert("Transpose", "right_t", [flat], perm=[0, 2, 1], shape=["batch", in_, 3 * k])
    low = insert("MatMul", "matmul_right", [tokens, right_t], shape=["batch", None, 3 * k])
    if bias is not None:
        thirds = insert("Reshape", "low_thirds", [low, insert.ints("thirds_shape", 0, -1, 3, k)])
        one = insert.constant("one", np.asarray(1.0, np.float32))
        pads = insert.ints("pads", 0, 0, 0, 0, 0, 0, 0, 1)
        padded = insert("Pad", "low_and_ones", [thirds, pads, one])
        bias_rows = per_image(insert, insert.constant("biases", bias.reshape(1, 3, 1, out)), 4)
        left = insert("Concat", "left_and_bias", [left, bias_rows], axis=2)
        k += 1
        low = insert("Reshape", "low_flat", [padded, insert.ints("low_shape", 0, -1, 3 * k)])
    left = insert("Reshape", "left_flat", [left, insert.ints("left_flat_shape", -1, 3 * k, out)])
    diag = insert(
        "Reshape", "diag",
        [rows.parts[f"{branch.name}/diag"], insert.ints("diag_shape", -1, 3, common)],
    )  # fmt: skip
    return (
        _thirds(insert, "low", low, 2, ["batch", None, k]),
        _thirds(insert, "left", left, 1, ["batch", k, out]),
        _thirds(insert, "diag", diag, 1, ["batch", 1, common]),
    )


def _thirds(
    insert: Inserter, what: str, value: ir.Value, axis: int, shape: Sequence[int | str | None]
) -> list[ir.Value]:
    """Three equal parts along ``axis``; ``shape`` is a part's."""
    size = shape[axis]
    assert isinstance(size, int)
    sizes = insert.ints(f"{what}_sizes", size, size, size)
    first = insert("Split", f"{what}_split", [value, sizes], outputs=3, axis=axis)
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


def _low(insert: Inserter, branch: Branch, rows: Rows, tokens: ir.Value) -> ir.Value:
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
    return low, insert("Concat", "left_and_bias", [left, per_image(insert, bias, 3)], axis=1)


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


def _left(insert: Inserter, branch: Branch, rows: Rows) -> ir.Value:
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


def _diag(insert: Inserter, branch: Branch, rows: Rows) -> ir.Value:
    """d as it meets x: [batch, 1, min], for n sites [batch, 1, n, min]."""
    n, common = len(branch.sites), min(branch.out, branch.in_)
    shape = [1, n, common] if n > 1 else [1, common]
    part = rows.parts[f"{branch.name}/diag"]
    return insert(
        "Reshape", "diag", [part, insert.ints("diag_shape", -1, *shape)], shape=["batch", *shape]
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
