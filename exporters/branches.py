"""Side branches: every adapter of a bank beside one backbone, chosen per image.

Per branch, with x the Linear's input, y its output and d, R, L the image's own row:

    additive:    y + d∘x + L (R x)          sequential:    z = y;  z + d∘z + L (R z)

and s_in, s_out and db where a branch has them (see `parts`).

The first thing the graph does with the bank is one Gather of ``batch`` rows and one Split, so
the cost does not depend on the number of slots; all else is views and thin products.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from hhdeploy.bundle.layout import Branch
from hhdeploy.errors import PlanError
from hhdeploy.exporters.heads import insert_head
from hhdeploy.exporters.inserter import BANK, IDS, Inserter, Rows, as_tokens, per_image
from hhdeploy.exporters.parts import (
    add_product,
    bias_row,
    diag_of,
    diagonal_times,
    left_of,
    low_rank_input,
    output_scales,
    scale_input,
)
from hhdeploy.exporters.qkv import insert_qkv_branches, qkv_views
from hhdeploy.exporters.tags import MIXED_TAG
from hhdeploy.exporters.trace import BaseGraph
from hhdeploy.graph import GraphLinear, constant, linears_at, linears_by_path
from hhdeploy.plan import Plan

# Marks what leads from a Linear's product to its sum with one of its branches.
_SUM = "hhdeploy.sum"
_VIEWS = frozenset(
    "Concat Expand Flatten Gather Identity Reshape Slice Split Squeeze Transpose Unsqueeze".split()
)


def branched_model(base: BaseGraph, plan: Plan) -> ir.Model:
    """A new graph with all side branches of a plan; ``base`` is not changed.

    1. Inputs ``adapter_ids`` int64 [batch] and ``adapter_bank`` float32 [slots, row].
    2. One Gather, one Split into the parts of the row.
    3. A branch per (Linear, form): additive first, then sequential on the sum.
    4. The head: ``head.own`` selects the row's head or the backbone's; columns past the
       adapter's classes are -inf. None where the graph gives no logits.

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
                    "batch do not lie one after the other, or that is not made of them, so they "
                    "cannot have an adapter each there. Fold the adapter, or leave out that site."
                )
            views = qkv_views(linear) if len(branch.sites) == 3 else None
            if views is not None:
                insert_qkv_branches(graph, linear, branch, rows, use, views)
                continue
            ride = branch.linear not in sequential and _bias_may_ride(linear)
            _insert_branch(graph, linear, branch, rows, use, ride)
    if plan.classes:
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
    if "s_in" in branch.extras:
        scale_input(graph, linear, branch, rows, suffix)
    tokens = as_tokens(insert, x, branch.in_)
    low = low_rank_input(insert, branch, rows, tokens)
    left = left_of(insert, branch, rows)
    low, left = _with_bias_row(insert, linear, branch, rows, ride, low, left)
    low_rank = insert("MatMul", "matmul_left", [low, left])
    diag = diag_of(insert, branch, rows)
    delta = insert("Add", "delta", [low_rank, diagonal_times(insert, branch, tokens, diag)])
    scale = output_scales(insert, branch, rows) if "s_out" in branch.extras else None
    total = add_product(insert, product, delta, scale, len(branch.sites) * branch.out)
    _mark(total, product, linear.path)
    if ride:
        assert linear.bias_node is not None
        consumers = list(linear.output.uses())  # the bias Add is left without a use
    for consumer, index in consumers:
        consumer.replace_input_with(index, total)


def _bias_may_ride(linear: GraphLinear) -> bool:
    """Whether the bias Add can go: not where runtimes fuse it with what follows, in other bits
    than a plain Add.

    They fuse it with an activation, and with a residual Add that a LayerNormalization alone reads.
    Views, a constant scale (LayerScale) and any other residual Add read it as it is.
    """
    if linear.bias_node is None or linear.bias_node is linear.node:
        return False
    readers = [node for node, _ in linear.output.uses()]
    if all(node.op_type in _VIEWS for node in readers):
        return True
    if len(readers) > 1:
        return False
    (reader,) = readers
    if reader.op_type == "Mul":
        return any(constant(value) is not None for value in reader.inputs)
    after = [node.op_type for node, _ in reader.outputs[0].uses()]
    return reader.op_type == "Add" and after != ["LayerNormalization"]


def _with_bias_row(
    insert: Inserter,
    linear: GraphLinear,
    branch: Branch,
    rows: Rows,
    ride: bool,
    low: ir.Value,
    left: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """[R x, 1] and [L ; b + db]: their product is L R x + b + db, exactly b where the row is zero;
    b if it rides. R x and L as they are where there is nothing to add."""
    bias = None
    if ride:
        assert linear.bias_node is not None
        bias = linear.bias_node.inputs[linear.bias_index]
    row = bias_row(insert, linear, branch, rows, bias)
    if row is None and bias is None:
        return low, left
    one = insert.constant("one", np.asarray(1.0, np.float32))
    low = insert("Pad", "low_and_one", [low, insert.ints("one_pads", 0, 0, 0, 0, 0, 1), one])
    if row is None:
        assert bias is not None
        row = per_image(insert, bias, 3)
    return low, insert("Concat", "left_and_bias", [left, row], axis=1)


def _mark(total: ir.Value, product: ir.Value, path: str) -> None:
    """Mark the nodes from a product to its sum with a branch."""
    value = total
    while value is not product:
        node = value.producer()
        assert node is not None
        node.metadata_props[_SUM] = path
        (first, *_) = node.inputs
        assert first is not None
        value = first


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
