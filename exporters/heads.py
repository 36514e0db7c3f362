"""The classifier of a side-branch graph: the row's own, or the backbone's; padding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from hhdeploy.errors import BackboneError
from hhdeploy.exporters.inserter import Inserter, Rows, become_output
from hhdeploy.graph import GraphLinear
from hhdeploy.plan import Plan


def insert_head(graph: ir.Graph, head: GraphLinear, plan: Plan, rows: Rows) -> None:
    """Give each image the classifier of its own adapter, from its row of the bank; in place.

    Without heads in the plan's layout the graph stays as it is. The output becomes
    [batch, ``plan.classes``], the backbone's own classes among them where they are kept.

    Args:
        graph: of the backbone, with its side branches.
        head: the backbone's classifier in the graph; its input must be [batch, features].
        plan: says how many classes, and whether the backbone's own classifier is kept.
        rows: each image's row, in parts.

    Raises:
        BackboneError: the classifier is not the last operation, or takes another shape.
    """
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
    become_output(graph, own)


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
