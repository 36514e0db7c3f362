"""Adding nodes to a graph: names, constants, and views that every side branch needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.graph import add_computed, add_initializer

BANK, IDS = "adapter_bank", "adapter_ids"


@dataclass(frozen=True)
class Rows:
    """The gathered rows, split: part name -> [batch, elements]."""

    parts: dict[str, ir.Value]


class Inserter:
    """Adds nodes to a graph, in order, behind (or in front of) one node.

    Names: ``branch/<site>/<what>``, so that quantisation and inspection can tell the inserted
    nodes from the backbone's.
    """

    def __init__(
        self,
        graph: ir.Graph,
        prefix: str,
        *,
        after: ir.Node | None = None,
        before: ir.Node | None = None,
    ) -> None:
        self.graph, self.prefix = graph, prefix
        self._after, self._before = after, before

    def __call__(
        self,
        op: str,
        what: str,
        inputs: Sequence[ir.Value],
        *,
        outputs: int = 1,
        dtype: ir.DataType = ir.DataType.FLOAT,
        shape: ir.Shape | Sequence[int | str | None] | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add one node; returns its (first) output."""
        node = ir.node(op, inputs, attributes, num_outputs=outputs, name=f"{self.prefix}/{what}")
        for index, value in enumerate(node.outputs):
            value.name = node.name if outputs == 1 else f"{node.name}_{index}"
            value.dtype = dtype
            if shape is not None:
                value.shape = ir.Shape(list(shape))
        if self._after is not None:
            self.graph.insert_after(self._after, node)
            self._after = node
        else:
            assert self._before is not None
            self.graph.insert_before(self._before, node)
        return node.outputs[0]

    def ints(self, what: str, *values: int) -> ir.Value:
        """An int64 vector constant."""
        return self.constant(what, np.asarray(values, np.int64))

    def constant(self, what: str, array: NDArray[Any]) -> ir.Value:
        """An initializer."""
        return add_initializer(self.graph, f"{self.prefix}/{what}", array)

    def computed(
        self, what: str, shape: Sequence[int], compute: Callable[[], NDArray[np.float32]]
    ) -> ir.Value:
        """An initializer that is computed whenever it is read (see `add_computed`)."""
        return add_computed(self.graph, f"{self.prefix}/{what}", shape, compute)


def as_tokens(insert: Inserter, x: ir.Value, features: int, prefix: str = "") -> ir.Value:
    """x as [batch, tokens, features]; ``prefix`` of the nodes' names, for a second x.

    Windows and other groups are folded into the batch dimension batch-major by timm's models
    ([batch·windows, tokens, features]), so unfolding the images is a reshape.
    """
    shape = x.shape
    if shape is not None and len(shape) == 3 and str(shape[0]) == "batch":
        return x
    return insert(
        "Reshape",
        f"{prefix}tokens",
        [x, _batch_shape(insert, features, prefix)],
        shape=["batch", None, features],
    )


def _batch_shape(insert: Inserter, features: int, prefix: str) -> ir.Value:
    """[batch, -1, features], with batch read from the adapter ids."""
    ids = next(v for v in insert.graph.inputs if v.name == IDS)
    batch = insert("Shape", f"{prefix}batch", [ids], dtype=ir.DataType.INT64, shape=[1])
    rest = insert.ints(f"{prefix}rest", -1, features)
    name, dtype = f"{prefix}tokens_shape", ir.DataType.INT64
    return insert("Concat", name, [batch, rest], axis=0, dtype=dtype, shape=[3])


def like(insert: Inserter, delta: ir.Value, target: ir.Value) -> ir.Value:
    """[batch, tokens, features] in the shape of ``target``."""
    shape = target.shape
    if shape is not None and len(shape) == 3 and str(shape[0]) == "batch":
        return delta
    if shape is not None and all(isinstance(d, int) for d in shape[1:]):
        dims = [int(d) for d in shape[1:]]  # type: ignore[arg-type]
        wanted = insert.ints("out_shape", -1, *dims)
    else:
        wanted = insert("Shape", "out_shape", [target], dtype=ir.DataType.INT64)
    return insert("Reshape", "delta_out", [delta, wanted], shape=shape)


def per_image(insert: Inserter, constant: ir.Value, rank: int) -> ir.Value:
    """A constant with a first dimension of 1, repeated for every image of the batch."""
    ids = next(v for v in insert.graph.inputs if v.name == IDS)
    batch = insert("Shape", "bias_batch", [ids], dtype=ir.DataType.INT64, shape=[1])
    ones = insert.ints("bias_ones", *[1] * (rank - 1))
    shape = insert(
        "Concat", "bias_shape", [batch, ones], axis=0, dtype=ir.DataType.INT64, shape=[rank]
    )
    return insert("Expand", "bias_rows", [constant, shape])


def become_output(graph: ir.Graph, value: ir.Value) -> None:
    """Make ``value``, so far called after its node, the graph's output."""
    old = graph.outputs[0]
    name = old.name
    producer = old.producer()
    assert producer is not None
    # A node need not have a name in a graph that another tool has rewritten.
    old.name = f"{producer.name or name}/replaced"
    graph.outputs[0] = value
    value.name = name
