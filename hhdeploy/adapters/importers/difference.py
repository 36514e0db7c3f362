"""What training made of the parameters, as the parts that an adapter has.

Given a parameter before and after, in float64: a Linear's weight as multiplied rows (s_out) or
columns (s_in) and a product of low rank, its bias as an addition (db), the classifier as a head.
Whatever is none of these is kept as the parameter's new value, which can be folded and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.applying import path_of_parameters, values_of
from hhdeploy.adapters.importers.template import Tensors
from hhdeploy.algebra import Array
from hhdeploy.backbones.sites import LinearSpec
from hhdeploy.errors import AdapterError
from hhdeploy.files.tensors import check_finite

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone

# What is stored is float32: a remainder within the rounding of the new weight is nothing.
_STORED = 2.0**-23
# The remainder of an exact form in float64, of the change and of the weight.
_EXACT = 1e-10
_FLOAT64 = 1e-14
# A product may cost half of the dense one at most; beyond that a fold is the better form.
_LIVE_SHARE = 0.5
# Columns of the random range finder beyond the rank looked for.
_MARGIN = 8
# The fit of multiplied rows beside a product: its rounds at most, of which so many at a time have
# to take a tenth of what is left, and so many are added once it is noise.
_ROUNDS = 300
_PATIENCE = 8
_POLISH = 2
# Rows and columns of the smaller problem that tells the rank first.
_SKETCH = 512


@dataclass(frozen=True, eq=False)
class WeightChange:
    """A weight before and after, (out, in) and float64."""

    before: Array
    after: Array

    @property
    def delta(self) -> Array:
        """What was added."""
        return self.after - self.before

    @property
    def noises(self) -> tuple[float, float]:
        """Root mean squares below which a remainder is nothing: in float64, and as stored."""
        weight = _rms(self.after)
        return _EXACT * _rms(self.delta) + _FLOAT64 * weight, _STORED * weight


def changed_parameters(
    backbone: Backbone,
    after: Mapping[str, Array],
    hints: Mapping[str, Sequence[Array]],
    file: Path,
) -> Tensors:
    """New values of parameters as tensors of an adapter, by the keys of its file.

    Args:
        backbone: the model as it was.
        after: parameter path -> its value now, of the same shape but for the classifier's.
        hints: module path -> matrices; the rows of one that is (r, in) may span those of a product
            of low rank beside multiplied rows; without them such a sum is not recognised.
        file: for messages.

    Returns:
        Tensors of the sites and of the head, and ``<parameter>.value`` for what has no such form.

    Raises:
        AdapterError: a new value is NaN or infinite, of which nothing can be said.
    """
    before = values_of(backbone.model)
    left = {name: value for name, value in after.items() if not _same(before.get(name), value)}
    for name, value in left.items():
        check_finite(value, f"{file}: {name}", AdapterError)
    head = f"{backbone.facts.classifier}."
    tensors = _head(before, left, head)
    for linear in backbone.facts.linears:
        weight, bias = path_of_parameters(backbone, linear)
        if weight in left:
            change = WeightChange(before[weight], left.pop(weight))
            found = _linear(linear, change, hints.get(linear.path, ()))
            tensors |= {f"{weight}.value": change.after} if found is None else found
        if bias in left:
            tensors |= _bias(linear, left.pop(bias) - before[bias])
    return tensors | {f"{name}.value": value for name, value in left.items()}


def low_rank(
    matrix: Array, limit: int, noise: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """A (r, in) and B (out, r) with B A = ``matrix`` but for ``noise`` (root mean square).

    None if that takes a rank above ``limit``. The rank is the least one; the singular values are
    shared between both factors.
    """
    out, into = matrix.shape
    columns = min(limit + _MARGIN, out, into)
    probe = np.random.default_rng(0).standard_normal((into, columns))
    basis, _ = np.linalg.qr(matrix @ probe)
    inner = basis.T @ matrix
    if _rms(matrix - basis @ inner) > noise:
        return None
    u, s, vt = np.linalg.svd(inner, full_matrices=False)
    tails = np.sqrt(np.cumsum((s**2)[::-1])[::-1] / matrix.size)
    rank = max(1, int(np.count_nonzero(tails > noise)))
    if rank > limit:
        return None
    root = np.sqrt(s[:rank])
    return root[:, None] * vt[:rank], (basis @ u[:, :rank]) * root


def _head(before: Mapping[str, Array], left: dict[str, Array], head: str) -> Tensors:
    """The classifier whole, if any of it changed."""
    changed = {name: left.pop(name) for name in list(left) if name.startswith(head)}
    if not changed:
        return {}
    own = {name: value for name, value in before.items() if name.startswith(head)}
    rows = {len(value) for value in changed.values()}
    kept = {name: value for name, value in own.items() if {len(value)} == rows}
    return kept | changed


def _linear(linear: LinearSpec, change: WeightChange, hints: Sequence[Array]) -> Tensors | None:
    """The tensors of a Linear's sites; None if one of them has no live form."""
    for noise in change.noises:
        columns = _scaled_columns(change, noise)
        if columns is not None:
            return {f"{site.name}.s_in": columns for site in linear.sites}
    tensors: Tensors = {}
    for site, before, after in zip(
        linear.sites,
        np.split(change.before, len(linear.sites)),
        np.split(change.after, len(linear.sites)),
        strict=True,
    ):
        part = WeightChange(before, after)
        found = _site(part, hints)
        if found is None:
            return None
        tensors |= {f"{site.name}.{name}": value for name, value in found.items()}
    return tensors


