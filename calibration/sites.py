"""The Linears of a float32 bundle graph that can be quantised, and where they stand.

A site is a MatMul or Gemm of image data with a constant two-dimensional weight: the frozen
Linears of the backbone. Side branches (``branch/...``), attention products, convolutions and the
classifier are none, nor are position MLPs (they read constants) and mixtures of a few heads.

The patch embedding (a Conv) stays in floating point: it reads the pixels, whose rounding
every later layer sees (2 to 5 dB on the starter models), and is less than 1 % of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.errors import BundleError

_LINEAR_TAG = "hhdeploy.linear"  # set by the tracer: module path of a Linear's node
_BRANCH = "branch/"
_IMAGES = "images"
# A product over fewer features (talking heads mix 4 or 6) has no arithmetic to save.
_LEAST_FEATURES = 8


@dataclass(frozen=True)
class Site:
    """One use of a frozen Linear.

    Attributes:
        name: module path (``blocks.0.mlp.fc1``; ``blocks.0.attn.qkv.q`` where a graph computes
            q, k and v apart); ``@1``, ``@2``, ... for further uses of one module.
        node: the MatMul or Gemm.
    """

    name: str
    node: ir.Node

    @property
    def input(self) -> ir.Value:
        """x of y = x W."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> NDArray[np.float32]:
        """The weight, [in, out]: a view."""
        stored = _constant(self.node.inputs[1])
        assert stored is not None
        return stored.T if self.transposed else stored

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(in, out)."""
        in_, out = self.weight.shape
        return in_, out

    @property
    def transposed(self) -> bool:
        """The node stores the weight as [out, in] (Gemm with transB)."""
        return self.node.op_type == "Gemm" and bool(self.node.attributes.get_int("transB", 0))

    @property
    def bias(self) -> tuple[ir.Node, int] | None:
        """The node and input index of the constant bias: of the Gemm, or of an Add behind it."""
        if self.node.op_type == "Gemm":
            has = len(self.node.inputs) > 2 and self.node.inputs[2] is not None
            return (self.node, 2) if has else None
        uses = list(self.node.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != "Add":
            return None
        add, index = uses[0].node, 1 - uses[0].idx
        other = _constant(add.inputs[index])
        if other is None or other.size != self.weight.shape[1]:
            return None
        return add, index


def find_sites(graph: ir.Graph, classifier: str) -> dict[str, Site]:
    """All sites of a graph, by name, in execution order.

    Args:
        graph: of a float32 bundle.
        classifier: module path of the backbone's classifier, which is none (see the manifest).

    Raises:
        BundleError: the graph has no site, or was quantised already.
    """
    found: dict[str, Site] = {}
    data = {value for value in graph.inputs if value.name == _IMAGES}
    for node in graph:
        # The batch size, read by Shape, makes no data of what it shapes.
        if node.op_type not in ("Shape", "Size") and any(v in data for v in node.inputs):
            data.update(node.outputs)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            raise BundleError(
                f"the graph is quantised already ({node.name}): calibration starts from the "
                "bundle's float32 graph."
            )
        if node.op_type not in ("MatMul", "Gemm") or (node.name or "").startswith(_BRANCH):
            continue
        weight = _constant(node.inputs[1])
        if weight is None or weight.ndim != 2 or node.inputs[0] not in data:
            continue
        if min(weight.shape) < _LEAST_FEATURES:
            continue
        path = node.metadata_props.get(_LINEAR_TAG) or (node.name or "").rpartition("/")[0]
        if path == classifier or not path:
            continue
        name, count = path, 0
        while name in found:
            count += 1
            name = f"{path}@{count}"
        found[name] = Site(name, node)
    if not found:
        raise BundleError(
            "the graph has no Linear to quantise: expected MatMul or Gemm nodes with constant "
            "weights. Export the bundle again."
        )
    return found


def other_products(graph: ir.Graph, sites: Iterable[Site]) -> list[str]:
    """Names of products with a constant weight that are no site: what stays floating point."""
    names = {site.node.name for site in sites}
    return [
        node.name or node.op_type
        for node in graph
        if node.op_type in ("MatMul", "Gemm", "Conv")
        and node.name not in names
        and _constant(node.inputs[1]) is not None
    ]


def _constant(value: ir.Value | None) -> NDArray[np.float32] | None:
    if value is None or value.const_value is None:
        return None
    array: NDArray[np.float32] = value.const_value.numpy()
    return array
