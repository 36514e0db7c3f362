"""Fold one adapter into a base graph: W += delta, or W <- M W and b <- M b; s_in, s_out and db."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hhdeploy.adapters.format import Adapter, Head
from hhdeploy.algebra import UNSCALED, Array, Scales, SiteDelta, constant_delta
from hhdeploy.backbones.sites import LinearSpec, Site
from hhdeploy.errors import PlanError
from hhdeploy.exporters.trace import BaseGraph
from hhdeploy.graph import GraphLinear, drop_unused_initializers, linears_at, linears_by_path

if TYPE_CHECKING:
    import torch

# Up to this rank the weight is passed over once for each column, which takes as long in every
# process: a BLAS with threads is much slower with matrices this thin, in some of them.
_FEW = 4


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
    scratch = Scratch()
    for spec in base.facts.linears:
        if any(site.name in adapter.sites for site in spec.sites):
            for linear in linears_at(by_path, spec.path):
                _fold_linear(model.graph, linear, spec, adapter, scratch)
    if adapter.head is not None:
        for linear in linears_at(by_path, base.facts.classifier):
            _replace_head(model.graph, linear, adapter.head)
    drop_unused_initializers(model.graph)
    return model


class Scratch:
    """Float64 memory for one fold after another, so that only the first waits for its pages.

    What `like` gave before is overwritten. Not for two threads at once.
    """

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def like(self, weight: NDArray[np.float32]) -> torch.Tensor:
        """Of the weight's shape (out, in) and in its memory order; it holds anything."""
        import torch

        if self._memory is None or self._memory.numel() < weight.size:
            # PyTorch's memory starts where a line of the cache does, NumPy's does not.
            self._memory = torch.empty(weight.size, dtype=torch.float64)
        memory, (out, in_) = self._memory[: weight.size], weight.shape
        by_column = weight.strides[0] < weight.strides[1]  # the layout of an ONNX MatMul
        return memory.view(in_, out).T if by_column else memory.view(out, in_)


def _fold_linear(
    graph: ir.Graph, linear: GraphLinear, spec: LinearSpec, adapter: Adapter, scratch: Scratch
) -> None:
    frozen, bias = linear.weight_as_it_is(), linear.bias
    linear.compute_weight(
        graph,
        f"{spec.path}.weight_folded",
        (spec.out, spec.in_),
        lambda: _folded_weight(frozen(), spec, adapter, scratch),
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
    weight: NDArray[np.float32], spec: LinearSpec, adapter: Adapter, scratch: Scratch
) -> NDArray[np.float32]:
    """The weight (out, in) with the adapter's sites in it, in the memory order it had."""
    folded = np.empty_like(weight)
    for site, part in _parts(spec):
        if site.name not in adapter.sites:
            folded[part] = weight[part]
            continue
        change = adapter.change(site.name)
        if adapter.form == "additive":
            delta = change.delta or constant_delta(0, site.out, spec.in_)
            fold_additive(weight[part], delta, folded[part], change.scales, scratch)
        else:
            transform = change.delta or constant_delta(1, site.out, site.out)
            fold_sequential(weight[part], transform, folded[part], change.scales, scratch)
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


def fold_additive(
    weight: NDArray[np.float32],
    delta: SiteDelta,
    out: NDArray[np.float32] | None = None,
    scales: Scales = UNSCALED,
    scratch: Scratch | None = None,
) -> NDArray[np.float32]:
    """W + delta, computed in float64 and cast once to float32 (paper Eq. 6).

    Cost O(out·in·k): one thin product, never a dense H. By PyTorch, as `fold_sequential`: it casts
    and adds with the threads that it is given, where NumPy has one.

    Args:
        weight: (out, in), of any strides: a transposed view (the layout of an ONNX MatMul) or a
            slice of a fused qkv is folded along its memory order.
        delta: what to add.
        out: where to put the result, same shape; None allocates.
        scales: of W, before delta is added.
        scratch: memory to compute in; None allocates.
    """
    if weight.shape != delta.shape:
        raise ValueError(f"weight {weight.shape} and delta {delta.shape} differ in shape")
    wide = _scaled(weight, scales, scratch)
    add_product(wide, _tensor(delta.left), _tensor(delta.right))
    wide.diagonal().add_(_tensor(delta.diag))
    return _cast(wide, np.empty_like(weight) if out is None else out)


def fold_sequential(
    weight: NDArray[np.float32],
    transform: SiteDelta,
    out: NDArray[np.float32] | None = None,
    scales: Scales = UNSCALED,
    scratch: Scratch | None = None,
) -> NDArray[np.float32]:
    """M W, computed in float64 and cast once (paper Eq. 7); the bias goes through M as well, see
    `folded_bias`.

    Arguments as those of `fold_additive`; ``transform`` is M itself, not M - I, and ``scales`` are
    those of W before it.
    """
    wide = _scaled(weight, scales, scratch)
    low = _tensor(transform.right) @ wide
    wide.mul_(_tensor(transform.diag)[:, None])
    add_product(wide, _tensor(transform.left), low)
    return _cast(wide, np.empty_like(weight) if out is None else out)


def _scaled(weight: NDArray[np.float32], scales: Scales, scratch: Scratch | None) -> torch.Tensor:
    """diag(s_out) W diag(s_in) in float64, in W's memory order."""
    wide = (scratch or Scratch()).like(weight).copy_(_tensor(weight))
    if scales.s_in is not None:
        wide.mul_(_tensor(scales.s_in))
    if scales.s_out is not None:
        wide.mul_(_tensor(scales.s_out)[:, None])
    return wide


def add_product(wide: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """wide += left @ right, in place."""
    if left.shape[1] > _FEW:
        wide.addmm_(left, right)
        return
    for column, row in zip(left.T, right, strict=True):
        wide.addcmul_(column[:, None], row)


def _cast(wide: torch.Tensor, out: NDArray[np.float32]) -> NDArray[np.float32]:
    """``out``, filled; what float32 does not reach is infinite."""
    import torch

    torch.from_numpy(out).copy_(wide)
    return out


def _tensor(array: NDArray[np.floating]) -> torch.Tensor:
    """A view; a copy of what may not be written, which PyTorch has no tensors for."""
    import torch

    return torch.from_numpy(array if array.flags.writeable else array.copy())


def folded_bias(
    bias: NDArray[np.float32] | None, transform: SiteDelta, db: Array | None = None
) -> NDArray[np.float32] | None:
    """b -> M (b + db), computed in float64 and cast once (paper Eq. 7).

    The adapter acts on the Linear's output. A Linear without a bias stays without one (M 0 = 0)
    unless ``db`` gives it one.
    """
    b = shifted_bias(bias, db)
    if b is None:
        return None
    moved: Array = transform.diag * b + transform.left @ (transform.right @ b)
    return moved.astype(np.float32)


def shifted_bias(bias: NDArray[np.float32] | None, db: Array | None) -> Array | None:
    """b + db in float64, None where there is neither."""
    if bias is None or db is None:
        return db if bias is None else bias.astype(np.float64)
    total: Array = bias.astype(np.float64) + db
    return total
