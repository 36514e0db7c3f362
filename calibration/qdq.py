"""Which Linears can be quantised, and explicit Q/DQ graphs of them.

    y = DQ(Q(x ∘ smooth)) DQ(W_q)      W_q = round(W / smooth / scale), one scale an output column

ONNX Runtime, OpenVINO and TensorRT recognise the pattern and multiply in the low type. Sites
that read the same value (q, k and v) have the same range and factors.

A site is a MatMul or Gemm of image data with a constant two-dimensional weight: the frozen
Linears of the backbone. Side branches (``branch/...``), attention products, convolutions and the
classifier are none, nor are position MLPs (they read constants) and mixtures of a few heads.

The patch embedding (a Conv) stays in floating point: it reads the pixels, whose rounding
every later layer sees (2 to 5 dB on the starter models), and is less than 1 % of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.calibration.scales import SiteScale
from hhdeploy.choices import QuantisedPrecision
from hhdeploy.errors import BundleError
from hhdeploy.graph import (
    BRANCH,
    LINEAR_TAG,
    GraphLinear,
    add_initializer,
    constant,
    drop_unused_initializers,
    linear_of,
)

_IMAGES = "images"
# A product over fewer features (talking heads mix 4 or 6) has no arithmetic to save.
_LEAST_FEATURES = 8


@dataclass(frozen=True)
class Format:
    """A low type.

    Attributes:
        dtype: of the quantised values.
        largest: the largest magnitude that is used.
        step: from it to the value below.
        activations: False: only the weights are stored low.
    """

    dtype: ir.DataType
    largest: float
    step: float
    activations: bool = True

    @property
    def reach(self) -> float:
        """What is rounded to the largest magnitude, as a multiple of it; more is clipped."""
        return (self.largest + self.step / 2) / self.largest


FORMATS: Final[Mapping[QuantisedPrecision, Format]] = {
    "int8": Format(ir.DataType.INT8, 127.0, 1.0),
    # 1.75 x 2^8; three bits of mantissa are steps of 32 from 256 on.
    "fp8": Format(ir.DataType.FLOAT8E4M3FN, 448.0, 32.0),
    "int8-weights": Format(ir.DataType.INT8, 127.0, 1.0, activations=False),
}


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


def quantised_model(
    model: ir.Model,
    scales: Mapping[str, SiteScale],
    form: Format,
    classifier: str,
    excluded: frozenset[str] = frozenset(),
) -> ir.Model:
    """A new Q/DQ graph; ``model`` is not changed.

    1. Every site that is not excluded reads DQ(Q(x)) (unless only weights are low) and a weight
       stored low behind a DequantizeLinear; all zero points are zero.
    2. SmoothQuant's factors are a Mul before the quantiser and are divided out of the weight.
    3. Excluded sites read the float input and weight, bit for bit as in ``model``.

    Args:
        model: the float32 graph that the scales were calibrated on.
        scales: of its sites; one without stays in floating point.
        form: one of `FORMATS`.
        classifier: as for `find_sites`.
        excluded: names of sites to leave in floating point.
    """
    clone = model.clone()
    sites = find_sites(clone.graph, classifier)
    writer = _Writer(clone.graph, form)
    for name, site in sites.items():
        if name in scales and name not in excluded:
            writer.quantise(site, scales[name])
    drop_unused_initializers(clone.graph)
    return clone


def quantised_weight(
    weight: NDArray[np.float32], scale: SiteScale, form: Format
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """W [in, out] as (W_q [in, out] of the low type, scales [out] float32)."""
    if scale.smooth is not None and form.activations:
        weight = weight / scale.smooth[:, None]
    scales = np.max(np.abs(weight), axis=0) / np.float32(form.largest)
    scales[scales == 0] = 1.0  # a column of zeros
    return low_values(weight / scales, form), scales


def low_values(values: NDArray[np.float32], form: Format) -> NDArray[Any]:
    """Values in units of the scale, rounded to even and cut to the type's range."""
    cut = np.clip(values, -form.largest, form.largest)
    if form.dtype is ir.DataType.INT8:
        return np.rint(cut).astype(np.int8)
    return cut.astype(ml_dtypes.float8_e4m3fn)


