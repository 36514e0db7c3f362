"""The Linears of a float32 bundle graph that can be quantised, and where they stand.

A site is a MatMul or Gemm of image data with a constant two-dimensional weight: the frozen
Linears of the backbone. Side branches (``branch/...``), attention products, convolutions and the
classifier are none, nor are position MLPs (they read constants) and mixtures of a few heads.

The patch embedding (a Conv) stays in floating point: it reads the pixels, whose rounding
every later layer sees (2 to 5 dB on the starter models), and is less than 1 % of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from hhdeploy.errors import BundleError
from hhdeploy.graph import BRANCH, LINEAR_TAG, GraphLinear, constant, linear_of

_IMAGES = "images"
# A product over fewer features (talking heads mix 4 or 6) has no arithmetic to save.
_LEAST_FEATURES = 8


def find_sites(graph: ir.Graph, classifier: str) -> dict[str, GraphLinear]:
    """All sites of a graph, by name, in execution order.

    Args:
        graph: of a float32 bundle.
        classifier: module path of the backbone's classifier, which is none (see the manifest).

    Raises:
        BundleError: the graph has no site, or was quantised already.
    """
    found: dict[str, GraphLinear] = {}
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
        if node.op_type not in ("MatMul", "Gemm") or (node.name or "").startswith(BRANCH):
            continue
        weight = constant(node.inputs[1])
        if weight is None or weight.ndim != 2 or node.inputs[0] not in data:
            continue
        if min(weight.shape) < _LEAST_FEATURES:
            continue
        path = node.metadata_props.get(LINEAR_TAG) or (node.name or "").rpartition("/")[0]
        if path == classifier or not path:
            continue
        site = linear_of(node, path, sum(other.path == path for other in found.values()))
        found[site.name] = site
    if not found:
        raise BundleError(
            "the graph has no Linear to quantise: expected MatMul or Gemm nodes with constant "
            "weights. Export the bundle again."
        )
    return found


def other_products(graph: ir.Graph, sites: Iterable[GraphLinear]) -> list[str]:
    """Names of products with a constant weight that are no site: what stays floating point."""
    names = {site.node.name for site in sites}
    return [
        node.name or node.op_type
        for node in graph
        if node.op_type in ("MatMul", "Gemm", "Conv")
        and node.name not in names
        and constant(node.inputs[1]) is not None
    ]
