"""A Linear as it stands in a graph: its node, weight, bias, input and output.

The tracer tags the node of every Linear with its module path. Folding, side branches and
quantisation find their Linears by it, and change graphs through what is here. So is how a graph is
read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.errors import BackboneError

if TYPE_CHECKING:
    import onnx

# Metadata of a Linear's node: its module path.
LINEAR_TAG = "hhdeploy.linear"
# Names of the nodes of side branches start with it.
BRANCH = "branch/"


def open_graph(path: Path) -> ir.Model:
    """A graph of a bundle, its weights mapped from the file beside it, or from what a link there
    leads to.

    onnx-ir takes a link, and a file of several names (`cp -al`, backups, deduplicated disks), for
    an attack. A bundle compares this one file with its hash; others it goes on to refuse.
    """
    model = ir.load(path)
    for value in (value for graph in model.graphs() for value in graph.initializers.values()):
        weight = value.const_value
        if isinstance(weight, ir.ExternalTensor) and weight.location == f"{path.name}.data":
            value.const_value = ir.ExternalTensor(
                os.path.abspath(weight.path),  # with no folder given it is read as it is
                weight.offset,
                weight.length,
                weight.dtype,
                shape=weight.shape,
                name=weight.name,
                doc_string=weight.doc_string,
                metadata_props=weight.metadata_props,
            )
    return model


def call_weights(proto: onnx.ModelProto, name: str) -> None:
    """Have the weights that lie beside a graph lie in the file of this name there."""
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name


@dataclass(frozen=True)
class GraphLinear:
    """One use of a Linear in a graph.

    Attributes:
        path: module path (``blocks.0.mlp.fc1``; ``blocks.0.attn.qkv.q`` where a graph computes
            q, k and v apart).
        use: 0, and 1, 2, ... for further uses of one module.
        node: the MatMul or Gemm.
        bias_node: the node that adds the bias: the Gemm itself, an Add, or None.
        bias_index: which of its inputs is the bias.
    """

    path: str
    use: int
    node: ir.Node
    bias_node: ir.Node | None
    bias_index: int

    @property
    def name(self) -> str:
        """The path; ``@1``, ``@2``, ... behind it for further uses."""
        return f"{self.path}@{self.use}" if self.use else self.path

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
        return self.weight_as_it_is()()

    def weight_as_it_is(self) -> Callable[[], NDArray[np.float32]]:
        """What gives today's `weight`, also when this Linear has another one by then: for new
        weights that are computed from it when they are written."""
        value, transposed = self.node.inputs[1], self.transposed
        assert value is not None and value.const_value is not None
        tensor = value.const_value

        def weight() -> NDArray[np.float32]:
            array: NDArray[np.float32] = tensor.numpy()
            return array if transposed else array.T

        return weight

    @property
    def bias(self) -> NDArray[np.float32] | None:
        """The bias (out,), None without one."""
        if self.bias_node is None:
            return None
        bias = constant(self.bias_node.inputs[self.bias_index])
        assert bias is not None
        return bias.reshape(-1)

    def replace_weight(self, graph: ir.Graph, name: str, weight: NDArray[np.float32]) -> None:
        """Give this node a new weight (out, in); the old initializer may be shared and stays."""
        out, in_ = weight.shape
        self.compute_weight(graph, name, (out, in_), lambda: weight)

    def compute_weight(
        self,
        graph: ir.Graph,
        name: str,
        shape: tuple[int, int],
        weight: Callable[[], NDArray[np.float32]],
    ) -> None:
        """As `replace_weight`; the weight, ``shape`` (out, in), is computed whenever it is read."""
        transposed = self.transposed
        stored = shape if transposed else shape[::-1]
        value = add_computed(graph, name, stored, lambda: weight() if transposed else weight().T)
        self.node.replace_input_with(1, value)

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
    def transposed(self) -> bool:
        """The node stores the weight as (out, in): a Gemm with transB."""
        return self.node.op_type == "Gemm" and bool(self.node.attributes.get_int("transB", 0))


def linears_by_path(graph: ir.Graph) -> dict[str, list[GraphLinear]]:
    """All tagged Linears of a graph; a module that is called twice has two entries."""
    found: dict[str, list[GraphLinear]] = {}
    for node in graph:
        path = node.metadata_props.get(LINEAR_TAG)
        if path is not None:
            uses = found.setdefault(path, [])
            uses.append(linear_of(node, path, len(uses)))
    return found


def linears_at(by_path: dict[str, list[GraphLinear]], path: str) -> list[GraphLinear]:
    """The uses of one Linear. Raises `BackboneError` when the graph has none."""
    if path not in by_path:
        raise BackboneError(f"the traced graph has no Linear {path}.")
    return by_path[path]


def linear_of(node: ir.Node, path: str, use: int = 0) -> GraphLinear:
    """The Linear of a MatMul or Gemm with a constant weight, its bias found if it has one."""
    if node.op_type == "Gemm":
        has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
        return GraphLinear(path, use, node, node if has_bias else None, 2)
    consumers = list(node.outputs[0].uses())
    if len(consumers) == 1 and consumers[0].node.op_type == "Add":
        add, index = consumers[0].node, 1 - consumers[0].idx
        weight, other = node.inputs[1], add.inputs[index]
        assert weight is not None and weight.shape is not None
        added = None if other is None else other.const_value
        if added is not None and added.size == weight.shape[-1]:
            return GraphLinear(path, use, node, add, index)
    return GraphLinear(path, use, node, None, 0)


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """What a constant holds; None for a value that is computed, or no value."""
    if value is None or value.const_value is None:
        return None
    array: NDArray[Any] = value.const_value.numpy()
    return array


def add_initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A new initializer; the name is made unique."""
    unique = _unique(graph, name)
    # ascontiguousarray would give a scalar one dimension.
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=unique)
    return _registered(graph, tensor, array.shape)