class _Writer:
    """Adds the nodes of one graph."""

    def __init__(self, graph: ir.Graph, form: Format) -> None:
        self._graph, self._form = graph, form
        self._products: dict[tuple[ir.Value, bytes], ir.Value] = {}

    def quantise(self, site: GraphLinear, scale: SiteScale) -> None:
        weight = self._weight(site, scale)
        if self._form.activations:
            site.node.replace_input_with(0, self._input(site, scale))
            self._correct_bias(site, scale)
        site.node.replace_input_with(1, weight)

    def _input(self, site: GraphLinear, scale: SiteScale) -> ir.Value:
        """DQ(Q(x ∘ smooth)), a pair for every site.

        ONNX Runtime multiplies in INT8 only if nobody else reads the pair. Zero points of their
        own keep it from merging the pairs of q, k and v, which are otherwise equal; OpenVINO and
        TensorRT merge them again.
        """
        x, name = self._smoothed(site, scale), f"{site.name}/input"
        step = np.asarray(scale.absmax / self._form.largest, np.float32)
        parameters = [
            add_initializer(self._graph, f"{name}/scale", step),
            add_initializer(self._graph, f"{name}/zero_point", self._zeros(())),
        ]
        low = self._node(site, "QuantizeLinear", f"{name}/quantise", [x, *parameters], x)
        low.dtype = self._form.dtype
        return self._node(site, "DequantizeLinear", f"{name}/dequantise", [low, *parameters], x)

    def _smoothed(self, site: GraphLinear, scale: SiteScale) -> ir.Value:
        """x ∘ smooth, once for all sites that read x with the same factors."""
        if scale.smooth is None:
            return site.input
        key = (site.input, scale.smooth.tobytes())
        if key not in self._products:
            factors = add_initializer(
                self._graph, f"{site.name}/input/smooth_factors", scale.smooth
            )
            inputs = [site.input, factors]
            name = f"{site.name}/input/smooth"
            self._products[key] = self._node(site, "Mul", name, inputs, site.input)
        return self._products[key]

    def _weight(self, site: GraphLinear, scale: SiteScale) -> ir.Value:
        low, scales = quantised_weight(site.weight.T, scale, self._form)
        name = f"{site.name}/weight"
        parameters = [
            add_initializer(self._graph, f"{name}/low", low.T if site.transposed else low),
            add_initializer(self._graph, f"{name}/scale", scales),
            add_initializer(self._graph, f"{name}/zero_point", self._zeros(scales.shape)),
        ]
        weight = site.node.inputs[1]
        assert weight is not None
        axis = 0 if site.transposed else 1
        return self._node(
            site, "DequantizeLinear", f"{name}/dequantise", parameters, weight, axis=axis
        )

    def _correct_bias(self, site: GraphLinear, scale: SiteScale) -> None:
        if scale.bias is not None and site.bias_node is not None:
            site.set_bias(self._graph, f"{site.name}/bias/corrected", scale.bias)

    def _zeros(self, shape: tuple[int, ...]) -> NDArray[Any]:
        return np.zeros(shape, self._form.dtype.numpy())

    def _node(
        self,
        site: GraphLinear,
        op: str,
        name: str,
        inputs: list[ir.Value],
        like: ir.Value,
        **attributes: int,
    ) -> ir.Value:
        """A float32 node before the site's, its output shaped like a value."""
        node = ir.node(op, inputs, attributes, name=name)
        output = node.outputs[0]
        output.name, output.shape, output.dtype = name, like.shape, ir.DataType.FLOAT
        self._graph.insert_before(site.node, node)
        return output
