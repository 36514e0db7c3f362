"""Where a float16 or bfloat16 graph leaves the range of its type.

A rounding twin (`hhdeploy.exporters.precision.typed.rounding_twin`) turns a value that is too large
into infinity, as the typed graph would; from there on everything becomes NaN. What names the
culprit is the first value that is too large *before* it is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from hhdeploy.exporters.precision.twin import LIMIT, is_constant, is_float
from hhdeploy.graph import add_initializer


@dataclass(frozen=True)
class Peak:
    """An output that `watched` adds.

    Attributes:
        name: of the output: a float32 scalar, the largest magnitude of a value, -inf aside.
        site: the module whose node computed the value (``blocks.3.mlp.fc1``).
        dtype: of the typed graph there, FLOAT16 or BFLOAT16.
    """

    name: str
    site: str
    dtype: ir.DataType

    @property
    def limit(self) -> float:
        """The largest finite value of the type."""
        return LIMIT[self.dtype]

    def overflows(self, largest: float) -> bool:
        """Whether a magnitude becomes infinite: up to half a step past the limit it does not."""
        with np.errstate(over="ignore"):
            return not np.isfinite(np.float32(largest).astype(self.dtype.numpy()))


def watched(twin: ir.Model) -> tuple[ir.Model, list[Peak]]:
    """A twin that also tells how large every value is that it rounds; ``twin`` is not changed.

    -inf is no number that became too large: columns past an adapter's classes, and masks, have it.

    Returns:
        The graph, and its new outputs in the order of execution. They are scalars, so that a
        large model takes no more memory than without them.
    """
    clone = twin.clone()
    graph = clone.graph
    zero = add_initializer(graph, "peak/zero", np.zeros((), np.float32))
    peaks: list[Peak] = []
    seen: set[ir.Value] = set()
    for node in list(graph):
        value = node.inputs[0] if node.inputs else None
        dtype = node.outputs[0].dtype
        if node.op_type != "Cast" or dtype not in LIMIT or value is None:
            continue
        if value in seen or not is_float(value) or is_constant(value):
            continue
        seen.add(value)
        meant = ir.node("IsInf", [value], {"detect_positive": 0})
        number = ir.node("Where", [*meant.outputs, zero, value])
        size = ir.node("Abs", number.outputs)
        peak = ir.node("ReduceMax", size.outputs, {"keepdims": 0})
        graph.insert_before(node, [meant, number, size, peak])
        output = peak.outputs[0]
        output.name = f"peak/{len(peaks)}"
        output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
        graph.outputs.append(output)
        peaks.append(Peak(output.name, _site(value), dtype))
    return clone, peaks


def _site(value: ir.Value) -> str:
    """Nodes are called after their modules: ``blocks.0.norm1/LayerNormalization``."""
    node = value.producer()
    name = (node.name if node is not None else None) or value.name or "?"
    return name.rpartition("/")[0] or name
