"""Fold one adapter into a base graph: W += delta, or W <- M W and b <- M b; s_in, s_out and db."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.adapters.format import Adapter, Head
from hhdeploy.algebra import (
    Array,
    constant_delta,
    fold_additive,
    fold_sequential,
    shifted_bias,
)
from hhdeploy.backbones.sites import LinearSpec
from hhdeploy.errors import PlanError
from hhdeploy.exporters.trace import BaseGraph
from hhdeploy.graph import GraphLinear, drop_unused_initializers, linears_at, linears_by_path


def folded_model(base: BaseGraph, adapter: Adapter) -> ir.Model:
    """A new graph of the backbone with one adapter in its weights; ``base`` is not changed.

    1. Clone the graph (initializers are shared with the base: no weight is copied).
    2. Each adapted Linear gets a new weight, and for the sequential form or db a new bias. Never
       edited in place: the tracer shares equal initializers between layers.
    3. The adapter's head, if it has one, replaces the classifier.

    Requires that `hhdeploy.adapters.checks.check` has passed. Folded in float64, cast once.

    Raises:
        PlanError: a folded weight is not finite in float32.
    """
    model = base.model.clone()
    by_path = linears_by_path(model.graph)
    for spec in base.facts.linears:
        if any(site.name in adapter.sites for site in spec.sites):
            for linear in linears_at(by_path, spec.path):
                _fold_linear(model.graph, linear, spec, adapter)
    if adapter.head is not None:
        for linear in linears_at(by_path, base.facts.classifier):
            _replace_head(model.graph, linear, adapter.head)
    drop_unused_initializers(model.graph)
    return model


def _fold_linear(graph: ir.Graph, linear: GraphLinear, spec: LinearSpec, adapter: Adapter) -> None:
    weight = linear.weight
    # An overflow in the cast is reported by `_check_finite`, with the site's name.
    with np.errstate(over="ignore"):
        _fold_sites(graph, linear, spec, adapter, weight)


def _fold_sites(
    graph: ir.Graph,
    linear: GraphLinear,
    spec: LinearSpec,
    adapter: Adapter,
    weight: NDArray[np.float32],
) -> None:
    folded = np.empty_like(weight)
    shift: Array | None = None  # db of all sites of an additive adapter
    start = 0
    for site in spec.sites:
        part = slice(start, start + site.out)
        start += site.out
        if site.name not in adapter.sites:
            folded[part] = weight[part]
            continue
        change = adapter.change(site.name)
        if adapter.form == "additive":
            delta = change.delta or constant_delta(0, site.out, spec.in_)
            fold_additive(weight[part], delta, folded[part], change.scales)
            if change.db is not None:
                shift = np.zeros(spec.out) if shift is None else shift
                shift[part] = change.db
        else:
            transform = change.delta or constant_delta(1, site.out, site.out)
            folded[part], bias = fold_sequential(
                weight[part], linear.bias, transform, change.scales, change.db
            )
            if bias is not None:
                _set_bias(graph, linear, spec, bias)
        _check_finite(folded[part], site.name)
    if shift is not None and (moved := shifted_bias(linear.bias, shift)) is not None:
        _set_bias(graph, linear, spec, moved.astype(np.float32))
    linear.replace_weight(graph, f"{spec.path}.weight_folded", folded)


def _set_bias(
    graph: ir.Graph, linear: GraphLinear, spec: LinearSpec, bias: NDArray[np.float32]
) -> None:
    _check_finite(bias, f"{spec.path} (bias)")
    linear.set_bias(graph, f"{spec.path}.bias_folded", bias)


def _check_finite(values: NDArray[np.float32], where: str) -> None:
    if not np.isfinite(values).all():
        raise PlanError(
            f"{where}: the folded weight leaves the range of float32 (largest finite 3.4e38). "
            "The adapter's values are too large: its training probably diverged."
        )


def _replace_head(graph: ir.Graph, linear: GraphLinear, head: Head) -> None:
    linear.replace_weight(graph, f"{head.path}.weight_folded", head.weight)
    linear.set_bias(graph, f"{head.path}.bias_folded", head.bias)
    classes = head.weight.shape[0]
    for value in {linear.node.outputs[0], linear.output, graph.outputs[0]}:
        if value.shape is not None:
            value.shape = ir.Shape([*value.shape[:-1], classes])