def add_computed(
    graph: ir.Graph, name: str, shape: Sequence[int], compute: Callable[[], NDArray[np.float32]]
) -> ir.Value:
    """A new float32 initializer that takes no memory: computed whenever it is read, so that a
    graph is written weight by weight. The name is made unique."""
    unique = _unique(graph, name)

    def tensor() -> ir.TensorProtocol:
        return ViewTensor(compute(), name=unique)

    lazy = ir.LazyTensor(tensor, ir.DataType.FLOAT, ir.Shape(list(shape)), name=unique)
    return _registered(graph, lazy, shape)


def _unique(graph: ir.Graph, name: str) -> str:
    unique, count = name, 1
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    return unique


def _registered(graph: ir.Graph, tensor: ir.TensorProtocol, shape: Sequence[int]) -> ir.Value:
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(list(shape)),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def adopt_constants(graph: ir.Graph) -> None:
    """Give a graph the constants again that its nodes read and it has lost.

    The optimiser calls the bounds of the Clips that it makes after their operand: of two Clips of
    one operand, the graph has the bounds of the last alone.
    """
    for node in graph:
        for index, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value.producer() is not None:
                continue
            if graph.initializers.get(str(value.name)) is not value:
                kept = add_initializer(graph, str(value.name), value.const_value.numpy())
                node.replace_input_with(index, kept)


class ViewTensor(ir.Tensor[NDArray[Any]]):
    """An array of any strides, as it lies; its bytes are put in order when they are written."""

    def tofile(self, file: Any) -> None:
        """As `ir.Tensor`'s, but NumPy's ``tofile`` does not tell a full disk from other errors."""
        # As bytes: NumPy gives no buffer of types that are not its own (bfloat16).
        file.write(np.ascontiguousarray(self.numpy()).reshape(-1).view(np.uint8).data)


def drop_unused_initializers(graph: ir.Graph) -> None:
    """Remove the constants that no node reads any more; inputs and outputs stay."""
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]
