"""A fused qkv taken apart: three products instead of one, for side branches on q, k and v.

timm's attention computes ``qkv(x).reshape(B, N, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)``.
With a branch on each third, adding to the thirds before they are joined costs one pass over
q, k and v less than adding to the fused output, and every operand is a third as large, so that
one image's stay in a core's cache. The numbers are the same, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

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
    if set(parts) != {0, 1, 2} or linear.output.is_graph_output():
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
