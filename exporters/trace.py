"""The base graph: a backbone traced once, its Linears tagged, cached on disk.

The tracer transposes and renames weights, so every Linear's node is tagged with its module path
(metadata ``hhdeploy.linear``) while the names are still the model's; fold and side branches find
their place by the tag. Attention is traced in its plain form, the batch dimension is symbolic.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import logging
import mmap
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from hhdeploy.backbones.attention import plain_attention
from hhdeploy.backbones.facts import LOGITS, BackboneFacts
from hhdeploy.backbones.outputs import check_classifier, check_steady, computing, giving, told
from hhdeploy.backbones.sites import LinearSpec
from hhdeploy.backbones.spec import Backbone
from hhdeploy.errors import BackboneError
from hhdeploy.exporters.batches import batch_shapes, check_batch, images_apart
from hhdeploy.exporters.tags import tag_linears, tag_mixed
from hhdeploy.files.caches import entry_at
from hhdeploy.files.writing import default_cache as default_cache
from hhdeploy.files.writing import write_json
from hhdeploy.graph import LINEAR_TAG, ViewTensor, adopt_constants

if TYPE_CHECKING:
    import torch

OPSET = 20
# Counts changes of this module that make older cached graphs unusable.
_TRACE_VERSION = 7
# Shape constants stay in the graph file, where shape inference sees them; weights do not.
EXTERNAL_THRESHOLD = 256
# A graph in the cache; the last file has the hashes of the others.
_GRAPH, _WEIGHTS, _HASHES = "model.onnx", "model.onnx.data", "sha256.json"
_CHUNK = 1 << 22
# The tracer's note of the module path that a node comes from.
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class BaseGraph:
    """A traced backbone.

    Attributes:
        model: the ONNX graph, ``images`` [batch, channels, H, W] to its outputs, logits first;
            never changed: passes work on a clone.
        facts: the backbone's facts, ``linears`` in the graph's execution order; no classifier
            where the graph has no logits.
    """

    model: ir.Model
    facts: BackboneFacts

    @property
    def features(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of an image's part, of every output but the logits."""
        return {
            str(value.name): tuple(int(size) for size in (value.shape or ())[1:])  # type: ignore[arg-type]
            for value in self.model.graph.outputs
            if value.name != LOGITS
        }


def base_graph(
    backbone: Backbone, cache: Path | None, outputs: Sequence[str] = (LOGITS,)
) -> BaseGraph:
    """The base graph of a backbone, from the cache or traced now.

    A cached graph that is not, byte for byte, what was stored is traced again and replaced.

    Args:
        backbone: the loaded model.
        cache: directory of cached graphs; None traces and stores nothing.
        outputs: of `hhdeploy.backbones.facts.OUTPUTS`, in that order.

    Raises:
        BackboneError: when torch cannot trace the architecture with a dynamic batch, the model's
            code fixes the batch, it does not tell an output, or its classifier is none.
    """
    if cache is None or backbone.traced_with is None:
        return _with_execution_order(trace(backbone, outputs), backbone.facts, outputs)
    entry = entry_at(cache, "base", _cache_key(backbone, outputs))
    try:
        stored = entry.read(_checked)
    except (OSError, ValueError, TypeError, KeyError):  # damaged
        stored = None
    if stored is None:
        traced = trace(backbone, outputs)
        stored = entry.keep(lambda folder: _keep(traced, folder))
        if stored is None:
            return _with_execution_order(traced, backbone.facts, outputs)
    return _with_execution_order(_graph_of(*stored), backbone.facts, outputs)


class _Weights:
    """An open file of weights: used where they lie, also when their cache entry is gone.

    Attributes:
        sha256: hex digest of the file.
    """

    def __init__(self, path: Path) -> None:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
            self._file = os.dup(stream.fileno())
        weakref.finalize(self, os.close, self._file)
        self.sha256 = digest.hexdigest()

    def tensor(self, stored: ir.ExternalTensor) -> ir.LazyTensor:
        """A tensor of the file, mapped anew whenever it is used, so that it takes no memory."""

        def mapped() -> ir.TensorProtocol:
            start = stored.offset or 0
            first = start - start % mmap.ALLOCATIONGRANULARITY
            size = start - first + stored.nbytes
            # Copy on write: PyTorch folds writeable memory only, the file is never changed.
            page = mmap.mmap(self._file, size, access=mmap.ACCESS_COPY, offset=first)
            values = np.frombuffer(page, stored.dtype.numpy(), stored.size, start - first)
            shaped = values.reshape(stored.shape.numpy())
            return ViewTensor(shaped, dtype=stored.dtype, name=stored.name)

        return ir.LazyTensor(mapped, stored.dtype, stored.shape, name=stored.name)


