"""A fused qkv taken apart: three products instead of one, for side branches on q, k and v.

timm's attention computes ``qkv(x).reshape(B, N, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)``.
With a branch on each third, adding to the thirds before they are joined costs one pass over
q, k and v less than adding to the fused output, and every operand is a third as large, so that
one image's stay in a core's cache. The numbers are the same, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.bundle.layout import Branch
from hhdeploy.exporters.inserter import Inserter, Rows, as_tokens, per_image
from hhdeploy.exporters.parts import add_product, diagonal_times, multiplier, scale_input
from hhdeploy.graph import GraphLinear

_PARTS_FIRST = (2, 0, 3, 1, 4)
HEADS_SECOND = (0, 2, 1, 3)


@dataclass(frozen=True)
class QkvViews:
    """What follows a fused qkv.

    Attributes:
        reshape: the node that makes [batch, tokens, 3, heads, head_dim].
        shape: the constant target shape of the reshape, without the 3.
        parts: q, k and v as [batch, heads, tokens, head_dim].
    """

    reshape: ir.Node
    shape: tuple[int, ...]
    parts: tuple[ir.Value, ir.Value, ir.Value]


def qkv_views(linear: GraphLinear) -> QkvViews | None:
    """The views behind a fused qkv, None where a model does anything else with it."""
    reshape = _only_consumer(linear.output, "Reshape")
    if linear.node.op_type != "MatMul" or reshape is None:
        return None
    shape = _ints(reshape.inputs[1])
    transpose = _only_consumer(reshape.outputs[0], "Transpose")
    if shape is None or len(shape) != 5 or shape[2] != 3 or transpose is None:
        return None
    if tuple(transpose.attributes.get_ints("perm", ())) != _PARTS_FIRST:
        return None
    parts: dict[int, ir.Value] = {}
    for use in transpose.outputs[0].uses():
        taken = _taken_part(use.node)
        if taken is None or taken[0] in parts:
            return None
        parts[taken[0]] = taken[1]
    if set(parts) != {0, 1, 2}:
        return None
    return QkvViews(reshape, (*shape[:2], *shape[3:]), (parts[0], parts[1], parts[2]))


def _taken_part(node: ir.Node) -> tuple[int, ir.Value] | None:
    """(i, value) of ``transposed[i]``: a Slice of one element of axis 0, squeezed."""
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return None
    start, end, axis = (_ints(value) for value in node.inputs[1:4])
    step = _ints(node.inputs[4]) if len(node.inputs) > 4 else (1,)
    squeeze = _only_consumer(node.outputs[0], "Squeeze")
    if start is None or end != (start[0] + 1,) or axis != (0,) or step != (1,) or squeeze is None:
        return None
    if len(squeeze.inputs) < 2 or _ints(squeeze.inputs[1]) != (0,):
        return None
    return start[0], squeeze.outputs[0]


def _only_consumer(value: ir.Value, op: str) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) == 1 and uses[0].node.op_type == op and uses[0].idx == 0:
        return uses[0].node
    return None


def _ints(value: ir.Value | None) -> tuple[int, ...] | None:
    if value is None or value.const_value is None:
        return None
    return tuple(int(n) for n in np.atleast_1d(value.const_value.numpy()))


def insert_qkv_branches(
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
    if "s_in" in branch.extras:
        scale_input(graph, linear, branch, rows, suffix)
    lows, lefts, diags = _qkv_parts(shared, branch, rows, tokens, linear.bias)
    scales = _third_scales(shared, branch, rows) if "s_out" in branch.extras else None
    weight = linear.weight_as_it_is()
    for i, site in enumerate(branch.sites):
        backbone = Inserter(graph, f"{site}{suffix}", before=anchor)
        third = _third_weight(weight, slice(i * out, (i + 1) * out))
        product = backbone(
            "MatMul",
            "MatMul",
            [linear.input, backbone.computed("weight_t", (branch.in_, out), third)],
            shape=_last_dimension(linear.node.outputs[0], out),
        )
        insert = Inserter(graph, f"branch/{site}/{branch.form}{suffix}", before=anchor)
        low_rank = insert("MatMul", "matmul_left", [lows[i], lefts[i]])
        one_site = replace(branch, sites=(site,))
        scaled = diagonal_times(insert, one_site, tokens, diags[i])
        delta = insert("Add", "delta", [low_rank, scaled])
        total = add_product(insert, product, delta, scales[i] if scales else None, out)
        heads = insert("Reshape", "heads", [total, insert.ints("heads_shape", *views.shape)])
        transposed = insert(
            "Transpose", "heads_second", [heads], perm=list(HEADS_SECOND),
            shape=views.parts[i].shape,
        )  # fmt: skip
        for consumer, index in list(views.parts[i].uses()):
            consumer.replace_input_with(index, transposed)


def _third_weight(
    weight: Callable[[], NDArray[np.float32]], rows: slice
) -> Callable[[], NDArray[np.float32]]:
    return lambda: weight()[rows].T


def _qkv_parts(
    insert: Inserter,
    branch: Branch,
    rows: Rows,
    tokens: ir.Value,
    bias: NDArray[np.float32] | None,
) -> tuple[list[ir.Value], list[ir.Value], list[ir.Value]]:
    """R x [batch, tokens, K], L [batch, K, out] and d [batch, 1, min] of q, k and v.

    K is k, or k + 1 with a bias or db: a column of ones meets it as one more row of L. All three
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
    if bias is not None or "db" in branch.extras:
        thirds = insert("Reshape", "low_thirds", [low, insert.ints("thirds_shape", 0, -1, 3, k)])
        one = insert.constant("one", np.asarray(1.0, np.float32))
        pads = insert.ints("pads", 0, 0, 0, 0, 0, 0, 0, 1)
        padded = insert("Pad", "low_and_ones", [thirds, pads, one])
        bias_rows = _third_biases(insert, branch, rows, bias)
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


def _third_biases(
    insert: Inserter, branch: Branch, rows: Rows, bias: NDArray[np.float32] | None
) -> ir.Value:
    """b + db of q, k and v as one more row of each L: [batch, 3, 1, out]; one of them is there."""
    out = branch.out
    if "db" not in branch.extras:
        assert bias is not None
        return per_image(insert, insert.constant("biases", bias.reshape(1, 3, 1, out)), 4)
    shape: list[int | str | None] = ["batch", 3, 1, out]
    wanted = insert.ints("db_shape", -1, 3, 1, out)
    db = insert("Reshape", "db", [rows.parts[f"{branch.name}/db"], wanted], shape=shape)
    if bias is None:
        return db
    biases = insert.constant("biases", bias.reshape(1, 3, 1, out))
    return insert("Add", "bias_and_db", [biases, db], shape=shape)


def _third_scales(insert: Inserter, branch: Branch, rows: Rows) -> list[ir.Value]:
    """s_out of q, k and v, [batch, 1, out] each."""
    scales = multiplier(insert, branch, rows, "s_out", 3, branch.out)
    return _thirds(insert, "s_out", scales, 1, ["batch", 1, branch.out])


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
