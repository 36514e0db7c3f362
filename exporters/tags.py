"""Which nodes of a traced graph are the model's Linears, while the names are still the model's.

An adapter changes a weight, and with it all that the model computes from it. In a graph it changes
one node, so a Linear is one only where nothing else reads its weight, or its bias.
"""

from __future__ import annotations

from collections.abc import Set

import onnx_ir as ir

from hhdeploy.backbones.sites import SEQUENTIAL_KINDS, kind_of
from hhdeploy.graph import LINEAR_TAG

MIXED_TAG = "hhdeploy.mixed"
# What a Linear's weight is called in its module, what its path then ends in, and its bias.
_WEIGHTS_OF = {"weight": ("", "bias"), "in_proj_weight": (".in_proj", "in_proj_bias")}


def tag_linears(graph: ir.Graph) -> None:
    """Tag each MatMul or Gemm that is a Linear with its module path: x @ W^T, W read by such alone.

    Not the Linear whose weight is used otherwise as well (``x @ W``, its norm, a part of it), or
    whose bias is; nor one of `SEQUENTIAL_KINDS` to whose product another constant is added than its
    own bias: the sequential form would multiply that, too.
    """
    for weight in list(graph.initializers.values()):
        module, _, name = str(weight.name).rpartition(".")
        if name not in _WEIGHTS_OF:
            continue
        end, bias = _WEIGHTS_OF[name]
        path = module + end
        nodes = _products(weight)
        if nodes and _alone_with(graph.initializers.get(f"{module}.{bias}"), nodes, path):
            for node in nodes:
                node.metadata_props[LINEAR_TAG] = path


def tag_mixed(graph: ir.Graph, mixed: Set[str]) -> None:
    """Note which Linears do not hold the images of a batch one after the other."""
    for node in graph:
        if node.metadata_props.get(LINEAR_TAG) in mixed:
            node.metadata_props[MIXED_TAG] = "1"


def _products(weight: ir.Value) -> list[ir.Node]:
    """The nodes that multiply by the transpose of a matrix, where nothing else reads it."""
    found = []
    for node, index in weight.uses():
        if node.op_type == "Gemm" and index == 1 and node.attributes.get_int("transB"):
            found.append(node)
        elif node.op_type == "Transpose" and len(weight.shape or ()) == 2:
            uses = node.outputs[0].uses()
            if any(user.op_type != "MatMul" or place != 1 for user, place in uses):
                return []
            found += [user for user, _ in uses]
        else:
            return []
    return found


def _alone_with(bias: ir.Value | None, nodes: list[ir.Node], path: str) -> bool:
    """Whether a Linear's own bias is added to its products and read by nothing else, and whether
    what the sequential form would multiply has no other constant in it."""
    added = {addend for node in nodes if (addend := _added(node)) is not None}
    if bias is not None:
        products = {node.outputs[0] for node in nodes}
        for user, _ in bias.uses():
            if user not in nodes and not (
                user.op_type == "Add" and not products.isdisjoint(user.inputs)
            ):
                return False
    if kind_of(path) not in SEQUENTIAL_KINDS:
        return True
    return all(addend is bias or not _is_constant(addend) for addend in added)


def _added(node: ir.Node) -> ir.Value | None:
    """What is added to a product right away, None if nothing is."""
    if node.op_type == "Gemm":
        return node.inputs[2] if len(node.inputs) > 2 else None
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        addend: ir.Value | None = uses[0].node.inputs[1 - uses[0].idx]
        return addend
    return None


def _is_constant(value: ir.Value) -> bool:
    """Whether no image reaches a value."""
    seen, open_ = set(), [value]
    while open_:
        last = open_.pop()
        if last.is_graph_input():
            return False
        producer = last.producer()
        if producer is not None and producer not in seen:
            seen.add(producer)
            open_ += [given for given in producer.inputs if given is not None]
    return True
