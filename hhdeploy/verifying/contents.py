"""Whether the graphs of a bundle hold what its float32 graph and its manifest say.

The bounds of 8 and 16 bits are wider than what one wrong row of a weight does to the logits, and
noise is no image to judge a quantised graph on. But every weight there is a float32 graph's, in a
way that is known to the bit; the float32 graph itself has narrow bounds. And no hash covers the
manifest, whose mean, or labels, a graph states too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import MANIFEST, calibration_files
from hhdeploy.choices import (
    QUANTISED,
    TYPED,
    Precision,
    QuantisedPrecision,
    TypedPrecision,
    member,
)
from hhdeploy.errors import BundleError, abbreviate

if TYPE_CHECKING:
    import onnx_ir as ir

# What a graph says of itself that decides on answers and their names.
_DECISIVE = frozenset({"input_size", "mean", "std", "backbone_sha256", "adapters"})


def check_contents(bundle: Bundle, precisions: Sequence[Precision] | None) -> None:
    """Compare what graphs state with the manifest, and their constants with the float32 graph's,
    where onnx and onnx_ir are installed.

    In 16 bits they are float32's, rounded; a quantised graph's are what the bundle's calibration
    makes of them, its scales included. Of one that was added without its calibration nothing is
    known.

    Args:
        bundle: whose files have their hashes.
        precisions: what is asked for; None: all graphs. There may be no graph of one, as OpenVINO
            computes bfloat16 of the float32 graph.

    Raises:
        BundleError: naming the graph, and the constants that are others or what it states.
    """
    asked = [p for p in bundle.manifest.graphs if precisions is None or p in precisions]
    try:
        from hhdeploy.exporters.portable.form import described  # which needs onnx
        from hhdeploy.graph import open_graph
    except ImportError:
        return
    plain, right = open_graph(bundle.graph("float32")), described(bundle.manifest)
    for precision in asked:
        path = bundle.graph(precision)
        model = plain if precision == "float32" else open_graph(path)
        _check_stated(bundle, path, model.metadata_props, right)
        if precision == "float32":
            continue
        graph, source = model.graph, f"those of {bundle.manifest.graphs['float32']}"
        remedy = "Get the bundle's files again from where they are whole, or export it again."
        if (low := member(TYPED, precision)) is not None:
            wrong = list(_not_rounded(plain.graph, graph, low))
        else:
            quantised = member(QUANTISED, precision)
            assert quantised is not None
            _, file = calibration_files(quantised)
            if not bundle.manifest.has(file):
                continue
            scales = bundle.file(bundle.manifest.named(file))
            wrong = list(_not_calibrated(bundle, plain, graph, quantised, scales))
            source = f"what {scales.name} makes of {source}"
            remedy = remedy.replace("export it", "calibrate it")
        if wrong:
            raise BundleError(
                f"{path}: expected as weights {source}, in {precision}; found others: "
                f"{abbreviate(wrong)}. The graph is damaged, or another bundle's. {remedy}"
            )


def _check_stated(
    bundle: Bundle, graph: Path, stated: Mapping[str, str], right: Mapping[str, str]
) -> None:
    """Compare what a graph says of itself with the manifest; earlier graphs say nothing.

    Raises:
        BundleError: naming what differs.
    """
    for key, expected in right.items():
        found = stated.get(key, expected)
        if key in _DECISIVE and _read(found) != _read(expected):
            raise BundleError(
                f"{bundle.path / MANIFEST}: {key}: expected {found}, as {graph.name} says, found "
                f"{expected}: the manifest is not the one that was written. Copy or export the "
                "bundle again."
            )


def _read(stated: str) -> object:
    """What JSON holds, in which 1 and 1.0 are one number; other text as it is."""
    try:
        return json.loads(stated)
    except ValueError:
        return stated


def _not_rounded(plain: ir.Graph, typed: ir.Graph, precision: TypedPrecision) -> Iterator[str]:
    """Names of constants that are not the float32 graph's, rounded where they are stored low."""
    import onnx_ir as ir

    from hhdeploy.exporters.precision.twin import clamped

    exact, low, read = _constants(plain), ir.DataType[precision.upper()], set()
    for name, tensor in _constants(typed).items():
        own = name if name in exact else name.removesuffix(f"/{precision}")
        if own not in exact:
            yield name
            continue
        read.add(own)
        expected = exact[own].numpy()
        if exact[own].dtype == ir.DataType.FLOAT and tensor.dtype == low:
            expected = clamped(expected, low)
        if not _same(expected, tensor.numpy()):
            yield name
    yield from (name for name in exact if name not in read)


def _not_calibrated(
    bundle: Bundle, plain: ir.Model, graph: ir.Graph, precision: QuantisedPrecision, file: Path
) -> Iterator[str]:
    """Names of constants that are not those which the calibration makes of the float32 graph's."""
    from hhdeploy.calibration.qdq import FORMATS, quantised_model
    from hhdeploy.calibration.scales import read_scales

    found = _constants(graph)
    scales = read_scales(file)
    kept = frozenset(site for site in scales if f"{site}/weight/low" not in found)
    classifier = bundle.manifest.backbone.classifier
    made = quantised_model(plain, scales, FORMATS[precision], classifier, kept)
    expected = _constants(made.graph)
    for name in dict.fromkeys((*expected, *found)):
        one, other = expected.get(name), found.get(name)
        if one is None or other is None or not _same(one.numpy(), other.numpy()):
            yield name


def _constants(graph: ir.Graph) -> Mapping[str, ir.TensorProtocol]:
    """All that is stored in a graph, by the name of its value: initializers, and Constants."""
    import onnx_ir as ir

    values = [*graph.initializers.values()]
    values += [node.outputs[0] for node in graph if node.op_type == "Constant"]
    found = {str(value.name): ir.convenience.get_const_tensor(value) for value in values}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """To the bit: a NaN is itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (one, other))
    return np.array_equal(first, second)