def _site(change: WeightChange, hints: Sequence[Array]) -> Tensors | None:
    """lora_A and lora_B, s_out, or all three; empty without a change."""
    if not change.delta.any():
        return {}
    out, into = change.before.shape
    limit = _limit(out, into)
    for noise in change.noises:
        product = low_rank(change.delta, limit, noise)
        if product is not None:
            return {"lora_A": product[0], "lora_B": product[1]}
        found = _scaled_rows(change, hints, limit, noise)
        if found is not None:
            return found
    return _separated(change, limit, change.noises[1])


def _limit(out: int, into: int) -> int:
    """The largest rank of a product that is stored as one."""
    return max(1, int(_LIVE_SHARE * out * into / (out + into)))


def _scaled_rows(
    change: WeightChange, hints: Sequence[Array], limit: int, noise: float
) -> Tensors | None:
    """after = diag(s_out) before + B A, with the rows of A in the span of a hint, or B A = 0."""
    into = change.before.shape[1]
    spans = [np.zeros((0, into)), *(h for h in hints if h.shape[1] == into and len(h) < into)]
    for span in spans:
        basis = np.linalg.qr(span.T)[0] if len(span) else np.zeros((into, 0))
        before = change.before - (change.before @ basis) @ basis.T
        after = change.after - (change.after @ basis) @ basis.T
        square = np.einsum("ij,ij->i", before, before)
        product = np.einsum("ij,ij->i", before, after)
        scale = np.divide(product, square, out=np.ones_like(square), where=square > 0)
        if _rms(after - scale[:, None] * before) > noise:
            continue
        rest = change.after - scale[:, None] * change.before
        if _rms(rest) <= noise:
            return {"s_out": scale}
        pair = low_rank(rest, limit, noise)
        if pair is not None:
            return {"s_out": scale, "lora_A": pair[0], "lora_B": pair[1]}
    return None


def _separated(change: WeightChange, limit: int, noise: float) -> Tensors | None:
    """after = diag(s_out) before + B A, with nothing known of either: a DoRA that was merged.

    What is stored is verified: the rest beside the scale, in float32, is that product.
    """
    sketch = _sketch(change)
    found = _least_rank(sketch, 1, min(limit, _limit(*sketch.before.shape)), noise)
    if found is None:
        return None
    found = _least_rank(change, found[0], limit, noise)
    if found is None:
        return None
    _, scale = found
    stored = scale.astype(np.float32)
    pair = low_rank(change.after - stored[:, None] * change.before, limit, noise)
    if pair is None:
        return None
    return {"s_out": stored, "lora_A": pair[0], "lora_B": pair[1]}


