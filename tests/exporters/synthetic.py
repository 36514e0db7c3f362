"""Hand-written graphs with tagged Linears, for the cases that no tiny timm model has."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.sites import linear_spec
from hhdeploy.exporters.trace import BaseGraph
from hhdeploy.graph import LINEAR_TAG, GraphLinear, linears_by_path
from hhdeploy.preprocess import Preprocess


def random(*shape: int, seed: int = 4) -> NDArray[np.float32]:
    """Seeded normal values."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def fingerprint(model: ir.Model) -> bytes:
    """All of a model: equal for equal ones alone."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


def graph(text: str, weights: dict[str, NDArray[np.float32]], tags: dict[str, str]) -> ir.Model:
    """A model in ONNX's textual form.

    Args:
        text: ``agraph (inputs) => (outputs) { nodes }``.
        weights: initializers by name.
        tags: output of a MatMul or Gemm -> module path.
    """
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]>\n{text}')
    for name, value in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    for node in model.graph:
        path = tags.get(node.outputs[0].name or "")
        if path is not None:
            node.metadata_props[LINEAR_TAG] = path
    return model


def linear(model: ir.Model, path: str = "proj") -> GraphLinear:
    """The one use of a Linear."""
    (found,) = linears_by_path(model.graph)[path]
    return found


def base_of(model: ir.Model, shapes: dict[str, tuple[int, int]], dim: int) -> BaseGraph:
    """A base graph around a hand-written model with the classifier ``head`` (9 classes).

    Args:
        model: the graph.
        shapes: module path -> (out, in) of the Linears that are sites.
        dim: features of the classifier.
    """
    linears = [linear_spec(path, *shape) for path, shape in shapes.items()]
    preprocess = Preprocess.from_json(
        {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
        | {"crop_pct": 1.0, "crop_mode": "center"}
    )
    found = tuple(spec for spec in linears if spec is not None)
    assert len(found) == len(shapes)
    facts = BackboneFacts("synthetic", {}, "0" * 64, found, "head", dim, 9, preprocess)
    return BaseGraph(model, facts)


def shared_twice() -> BaseGraph:
    """One Linear that the forward pass calls twice, and a classifier."""
    weights = {
        "w": random(7, 7),
        "b": random(7),
        "head_w": random(9, 7),
        "head_b": random(9),
        "axes": np.asarray([1], np.int64),
    }
    text = """agraph (float[batch, 5, 7] images) => (float[batch, 9] logits) {
        p1 = MatMul(images, w)  a1 = Add(p1, b)  r = Relu(a1)
        p2 = MatMul(r, w)  a2 = Add(p2, b)
        pooled = ReduceMean<keepdims=0>(a2, axes)
        logits = Gemm<transB=1>(pooled, head_w, head_b)
    }"""
    path = "blocks.0.attn.proj"
    model = graph(text, weights, {"p1": path, "p2": path, "logits": "head"})
    return base_of(model, {path: (7, 7)}, 7)
