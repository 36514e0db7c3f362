"""Carry a placement out as a strongly typed graph, and show a typed graph as its rounding twin.

The twin is made of the typed graph itself, whoever wrote it: every value that is stored in the low
type becomes float32, rounded by a pair of Casts where the typed graph computes it or casts it down.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.errors import PlanError
from hhdeploy.graph import add_initializer

# Metadata of every placed node: the type in which the typed graph computes it.
PRECISION_TAG = "hhdeploy.precision"
# Data movement: rounding before or after it is the same, so it never rounds by itself.
MOVEMENT = frozenset(
    "Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape Slice "
    "SpaceToDepth Split Squeeze Tile Transpose Unsqueeze Where".split()
)
# Constants there are bounds or fill values; scaled and added scores reach a Softmax.
_BOUNDS = frozenset({"Clip", "Max", "Min"})
_SCORES = frozenset({"Add", "Mul", "Sub"})
_NUMPY: dict[ir.DataType, np.dtype[np.generic]] = {
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
# The largest finite values.
LIMIT = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: (2 - 2**-7) * 2.0**127}


@dataclass(frozen=True)
class Placement:
    """Which nodes of one graph are low. Nodes in neither set touch no float32 data.

    Attributes:
        dtype: FLOAT16 or BFLOAT16.
        low: nodes computed in ``dtype``.
        high: nodes computed in float32.
        fixed: (node, input) that stay float32 although the node is low (Resize's scales).
    """

    dtype: ir.DataType
    low: frozenset[ir.Node]
    high: frozenset[ir.Node]
    fixed: frozenset[tuple[ir.Node, int]]

    def wants_low(self, node: ir.Node, index: int) -> bool:
        """Whether a node's input is read in the low type."""
        return node in self.low and (node, index) not in self.fixed

    @property
    def name(self) -> str:
        """``float16`` or ``bfloat16``."""
        return self.dtype.name.lower()


def write_typed(model: ir.Model, placement: Placement) -> None:
    """Make ``model`` strongly typed, in place, by the rules of `typed_model`.

    Raises:
        PlanError: a weight does not fit the low type.
    """
    edges = _Edges(model.graph, placement)
    edges.convert_inputs()
    for node in placement.low:
        for output in filter(is_float, node.outputs):
            # A new type: clones share the type objects of the source graph.
            output.type = ir.TensorType(placement.dtype)
        _retarget(node, placement.dtype)
    for index, output in enumerate(model.graph.outputs):
        if output.producer() in placement.low and output.dtype == placement.dtype:
            high = edges.cast(output, ir.DataType.FLOAT)
            model.graph.outputs[index] = high
            _take_name(high, output, placement.name)


def write_twin(model: ir.Model) -> None:
    """Make a strongly typed ``model`` float32 throughout, rounding where it does, in place."""
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype in LIMIT:
            assert value.const_value is not None
            exact = value.const_value.numpy().astype(np.float32)
            value.const_value = ir.tensor(exact, name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in list(graph):
        for output in node.outputs:
            low = output.dtype
            if low not in LIMIT:
                continue
            readers = list(output.uses())
            rounded = output
            if node.op_type != "Cast" or not is_float(node.inputs[0]):
                output.type = ir.TensorType(ir.DataType.FLOAT)
                _retarget(node, ir.DataType.FLOAT)
                if node.op_type in MOVEMENT:
                    continue
                rounded = _cast_behind(output, low, graph)
            back = _cast_behind(rounded, ir.DataType.FLOAT, graph)
            for reader, index in readers:
                reader.replace_input_with(index, back)


class _Edges:
    """The conversions of one graph, each made once per value and direction."""

    def __init__(self, graph: ir.Graph, placement: Placement) -> None:
        self._graph, self._placement = graph, placement
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def convert_inputs(self) -> None:
        """Give every placed node its float32 inputs in the type that it wants."""
        placement = self._placement
        for node in list(self._graph):
            if node not in placement.low and node not in placement.high:
                continue
            low = node in placement.low
            node.metadata_props[PRECISION_TAG] = placement.name if low else "float32"
            for index, value in enumerate(node.inputs):
                if value is not None and is_float(value):  # else it is low already, or no float
                    self._convert(node, index, value)

    def _convert(self, node: ir.Node, index: int, value: ir.Value) -> None:
        wants_low = self._placement.wants_low(node, index)
        stored_low = value.producer() in self._placement.low
        if wants_low == stored_low:
            return
        if not wants_low:
            node.replace_input_with(index, self.cast(value, ir.DataType.FLOAT))
        elif is_constant(value):
            self._convert_weight(node, index, value)
        else:
            self._check_moved_weights(value)
            node.replace_input_with(index, self.cast(value, self._placement.dtype))

    def _check_moved_weights(self, value: ir.Value) -> None:
        """The rows of a constant bank are weights too, though only cast when gathered."""
        producer = value.producer()
        if producer is not None and producer.op_type in MOVEMENT:
            for source in producer.inputs:
                if source is not None and is_float(source) and is_constant(source):
                    low_array(source, self._placement)

    def _convert_weight(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """A low copy of an initializer; under its own name if no one reads the float32 one."""
        dtype = self._placement.dtype
        if (value, dtype) in self._made:
            node.replace_input_with(index, self._made[value, dtype])
            return
        uses = list(value.uses())
        alone = not value.is_graph_output() and all(
            self._placement.wants_low(user, at) for user, at in uses
        )
        array = low_array(value, self._placement)
        name = str(value.name)
        if alone:
            self._graph.initializers.pop(name)
        else:
            name = f"{name}/{self._placement.name}"
        low = add_initializer(self._graph, name, array)
        self._made[value, dtype] = low
        for user, at in uses if alone else [(node, index)]:
            user.replace_input_with(at, low)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` in ``dtype``."""
        if (value, dtype) not in self._made:
            self._made[value, dtype] = _cast_behind(value, dtype, self._graph)
        return self._made[value, dtype]


def _cast_behind(value: ir.Value, dtype: ir.DataType, graph: ir.Graph) -> ir.Value:
    """``value`` in ``dtype``: node and value ``cast/<value>/<type>``, behind its producer."""
    label = "float32" if dtype == ir.DataType.FLOAT else dtype.name.lower()
    name = f"cast/{(value.name or '').removeprefix('cast/')}/{label}"
    node = ir.node("Cast", [value], {"to": dtype}, name=name)
    out = node.outputs[0]
    out.name, out.dtype, out.shape = name, dtype, value.shape
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, node)
    else:
        graph.insert_before(graph[0], node)
    return out


def low_array(value: ir.Value, placement: Placement) -> NDArray[np.generic]:
    """An initializer in the low type, rounded to nearest; bounds and masks are clamped.

    Raises:
        PlanError: a weight is finite in float32 and not in the low type.
    """
    assert value.const_value is not None
    exact = value.const_value.numpy()
    dtype = _NUMPY[placement.dtype]
    with np.errstate(over="ignore"):
        low = exact.astype(dtype)
    lost = np.isfinite(exact) & ~np.isfinite(low.astype(np.float32))
    if not lost.any():
        return low
    if not _is_bound(value):
        worst = float(exact[lost][np.abs(exact[lost]).argmax()])
        other = "bfloat16" if dtype == np.float16 else "float32"
        raise PlanError(
            f"{value.name}: its largest value, {worst:.6g}, does not fit {placement.name} (largest "
            f"finite value {LIMIT[placement.dtype]:.6g}). Use {other}, which has the range."
        )
    return clamped(exact, placement.dtype)


def clamped(exact: NDArray[np.float32], dtype: ir.DataType) -> NDArray[np.generic]:
    """Rounded; finite values stay finite, infinities and NaN stay what they are."""
    limit = np.float32(LIMIT[dtype])
    return np.where(np.isfinite(exact), exact.clip(-limit, limit), exact).astype(_NUMPY[dtype])


def _is_bound(value: ir.Value) -> bool:
    """Whether a constant only bounds, fills or masks, so that clamping it keeps its meaning."""
    return bool(value.uses()) and all(
        _bounds(node, index, scalar=value.const_value is not None and value.const_value.size == 1)
        for node, index in value.uses()
    )


def _bounds(node: ir.Node, index: int, *, scalar: bool) -> bool:
    fills = (node.op_type == "Pad" and index == 2) or (node.op_type == "Where" and scalar)
    if fills or node.op_type in _BOUNDS:
        return True
    if node.op_type in _SCORES and (scalar or node.op_type != "Mul"):
        return _reaches_softmax(node.outputs[0])
    return node.op_type in MOVEMENT and all(_is_bound(output) for output in node.outputs)


def _reaches_softmax(value: ir.Value) -> bool:
    return any(
        node.op_type == "Softmax"
        or (node.op_type in _SCORES | MOVEMENT and _reaches_softmax(node.outputs[0]))
        for node, _ in value.uses()
    )


def plain_cast(graph: ir.Graph, node: ir.Node) -> None:
    """CastLike as Cast; a Cast that changes nothing as Identity."""
    source, output = node.inputs[0], node.outputs[0]
    assert output.dtype is not None
    if is_float(source) and is_float(output):
        plain = ir.node("Identity", [source], name=node.name)
    elif node.op_type == "CastLike":
        plain = ir.node("Cast", [source], {"to": output.dtype}, name=node.name)
    else:
        return
    new, name = plain.outputs[0], output.name
    new.dtype, new.shape = output.dtype, output.shape
    graph.insert_before(node, plain)
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name


def is_float(value: ir.Value | None) -> bool:
    """Whether a value is float32: the only type that the passes change."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is stored in the graph."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def _retarget(node: ir.Node, dtype: ir.DataType) -> None:
    """Nodes that name their output's type in an attribute."""
    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", int(dtype))
    elif node.op_type == "ConstantOfShape":
        filled = node.attributes.get("value")
        value = np.zeros(1, np.float32) if filled is None else filled.as_tensor().numpy()
        retyped = clamped(value, dtype) if dtype in LIMIT else value.astype(np.float32)
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(retyped))


def _take_name(value: ir.Value, old: ir.Value, suffix: str) -> None:
    """``value`` becomes the graph output that ``old`` was."""
    name = old.name
    old.name = f"{name}/{suffix}"
    value.name = name
