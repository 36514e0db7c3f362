"""float16 and bfloat16: strongly typed graphs and their float32 rounding twins.

One analysis decides for every node whether it is computed *low* (float16 or bfloat16) or *high*
(float32), and `typed_model` carries it out. `rounding_twin` is made of such a graph, so it rounds
exactly where that does and has its weights. Every placed node says where it went in its metadata
(``hhdeploy.precision``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Final

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from hhdeploy.choices import TypedPrecision
from hhdeploy.errors import PlanError
from hhdeploy.exporters.precision.twin import (
    MOVEMENT,
    PRECISION_TAG,
    Placement,
    is_constant,
    is_float,
    plain_cast,
    write_twin,
    write_typed,
)
from hhdeploy.graph import BRANCH

__all__ = [
    "CUDA_BFLOAT16",
    "ISLANDS",
    "PRECISION_TAG",
    "rounding_twin",
    "typed_model",
]

# Sums over a row: float16 ends at 65504 (a sum of squares of 256 values of 16), and adding a
# small value to a large sum loses it.
_REDUCTIONS = frozenset(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSum ReduceSumSquare".split()
)
ISLANDS: Final[frozenset[str]] = _REDUCTIONS | {
    # Normalisations: mean and mean square of a whole row, then a quotient of them; an epsilon
    # of 1e-6 is a subnormal number in float16.
    "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization",
    "LpNormalization", "MeanVarianceNormalization", "RMSNormalization",
    # A sum of exponentials; small attention weights of long rows underflow.
    "LogSoftmax", "Softmax",
    # Pooling: a mean over all patches.
    "GlobalAveragePool", "GlobalLpPool",
    # The steps of a norm that the tracer wrote out: squares and exponentials overflow, roots
    # and quotients of small numbers (1 / 1e-8) too. Division by a constant is only a scale.
    "Div", "Exp", "Log", "Pow", "Reciprocal", "Sqrt",
}  # fmt: skip
# What ONNX Runtime's CUDA provider computes in bfloat16 in opset 20 (its docs/OperatorKernels.md).
# A bfloat16 graph with any other operator in bfloat16 (Pad, Greater, Clip) does not load there.
CUDA_BFLOAT16: Final[frozenset[str]] = frozenset(
    "Abs Add Cast Concat ConstantOfShape Div Erf Exp Expand Flatten Gather GatherElements GatherND "
    "Gelu Gemm Identity LayerNormalization MatMul Max Min Mod Mul Neg Pow ReduceSum Relu Reshape "
    "ScatterElements ScatterND Sigmoid Sign Slice Softmax Split Sqrt Squeeze Sub Sum Tanh Tile "
    "Transpose Trilu Unsqueeze Where".split()
)
# Element by element: between two islands they stay high (the "+ epsilon" of a norm).
_GLUE = frozenset({"Abs", "Add", "Clip", "Div", "Max", "Min", "Mul", "Neg", "Sub"})
# They read a value without computing with it.
_NEUTRAL = frozenset({"Shape", "Size"})
_BANK_GATHER = f"{BRANCH}bank/"
_LOW: Final[Mapping[TypedPrecision, ir.DataType]] = {
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


def typed_model(
    model: ir.Model, precision: TypedPrecision, islands: frozenset[str] = ISLANDS
) -> ir.Model:
    """A new, strongly typed graph; ``model`` is not changed, its initializers are not edited.

    1. Operators in ``islands`` stay float32, all other arithmetic is low, unless the operator
       has no low form in this opset (Conv has no bfloat16 before opset 22), or none in bfloat16
       on a GPU (`CUDA_BFLOAT16`); what only moves data before such a one is low all the same.
    2. Norms that the tracer wrote out stay float32 as a whole: element-wise operators that
       combine with a reduction's result (x - mean, x / root), or stand between islands.
    3. Data movement has its producer's type. Behind an island it stays float32 as long as an
       island reads it.
    4. The Gather of bank rows is float32; its rows are cast, never the bank.
    5. Weights are stored low where low nodes read them (beside a float32 copy if islands read
       them too). Bounds, fill values and attention masks are clamped to the largest finite
       value; -inf and NaN stay; small weights may become zero.
    6. One Cast a value and direction: ``cast/<value>/<type>``. Inputs and outputs keep name and
       type; integers, booleans and float64 are left alone.

    Args:
        model: a float32 graph without subgraphs and functions.
        precision: of the new graph.
        islands: operator types (ONNX domain) to keep in float32.

    Raises:
        PlanError: a weight is too large for the type; a graph or island that cannot be typed.
    """
    unknown = sorted(op for op in islands if not onnx.defs.has(op))
    if unknown:
        raise PlanError(f"islands: ONNX has no operator {', '.join(unknown)}.")
    clone = model.clone()
    _prepare(clone)
    write_typed(clone, _Placing(clone.graph, _LOW[precision], islands).run())
    return clone


def rounding_twin(typed: ir.Model) -> ir.Model:
    """A new float32 graph that rounds where a typed one stores the low type; it is not changed.

    A pair of Casts (float32 -> low -> float32) stands for every operator that the typed graph
    computes low and every float32 value that it casts down; weights hold its values. Data movement
    needs no pair. The twin models *storage*: an operator accumulates in float32 inside, where a
    GPU may accumulate in less, so an engine can be worse than its twin.

    Args:
        typed: from `typed_model`, made now or read from a bundle.

    Raises:
        PlanError: it has a value whose type is not known.
    """
    clone = typed.clone()
    _check_typed(clone)
    write_twin(clone)
    return clone


def _prepare(model: ir.Model) -> None:
    """Check what the analysis requires, and write it in fewer kinds of node. In place.

    Ensures: every value has a type, float constants are initializers, no CastLike, no Cast of
    float32 to float32.
    """
    graph = model.graph
    if model.functions or any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for node in graph
        for attribute in node.attributes.values()
    ):
        raise PlanError("a graph with functions or subgraphs (If, Loop) cannot be typed.")
    _check_typed(model)
    for value in _values(graph):
        if value.dtype is not None and value.dtype in _LOW.values():
            raise PlanError(f"{value.name} is {value.dtype.name.lower()}: start from float32.")
    for node in list(graph):
        output = node.outputs[0]
        if node.op_type == "Constant" and is_float(output):
            _lift(graph, node)
        elif node.op_type == "CastLike" or (node.op_type == "Cast" and is_float(node.inputs[0])):
            plain_cast(graph, node)


def _check_typed(model: ir.Model) -> None:
    """Every value has a type; those that are not said are inferred, in place."""
    if any(output.dtype is None for node in model.graph for output in node.outputs):
        ShapeInferencePass()(model)
    for value in _values(model.graph):
        if value.dtype is None:
            raise PlanError(f"{value.name}: its type is not known, so the graph cannot be typed.")


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from (*graph.inputs, *graph.initializers.values())
    for node in graph:
        yield from (output for output in node.outputs if output.name)


def _lift(graph: ir.Graph, node: ir.Node) -> None:
    """A float Constant as an initializer of the same name; long integer ones stay nodes."""
    output = node.outputs[0]
    tensor = ir.convenience.get_const_tensor(output)
    if tensor is None or output.is_graph_output():
        return
    shape = ir.Shape(tensor.numpy().shape)
    value = ir.Value(name=output.name, shape=shape, type=output.type, const_value=tensor)
    output.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    graph.register_initializer(value)


class _Has(Enum):
    """In which type a value is to be had."""

    HIGH = "float32"
    LOW = "the low type"
    ANY = "either: a constant"
    ROW = "float32, a statistic of a row (a reduction, or made of reductions)"


class _Placing:
    """The decision, reached from "everything that may be high is" by giving up what is not
    read by an island; each round makes fewer nodes high, so it ends."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType, islands: frozenset[str]) -> None:
        self._nodes = [node for node in graph if _computes(node)]
        self._outputs = frozenset(graph.outputs)
        self._dtype, self._islands = dtype, islands
        self._has: dict[ir.Value, _Has] = {}
        self._low: set[ir.Node] = set()

    def run(self) -> Placement:
        before = -1
        while len(self._low) != before:
            before = len(self._low)
            free = [node for node in self._nodes if self._forward(node)]
            for node in reversed(free):
                self._decide(node)
        fixed = {
            (node, index)
            for node in self._low
            for index, value in enumerate(node.inputs)
            if is_float(value) and not _accepts(node, index, self._dtype)
        }
        high = frozenset(self._nodes) - self._low
        return Placement(self._dtype, frozenset(self._low), high, frozenset(fixed))

    def _forward(self, node: ir.Node) -> bool:
        """Note what the node's outputs are; True if `_decide` has to decide about it."""
        moves, inputs = node.op_type in MOVEMENT, self._inputs(node)
        has, free = _Has.LOW, False
        if node in self._low:
            pass
        elif self._is_island(node):
            statistic = node.op_type in _REDUCTIONS or _only_rows(inputs)
            has = _Has.ROW if statistic else _Has.HIGH
        elif _only_rows(inputs) and (moves or node.op_type in _GLUE):
            has, free = _Has.ROW, moves
        elif node.op_type in _GLUE and _Has.ROW in inputs:
            has = _Has.HIGH
        elif moves or node.op_type in _GLUE or node.op_type in ("Cast", "ConstantOfShape"):
            free = True
            if not inputs or set(inputs) == {_Has.ANY}:
                has = _Has.ANY
            elif _Has.LOW not in inputs or (moves and _Has.HIGH in inputs):
                has = _Has.HIGH
        if has is _Has.LOW:
            self._low.add(node)
        for output in node.outputs:
            self._has[output] = has
        return free

    def _decide(self, node: ir.Node) -> None:
        """Movement is high if an island reads it, arithmetic only if nothing else does."""
        readers = [
            user not in self._low and not self._lacks_kernel(user)
            for output in node.outputs
            for user, _ in output.uses()
            if _computes(user)
        ]
        # The graph's float32 output is no island: arithmetic before it is low, movement stays.
        readers += [node.op_type not in _GLUE for output in node.outputs if output in self._outputs]
        stays = all(readers) if node.op_type in _GLUE else any(readers)
        if not (readers and stays):
            self._low.add(node)

    def _inputs(self, node: ir.Node) -> list[_Has]:
        """What the float32 inputs are."""
        return [
            _Has.ANY if is_constant(value) else self._has.get(value, _Has.HIGH)
            for value in node.inputs
            if value is not None and is_float(value)
        ]

    def _is_island(self, node: ir.Node) -> bool:
        if node.op_type == "Gather" and (node.name or "").startswith(_BANK_GATHER):
            return True
        if node.domain or not _has_low_form(node, self._dtype) or self._lacks_kernel(node):
            return True
        if node.op_type == "Div" and is_constant(node.inputs[1]):
            return False
        return node.op_type in self._islands

    def _lacks_kernel(self, node: ir.Node) -> bool:
        """Whether a node that could be bfloat16 is float32 for want of a kernel alone.

        Such a node is no reason to keep what it reads in float32: the Split of the bank's rows
        would be, for one comparison of one value.
        """
        return (
            self._dtype is ir.DataType.BFLOAT16
            and node.op_type not in CUDA_BFLOAT16 | self._islands
            and not node.domain
            and _has_low_form(node, self._dtype)
        )


