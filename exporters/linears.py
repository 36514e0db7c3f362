"""A Linear as it stands in the graph: its node, weight, bias, input and output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.errors import BackboneError
from hhdeploy.exporters.trace import LINEAR_TAG


@dataclass(frozen=True)
class GraphLinear:
    """One use of a Linear in a graph.

    Attributes:
        path: module path.
        node: the MatMul or Gemm.
        bias_node: the node that adds the bias: the Gemm itself, an Add, or None.
        bias_index: which of its inputs is the bias.
    """

    path: str
    node: ir.Node
    bias_node: ir.Node | None
    bias_index: int

    @property
    def input(self) -> ir.Value:
        """x of y = W x + b."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        """y, after the bias."""
        return (self.bias_node or self.node).outputs[0]

    @property
    def weight(self) -> NDArray[np.float32]:
        """The weight in torch's layout (out, in): a view, transposed where the graph's is."""
        value = self.node.inputs[1]
        assert value is not None and value.const_value is not None
        weight: NDArray[np.float32] = value.const_value.numpy()
        return weight if self._transposed_in_node else weight.T

    @property
    def bias(self) -> NDArray[np.float32] | None:
        """The bias (out,), None without one."""
        if self.bias_node is None:
            return None
        value = self.bias_node.inputs[self.bias_index]
        assert value is not None and value.const_value is not None
        bias: NDArray[np.float32] = value.const_value.numpy()
        return bias.reshape(-1)

    def replace_weight(self, graph: ir.Graph, name: str, weight: NDArray[np.float32]) -> None:
        """Give this node a new weight (out, in); the old initializer may be shared and stays."""
        stored = weight if self._transposed_in_node else weight.T
        self.node.replace_input_with(1, add_initializer(graph, name, stored))

    def set_bias(self, graph: ir.Graph, name: str, bias: NDArray[np.float32]) -> None:
        """Give this Linear a new bias (out,).

        The optimiser drops a bias of zeros (untrained classifiers have one), so there may be
        none to replace.
        """
        value = add_initializer(graph, name, bias)
        if self.bias_node is not None:
            self.bias_node.replace_input_with(self.bias_index, value)
        elif self.node.op_type == "Gemm":
            self.node.resize_inputs(3)
            self.node.replace_input_with(2, value)
        else:
            product = self.node.outputs[0]
            consumers = list(product.uses())
            add = ir.node("Add", [product, value], name=f"{self.path}/Add")
            add.outputs[0].name, add.outputs[0].type = add.name, product.type
            add.outputs[0].shape = product.shape
            graph.insert_after(self.node, add)
            for consumer, index in consumers:
                consumer.replace_input_with(index, add.outputs[0])
            if product.is_graph_output():
                add.outputs[0].name, product.name = product.name, f"{self.path}/product"
                graph.outputs[0] = add.outputs[0]

    @property
    def _transposed_in_node(self) -> bool:
        return self.node.op_type == "Gemm" and bool(self.node.attributes.get_int("transB", 0))


def linears_by_path(graph: ir.Graph) -> dict[str, list[GraphLinear]]:
    """All tagged Linears of a graph; a module that is called twice has two entries."""
    found: dict[str, list[GraphLinear]] = {}
    for node in graph:
        path = node.metadata_props.get(LINEAR_TAG)
        if path is not None:
            found.setdefault(path, []).append(_graph_linear(path, node))
    return found


def linears_at(by_path: dict[str, list[GraphLinear]], path: str) -> list[GraphLinear]:
    """The uses of one Linear. Raises `BackboneError` when the graph has none."""
    if path not in by_path:
        raise BackboneError(f"the traced graph has no Linear {path}.")
    return by_path[path]


def _graph_linear(path: str, node: ir.Node) -> GraphLinear:
    if node.op_type == "Gemm":
        has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
        return GraphLinear(path, node, node if has_bias else None, 2)
    consumers = list(node.outputs[0].uses())
    if len(consumers) == 1 and consumers[0].node.op_type == "Add":
        add = consumers[0].node
        index = 1 - consumers[0].idx
        other = add.inputs[index]
        if (
            other is not None
            and other.const_value is not None
            and other.const_value.size == (_out_features(node))
        ):
            return GraphLinear(path, node, add, index)
    return GraphLinear(path, node, None, 0)


def _out_features(node: ir.Node) -> int:
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    out = weight.shape[-1]
    assert isinstance(out, int)
    return out


def add_initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A new initializer; the name is made unique."""
    unique, count = name, 1
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    # ascontiguousarray would give a scalar one dimension.
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=unique)
    value = ir.Value(
        name=unique,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
