"""Fold one adapter into a base graph: W += delta, or W <- M W and b <- M b; s_in, s_out and db."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.adapters.format import Adapter, Head
from hhdeploy.algebra import (
    Array,
    constant_delta,
    fold_additive,
    fold_sequential,
    folded_bias,
    shifted_bias,
)
from hhdeploy.backbones.sites import LinearSpec, Site
from hhdeploy.errors import PlanError
from hhdeploy.exporters.trace import BaseGraph
from hhdeploy.graph import GraphLinear, drop_unused_initializers, linears_at, linears_by_path


def folded_model(base: BaseGraph, adapter: Adapter) -> ir.Model:
    """A new graph of the backbone with one adapter in its weights; ``base`` is not changed.

    1. Clone the graph (initializers are shared with the base: no weight is copied).
    2. Each adapted Linear gets a new weight, and for the sequential form or db a new bias. Never
       edited in place: the tracer shares equal initializers between layers. The weight is folded
       whenever it is read, so that the folded weights are never all in memory.
    3. The adapter's head, if it has one, replaces the classifier.

    Requires that `hhdeploy.adapters.checks.check` has passed. Folded in float64, cast once.

    Raises:
        PlanError: a folded bias is not finite in float32; reading a weight that is not, so when
            the graph is written.
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
    frozen, bias = linear.weight_as_it_is(), linear.bias
    linear.compute_weight(
        graph,
        f"{spec.path}.weight_folded",
        (spec.out, spec.in_),
        lambda: _folded_weight(frozen(), spec, adapter),
    )
    if (moved := _folded_bias(bias, spec, adapter)) is not None:
        _check_finite(moved, f"{spec.path} (bias)")
        linear.set_bias(graph, f"{spec.path}.bias_folded", moved)


def _parts(spec: LinearSpec) -> Iterator[tuple[Site, slice]]:
    """The sites of a Linear and their rows of its weight."""
    start = 0
    for site in spec.sites:
        yield site, slice(start, start + site.out)
        start += site.out


def _folded_weight(
    weight: NDArray[np.float32], spec: LinearSpec, adapter: Adapter
) -> NDArray[np.float32]:
    """The weight (out, in) with the adapter's sites in it, in the memory order it had."""
    folded = np.empty_like(weight)
    for site, part in _parts(spec):
        if site.name not in adapter.sites:
            folded[part] = weight[part]
            continue
        change = adapter.change(site.name)
        # An overflow in the cast is reported by `_check_finite`, with the site's name.
        with np.errstate(over="ignore"):
            if adapter.form == "additive":
                delta = change.delta or constant_delta(0, site.out, spec.in_)
                fold_additive(weight[part], delta, folded[part], change.scales)
            else:
                transform = change.delta or constant_delta(1, site.out, site.out)
                fold_sequential(weight[part], transform, folded[part], change.scales)
        _check_finite(folded[part], site.name)
    return folded


def _folded_bias(
    bias: NDArray[np.float32] | None, spec: LinearSpec, adapter: Adapter
) -> NDArray[np.float32] | None:
    """The new bias (out,) of a Linear; None where it keeps its own."""
    if adapter.form == "sequential":
        (site,) = spec.sites
        change = adapter.change(site.name)
        transform = change.delta or constant_delta(1, site.out, site.out)
        with np.errstate(over="ignore"):
            return folded_bias(bias, transform, change.db)
    shift: Array | None = None
    for site, part in _parts(spec):
        db = adapter.change(site.name).db if site.name in adapter.sites else None
        if db is not None:
            shift = np.zeros(spec.out) if shift is None else shift
            shift[part] = db
    if shift is None:
        return None
    moved = shifted_bias(bias, shift)
    assert moved is not None
    return moved.astype(np.float32)


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