def _keep(traced: ir.Model, folder: Path) -> tuple[bytes, _Weights]:
    """Write a graph as a cache entry, and open it where it lies."""
    folder.mkdir()
    ir.save(
        traced, folder / _GRAPH, external_data=_WEIGHTS, size_threshold_bytes=EXTERNAL_THRESHOLD
    )
    graph, weights = _opened(folder)
    hashes = {_GRAPH: hashlib.sha256(graph).hexdigest(), _WEIGHTS: weights.sha256}
    write_json(folder / _HASHES, hashes)
    return graph, weights


def _checked(folder: Path) -> tuple[bytes, _Weights]:
    """The graph and the weights of a cache entry; what is hashed is what is used.

    Raises:
        OSError, ValueError, TypeError, KeyError: one is not there, or not what was stored.
    """
    hashes: dict[str, str] = json.loads((folder / _HASHES).read_text(encoding="utf-8"))
    graph, weights = _opened(folder)
    if (hashlib.sha256(graph).hexdigest(), weights.sha256) != (hashes[_GRAPH], hashes[_WEIGHTS]):
        raise ValueError(f"{folder} is not what was stored")
    return graph, weights


def _opened(folder: Path) -> tuple[bytes, _Weights]:
    return (folder / _GRAPH).read_bytes(), _Weights(folder / _WEIGHTS)


def _graph_of(graph: bytes, weights: _Weights) -> ir.Model:
    model = ir.from_proto(onnx.load_model_from_string(graph))
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = weights.tensor(value.const_value)
    return model


def trace(backbone: Backbone, outputs: Sequence[str] = (LOGITS,)) -> ir.Model:
    """torch.onnx.export, tag, optimise: the uncached work."""
    import torch
    from onnxscript import optimizer

    example = torch.zeros(2, *backbone.facts.preprocess.input_size)  # a batch of 1 would be fixed
    try:
        with _quiet(), torch.no_grad(), computing(backbone.facts.model, example.shape):
            check_steady(backbone.model, backbone.facts)  # the plain form has no dropout
        with plain_attention(backbone.model), _quiet(), torch.no_grad():
            with computing(backbone.facts.model, example.shape):
                check_classifier(backbone.model, backbone.facts)
                apart = images_apart(backbone.model, backbone.facts.linears, example.shape[1:])
            with giving(backbone.model, backbone.facts.classifier, outputs):
                program = torch.onnx.export(
                    backbone.model,
                    (example,),
                    dynamo=True,
                    opset_version=OPSET,
                    dynamic_shapes=batch_shapes(backbone.model, torch.export.Dim("batch")),
                    input_names=["images"],
                    output_names=list(outputs),
                    optimize=False,
                    verbose=False,
                )
    except BackboneError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # torch wraps the reason in a page of advice
        raise BackboneError(
            f"torch could not trace {backbone.facts.model} with a dynamic batch: {told(cause)}"
        ) from error
    assert program is not None
    model = program.model
    check_batch(model, backbone.facts.model)
    tag_linears(model.graph)
    sites = {linear.path for linear in backbone.facts.linears}
    tag_mixed(model.graph, sites - apart)
    _read_once(model.graph)
    traced_weights = list(model.graph.initializers.values())
    with _quiet():  # a site's Linear of constants (Swin v2's positions) stays one
        optimizer.optimize_ir(
            model,
            should_fold=lambda n: False if n.metadata_props.get(LINEAR_TAG) in sites else None,
        )
    adopt_constants(model.graph)
    _remove_empty_pads(model.graph)
    _set_apart(model.graph)
    _name_nodes(model)
    _name_weights(model)
    _drop_notes(model)
    kept = model.clone()
    # Rules of the optimiser keep the graph that they last looked at, and it the model's weights.
    for value in (*traced_weights, *model.graph.initializers.values()):
        value.const_value = None
    return kept