def _sketch(change: WeightChange) -> WeightChange:
    """Some rows of both weights, their columns mixed at random into fewer: it has the same form, of
    the same rank, and costs little where there is none."""
    random = np.random.default_rng(0)
    out, into = change.before.shape
    rows = random.permutation(out)[:_SKETCH]
    before, after = change.before[rows], change.after[rows]
    if into > _SKETCH:
        mixture = random.standard_normal((into, _SKETCH)) * into**-0.5
        before, after = before @ mixture, after @ mixture
    return WeightChange(before, after)


def _least_rank(
    change: WeightChange, rank: int, limit: int, noise: float
) -> tuple[int, Array] | None:
    """The least rank from ``rank`` to ``limit`` for which `_row_scale` finds a scale, and that:
    doubled until there is one, then halved in."""
    low, high = rank - 1, rank
    while (scale := _row_scale(change, high, noise)) is None:
        if high == limit:
            return None
        low, high = high, min(2 * high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        found = _row_scale(change, middle, noise)
        if found is None:
            low = middle
        else:
            high, scale = middle, found
    return high, scale


def _row_scale(change: WeightChange, rank: int, noise: float) -> Array | None:
    """s (out,) for which after - diag(s) before has this rank but for ``noise``; None if not found.

    Alternating least squares on both unknowns: the span of A by a step of subspace iteration on
    the rest beside the scale, and each row's scale by what that span leaves of the row. A row of
    which it leaves nothing has none, and keeps 1.
    """
    before, after = change.before, change.after
    square, product, target = (
        np.einsum("ij,ij->i", a, b) for a, b in ((before, before), (before, after), (after, after))
    )
    seen = square > before.shape[1] * noise**2
    scale: Array = np.divide(product, square, out=np.ones_like(square), where=seen)
    probe = np.random.default_rng(0).standard_normal((before.shape[1], rank))
    basis, _ = np.linalg.qr(probe)
    errors: list[float] = []
    noiseless = 0
    for _ in range(_ROUNDS):
        image = after @ basis - scale[:, None] * (before @ basis)
        basis, _ = np.linalg.qr(after.T @ image - before.T @ (scale[:, None] * image))
        mine, theirs = before @ basis, after @ basis
        left, shared, rest = (
            whole - np.einsum("ij,ij->i", a, b)
            for whole, a, b in (
                (square, mine, mine), (product, mine, theirs), (target, theirs, theirs)
            )
        )  # fmt: skip
        seen = left > before.shape[1] * noise**2
        scale = np.divide(shared, left, out=np.ones_like(left), where=seen)
        total = float(np.sum(rest - 2 * scale * shared + scale**2 * left))
        errors.append(np.sqrt(max(0.0, total) / before.size))
        noiseless += errors[-1] <= noise
        if noiseless > _POLISH:
            return scale
        if not noiseless and len(errors) > _PATIENCE and errors[-1] > 0.9 * errors[-1 - _PATIENCE]:
            return None
    return None


def _scaled_columns(change: WeightChange, noise: float) -> Array | None:
    """s_in with after = before diag(s_in), None if there is none."""
    square = np.einsum("ij,ij->j", change.before, change.before)
    product = np.einsum("ij,ij->j", change.before, change.after)
    scale = np.divide(product, square, out=np.ones_like(square), where=square > 0)
    return scale if _rms(change.after - change.before * scale) <= noise else None


def _bias(linear: LinearSpec, db: Array) -> Tensors:
    parts = np.split(db, len(linear.sites))
    return {
        f"{site.name}.db": part
        for site, part in zip(linear.sites, parts, strict=True)
        if part.any()
    }


def _same(before: Array | None, after: Array) -> bool:
    return before is not None and before.shape == after.shape and np.array_equal(before, after)


def _rms(matrix: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(matrix)))) if matrix.size else 0.0