def _only_rows(inputs: list[_Has]) -> bool:
    return _Has.ROW in inputs and set(inputs) <= {_Has.ROW, _Has.ANY}


def _computes(node: ir.Node) -> bool:
    """Whether the node reads or makes float32 data."""
    if node.op_type in _NEUTRAL or (node.op_type == "Cast" and not is_float(node.outputs[0])):
        return False
    return any(map(is_float, (*node.inputs, *node.outputs)))


@functools.lru_cache(maxsize=1024)
def _schema(op: str, opset: int) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(op, opset, "")


def _accepts(node: ir.Node, index: int, dtype: ir.DataType, *, output: bool = False) -> bool:
    assert node.graph is not None
    schema = _schema(node.op_type, node.version or node.graph.opset_imports[""])
    formal = schema.outputs if output else schema.inputs
    return f"tensor({dtype.name.lower()})" in formal[min(index, len(formal) - 1)].types


def _has_low_form(node: ir.Node, dtype: ir.DataType) -> bool:
    """Whether the ONNX operator takes and gives the low type, its first float input included."""
    if node.op_type == "Cast":
        return True
    floats = [index for index, value in enumerate(node.inputs) if is_float(value)][:1]
    if not floats and node.op_type != "ConstantOfShape":
        return False
    return all(_accepts(node, index, dtype) for index in floats) and all(
        _accepts(node, index, dtype, output=True)
        for index, value in enumerate(node.outputs)
        if is_float(value)
    )
