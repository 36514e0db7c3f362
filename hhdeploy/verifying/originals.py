"""Whether a bundle is of the model that it says: what torch loads, beside float32's constants.

The bounds of float32 are narrow, and still wider than what one number of a weight does to the
logits. But the model is at hand: parameters that a graph names, and weights of its Linears, are the
model's, or what the folded adapter makes of them; and the other tables are something that the
model computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.applying import linear_with, path_of_parameters, values_with
from hhdeploy.adapters.format import Adapter
from hhdeploy.backbones.facts import LOGITS
from hhdeploy.backbones.parameters import values_in
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import MANIFEST
from hhdeploy.errors import BundleError, abbreviate
from hhdeploy.exporters.inserter import BANK
from hhdeploy.graph import BRANCH, LINEAR_TAG, constant, linears_by_path, open_graph
from hhdeploy.verifying.tables import alike, shares

if TYPE_CHECKING:
    import onnx_ir as ir

    from hhdeploy.backbones.sites import LinearSpec
    from hhdeploy.backbones.spec import Backbone

# A constant's name, what it holds, what it has to hold.
_Pair = tuple[str, NDArray[Any], NDArray[Any]]
# Operations that the tracer's optimiser merges a BatchNorm into, under the parameter's name.
_MERGING = frozenset({"Conv", "ConvTranspose", "Gemm"})
# Numbers of the shapes, pads and axes that operations take: twice the dimensions of a tensor.
_OF_SHAPES = 16
# A table that has more than this part of one of the model's is that one, damaged.
_MOSTLY = 0.5


def check_stated(bundle: Bundle, backbone: Backbone) -> Iterator[str]:
    """Compare what the manifest says of the backbone with the model.

    Yields:
        A line for whatever the model's source may say otherwise elsewhere (another version of
        timm, other files beside the weights): preprocessing, names and meaning of the classes.

    Raises:
        BundleError: another classifier, or another number of features.
    """
    manifest, facts = bundle.manifest, backbone.facts
    facts = facts if LOGITS in manifest.outputs else facts.without_classifier()
    where = f"{bundle.path / MANIFEST}: backbone:"
    for key in ("classifier", "dim"):
        found, expected = getattr(manifest.backbone, key), getattr(facts, key)
        if found != expected:
            raise BundleError(
                f"{where} {key}: expected {expected!r}, as {facts.model} has it, found {found!r}: "
                "the manifest is not the one that was written. Copy or export the bundle again."
            )
    says, here = manifest.backbone.preprocess, facts.preprocess
    stated = {"preprocess": (asdict(says), asdict(here))}
    for key, one in asdict(manifest.backbone.meaning).items():
        if manifest.answers_backbone or manifest.whole:
            stated[key] = (one, getattr(facts.meaning, key))
    for key, (found, expected) in stated.items():
        if None not in (found, expected) and found != expected:
            yield f"{where} {key}: {_difference(found, expected, facts.model)}"


def _difference(found: Any, expected: Any, model: str) -> str:
    if isinstance(found, Mapping):
        keys = [key for key in expected if found[key] != expected[key]]
        found, expected = ({key: side[key] for key in keys} for side in (found, expected))
    return (
        f"{model} says {expected!r} here, the bundle {found!r}, which it goes on to use. Export "
        "it again if the model is right"
    )


def check_originals(
    bundle: Bundle, backbone: Backbone, adapters: Mapping[str, Adapter]
) -> str | None:
    """Compare the float32 graph's constants with the model's, within rounding.

    Known are parameters that a graph names as the model does, and the weights of its Linears. Of a
    convolution, into which a BatchNorm may have been merged, every filter is a multiple of the
    model's. Tables that the tracer computed are looked for among what the model computes.

    Args:
        bundle: of this very model.
        backbone: the model, bare.
        adapters: all of the bundle's, of which a folded bundle has one in its weights.

    Returns:
        A line about tables that are like nothing the model computes, if any.

    Raises:
        BundleError: naming the constants that are others.
    """
    path, model = bundle.graph("float32"), backbone.facts.model
    graph = open_graph(path).graph
    folded = next(iter(adapters.values()), None) if bundle.manifest.layout is None else None
    known: dict[str, bool] = {}
    for name, found, right in _pairs(graph, backbone, folded):
        known[name] = known.get(name, True) and _alike(found, right)
    if (baked := constant(graph.initializers.get(BANK))) is not None:
        known[BANK] = np.array_equal(baked, bundle.bank())
    tables = {n: v for n, v in _tables(graph) if n not in known}
    found_in_model = _shares(backbone, folded, tables)
    wrong = [name for name, right in known.items() if not right]
    wrong += [name for name, share in found_in_model.items() if _MOSTLY < share < 1.0]
    if wrong:
        raise BundleError(
            f"{path}: expected as weights those of {model}"
            f"{' with its adapter' if folded is not None else ''}, found others: "
            f"{abbreviate(wrong)}. The graph is damaged, or of another model. Get the bundle's "
            "files again from where they are whole, or export it again."
        )
    strange = [name for name, share in found_in_model.items() if share < 1.0]
    return (
        f"{path}: not compared, as {model} computes nothing like it: {abbreviate(strange)}"
        if strange
        else None
    )


def _tables(graph: ir.Graph) -> Iterator[tuple[str, NDArray[Any]]]:
    """Constants of several numbers, but for what tracers write of their own: shapes, axes and the
    like, places counted, and masks that hide nothing."""
    for name, value in graph.initializers.items():
        array = constant(value)
        if array is not None and array.size > (1 if array.dtype.kind == "f" else _OF_SHAPES):
            flat = array.reshape(-1)
            counted = array.dtype.kind == "i" and np.array_equal(flat, np.arange(flat.size))
            if not counted and not (array.dtype.kind == "b" and flat.all()):
                yield name, array


def _shares(
    backbone: Backbone, folded: Adapter | None, tables: Mapping[str, NDArray[Any]]
) -> dict[str, float]:
    """`shares` of the model with the parameters that the folded adapter replaces."""
    if folded is None:
        return shares(backbone, tables)
    with values_in(backbone.model, values_with(backbone, folded), folded.source):
        return shares(backbone, tables)


def _pairs(graph: ir.Graph, backbone: Backbone, folded: Adapter | None) -> Iterator[_Pair]:
    """Every constant whose origin is known: its name, what it holds, and what it has to."""
    right, by_path = _parameters(backbone, folded), linears_by_path(graph)
    specs = {linear.path: linear for linear in backbone.facts.linears}
    for path in {**by_path, **specs}:
        weight, bias = right.get(f"{path}.weight"), right.get(f"{path}.bias")
        if path in specs:
            weight, bias = _of_linear(backbone, folded, specs[path], right)
        elif folded is not None and folded.head is not None and path == folded.head.path:
            weight, bias = folded.head.weight, folded.head.bias
        for use in by_path.get(path, ()):
            name = str(getattr(use.node.inputs[1], "name", ""))
            if weight is not None:
                yield name, use.weight, weight
        yield from _made(graph, f"{path}.bias_folded", bias)
        if path in specs and len(specs[path].sites) > 1:
            yield from _taken_apart(graph, specs[path], weight, bias)
    for name in right:
        yield from _named(graph, name, right)


def _parameters(backbone: Backbone, folded: Adapter | None) -> dict[str, NDArray[Any]]:
    """By name all floating-point numbers of the state dict, and what an adapter puts in the place
    of some as a whole."""
    state = backbone.model.state_dict()
    found = {name: t.numpy() for name, t in state.items() if t.is_floating_point()}
    return found if folded is None else found | values_with(backbone, folded)


def _of_linear(
    backbone: Backbone,
    folded: Adapter | None,
    linear: LinearSpec,
    right: Mapping[str, NDArray[Any]],
) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """Weight (out, in) and bias, where it has one, with the adapter in them."""
    names = path_of_parameters(backbone, linear)
    biased = names[1] in right or len(linear.sites) == 1  # BEiT's q and v have theirs elsewhere
    if folded is not None and any(site.name in folded.sites for site in linear.sites):
        right = linear_with(backbone, folded, linear, right)
    weight, bias = (right.get(name) for name in names)
    return weight, bias if biased else None


def _taken_apart(
    graph: ir.Graph,
    linear: LinearSpec,
    weight: NDArray[Any] | None,
    bias: NDArray[Any] | None,
) -> Iterator[_Pair]:
    """Of a fused qkv with branches, which make three products of it."""
    count = len(linear.sites)
    thirds = [None] * count if weight is None else np.split(weight, count)
    for site, third in zip(linear.sites, thirds, strict=True):
        yield from _made(graph, f"{site.name}/weight_t", None if third is None else third.T)
    rows = None if bias is None else bias.reshape(1, count, 1, -1)
    yield from _made(graph, f"{BRANCH}{linear.path}/additive/biases", rows)


def _made(graph: ir.Graph, name: str, right: NDArray[Any] | None) -> Iterator[_Pair]:
    """The constant of a name that an export gives it, where it is in the graph."""
    value = graph.initializers.get(name)
    if right is not None and (found := constant(value)) is not None:
        yield name, found, right


def _named(graph: ir.Graph, name: str, right: Mapping[str, NDArray[Any]]) -> Iterator[_Pair]:
    """The constant of a parameter's name, where it is in the graph and of its size. A BatchNorm
    multiplies filters, and moves their biases to where nobody can tell."""
    value, expected = graph.initializers.get(name), right[name]
    tensor = value.const_value if value is not None else None
    if value is None or tensor is None or tensor.size != expected.size:
        return
    found = tensor.numpy().reshape(expected.shape)
    for node, index in value.uses():
        if node.op_type not in _MERGING or LINEAR_TAG in node.metadata_props:
            continue
        if index == 1 and node.op_type != "ConvTranspose":
            expected = _scaled(expected, found)
        elif not _has_weight_of(node, right):
            return
    yield name, found, expected


def _has_weight_of(node: ir.Node, right: Mapping[str, NDArray[Any]]) -> bool:
    """Whether a node's weight is the model's, to the bit: nothing was merged into it."""
    weight = node.inputs[1]
    array, own = constant(weight), None if weight is None else right.get(str(weight.name))
    return array is not None and own is not None and np.array_equal(array, own)


def _scaled(right: NDArray[Any], found: NDArray[Any]) -> NDArray[np.float64]:
    """Filters (out, ...), each by the factor that makes it most like the one that was found."""
    axes = tuple(range(1, right.ndim))
    wide, other = right.astype(np.float64), found.astype(np.float64)
    squares = (wide * wide).sum(axes, keepdims=True)
    factors: NDArray[np.float64] = (wide * other).sum(axes, keepdims=True)
    factors /= np.where(squares == 0.0, 1.0, squares)
    wide *= factors
    return wide


def _alike(found: NDArray[Any], right: NDArray[Any]) -> bool:
    return found.shape == right.shape and bool(alike(found, right).all())
