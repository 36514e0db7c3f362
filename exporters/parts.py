"""The parts of a row as a side branch reads them.

Per image, with x the Linear's input and p its product, b its bias:

    p = W ((1 + s_in') ∘ x)        (1 + s_out') ∘ p + [L | b + db] [R x | 1] + D x

A row has the multipliers less one, so that its zeros change no bit. R x and D x read x as it was.
(p + s_out' ∘ p would be one pass more over all tokens.)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from hhdeploy.adapters.format import Part
from hhdeploy.bundle.layout import Branch
from hhdeploy.exporters.inserter import Inserter, Rows, as_tokens, like
from hhdeploy.graph import GraphLinear


def low_rank_input(insert: Inserter, branch: Branch, rows: Rows, tokens: ir.Value) -> ir.Value:
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


def left_of(insert: Inserter, branch: Branch, rows: Rows) -> ir.Value:
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


def diag_of(insert: Inserter, branch: Branch, rows: Rows) -> ir.Value:
    """d as it meets x: [batch, 1, min], for n sites [batch, 1, n, min]."""
    n, common = len(branch.sites), min(branch.out, branch.in_)
    shape = [1, n, common] if n > 1 else [1, common]
    part = rows.parts[f"{branch.name}/diag"]
    return insert(
        "Reshape", "diag", [part, insert.ints("diag_shape", -1, *shape)], shape=["batch", *shape]
    )


def diagonal_times(insert: Inserter, branch: Branch, tokens: ir.Value, diag: ir.Value) -> ir.Value:
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


def scale_input(
    graph: ir.Graph, linear: GraphLinear, branch: Branch, rows: Rows, suffix: str
) -> None:
    """Let the Linear read (1 + s_in') ∘ x; whoever else reads x still does."""
    insert = Inserter(graph, f"branch/{branch.name}{suffix}/s_in", before=linear.node)
    x = linear.input
    scale = multiplier(insert, branch, rows, "s_in", 1, branch.in_)
    tokens = as_tokens(insert, x, branch.in_)
    scaled = insert("Mul", "product", [tokens, scale], shape=["batch", None, branch.in_])
    linear.node.replace_input_with(0, like(insert, scaled, x))


def output_scales(insert: Inserter, branch: Branch, rows: Rows) -> ir.Value:
    """1 + s_out' of all n sites at once: [batch, 1, n·out]."""
    return multiplier(insert, branch, rows, "s_out", 1, len(branch.sites) * branch.out)


def multiplier(
    insert: Inserter, branch: Branch, rows: Rows, part: Part, n: int, size: int
) -> ir.Value:
    """A multiplier as trained, [batch, n, size], of what the row has less one."""
    one = insert.constant(f"{part}_one", np.asarray(1.0, np.float32))
    row = _row(insert, branch, rows, part, n, size)
    return insert("Add", f"{part}_multiplier", [row, one], shape=["batch", n, size])


def add_product(
    insert: Inserter, product: ir.Value, delta: ir.Value, scale: ir.Value | None, features: int
) -> ir.Value:
    """p + delta in the shape of p, or s_out ∘ p + delta; delta is [batch, tokens, features]."""
    if scale is None:
        return insert("Add", "sum", [product, like(insert, delta, product)], shape=product.shape)
    tokens, shape = as_tokens(insert, product, features, "s_out_"), ["batch", None, features]
    scaled = insert("Mul", "s_out_product", [tokens, scale], shape=shape)
    return like(insert, insert("Add", "sum", [scaled, delta], shape=shape), product)


def bias_row(
    insert: Inserter, linear: GraphLinear, branch: Branch, rows: Rows, bias: ir.Value | None
) -> ir.Value | None:
    """What one more row of L adds to every token beside a constant ``bias``, [batch, 1, n·out].

    db, and where a Gemm has the bias inside its product, which s_out must not scale, less
    s_out' ∘ b. None where the branch has neither.
    """
    wide = len(branch.sites) * branch.out
    row = _row(insert, branch, rows, "db", 1, wide) if "db" in branch.extras else None
    if "s_out" in branch.extras and linear.bias_node is linear.node and linear.bias is not None:
        own = insert.constant("own_bias", linear.bias.reshape(1, 1, wide))
        scale = _row(insert, branch, rows, "s_out", 1, wide, "unscaled_")
        scaled = insert("Mul", "scaled_bias", [scale, own], shape=["batch", 1, wide])
        if row is None:
            row = insert("Neg", "unscaled_bias", [scaled], shape=["batch", 1, wide])
        else:
            row = insert("Sub", "unscaled_bias", [row, scaled], shape=["batch", 1, wide])
    if row is None or bias is None:
        return row
    return insert("Add", "bias_and_db", [bias, row], shape=["batch", 1, wide])


def _row(
    insert: Inserter, branch: Branch, rows: Rows, part: Part, n: int, size: int, prefix: str = ""
) -> ir.Value:
    value = rows.parts[f"{branch.name}/{part}"]
    wanted = insert.ints(f"{prefix}{part}_shape", -1, n, size)
    return insert("Reshape", f"{prefix}{part}", [value, wanted], shape=["batch", n, size])