def _drop_notes(model: ir.Model) -> None:
    """Remove the tracer's notes: stack traces, its own names, a copy of the signature."""
    graph = model.graph
    results = [value for node in graph for value in node.outputs]
    for noted in (*graph, *results, *graph.inputs, *graph.initializers.values()):
        for key in [k for k in noted.metadata_props if k.startswith("pkg.")]:
            del noted.metadata_props[key]
    graph.metadata_props.clear()
    model.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns about its own internals; errors still raise."""
    loggers = {
        name: logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")
    }
    levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(levels[name])


def _read_once(graph: ir.Graph) -> None:
    """Let every use of a weight read it by one Transpose: a Linear that the model calls several
    times has one for each call, and the optimizer makes no constant of a large weight then."""
    first: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer():
            continue
        order = tuple(node.attributes.get_ints("perm", ()))
        kept = first.setdefault((weight, order), node.outputs[0])
        if kept is not node.outputs[0]:
            node.outputs[0].replace_all_uses_with(kept)
            graph.remove(node, safe=True)


def _remove_empty_pads(graph: ir.Graph) -> None:
    """Remove Pads of nothing: Swin's windows at sizes that they divide. Compilers copy there."""
    for node in list(graph):
        if node.op_type != "Pad" or node.outputs[0].is_graph_output():
            continue
        padded, amounts = node.inputs[:2]
        assert padded is not None and amounts is not None
        pads = ir.convenience.get_const_tensor(amounts)
        if pads is not None and not pads.numpy().any():
            node.outputs[0].replace_all_uses_with(padded)
            graph.remove(node, safe=True)


def _set_apart(graph: ir.Graph) -> None:
    """Give every output but the logits a node of its own: what it shows may be in use inside, and
    passes replace values there."""
    for index, value in enumerate(graph.outputs):
        producer = value.producer()
        if value.name == LOGITS or producer is None:
            continue
        alone = ir.node("Identity", [value])
        shown = alone.outputs[0]
        shown.name, shown.shape, shown.type = value.name, value.shape, value.type
        value.name = f"{value.name}/inside"
        graph.insert_after(producer, alone)
        graph.outputs[index] = shown


def _name_nodes(model: ir.Model) -> None:
    """Call every node after its module, ``blocks.0.norm1/LayerNormalization``: a compiler's
    messages about a node then tell where in the model it is."""
    taken: dict[str, int] = {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        # The last scope is the operation itself.
        module = next((s for s in reversed(scopes[:-1]) if s and not s.startswith("_")), "model")
        module = node.metadata_props.get(LINEAR_TAG, module)
        name = f"{module}/{node.op_type}"
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"


def _name_weights(model: ir.Model) -> None:
    """Give the weights of tagged nodes names that tell what they are."""
    for node in model.graph:
        path = node.metadata_props.get(LINEAR_TAG)
        if path is None:
            continue
        weight = node.inputs[1]
        assert weight is not None
        if weight.name and weight.name.startswith("val_"):
            wanted = f"{path}.weight_t"
            if wanted not in model.graph.initializers:
                model.graph.initializers.pop(weight.name)
                weight.name = wanted
                model.graph.initializers[wanted] = weight


def _with_execution_order(
    model: ir.Model, facts: BackboneFacts, outputs: Sequence[str]
) -> BaseGraph:
    """Put the facts' Linears in the order of the graph's nodes, and check that all are there."""
    by_path = {linear.path: linear for linear in facts.linears}
    ordered: dict[str, LinearSpec] = {}
    tagged = set()
    for node in model.graph:
        path = node.metadata_props.get(LINEAR_TAG)
        if path is not None:
            tagged.add(path)
            if path in by_path:
                ordered.setdefault(path, by_path[path])
    # A Linear that the forward pass never uses (the keys of an unused branch) cannot be adapted.
    if LOGITS not in outputs:
        facts = facts.without_classifier()
    elif facts.classifier not in tagged:
        raise BackboneError(
            f"{facts.model}: the classifier {facts.classifier} was not found in the traced graph: "
            "its weight is not used as it is (weight norm, autocast), or elsewhere, too. Export "
            "the model without."
        )
    return BaseGraph(model, replace(facts, linears=tuple(ordered.values())))


def _cache_key(backbone: Backbone, outputs: Sequence[str]) -> str:
    """Digest of everything that the traced graph depends on."""
    import onnxscript
    import torch

    assert backbone.traced_with is not None
    facts = backbone.facts
    digest = hashlib.sha256()
    described = [
        _TRACE_VERSION,
        facts.model,
        dict(facts.args),
        facts.preprocess.input_size,
        OPSET,
        torch.__version__,
        *backbone.traced_with,
        onnxscript.__version__,
        ir.__version__,
        *([] if tuple(outputs) == (LOGITS,) else outputs),
    ]
    digest.update(json.dumps(described).encode())
    state: dict[str, torch.Tensor] = backbone.model.state_dict()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
