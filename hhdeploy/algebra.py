"""The Householder algebra of HTA (arXiv 2410.22952), in NumPy and float64.

Layout is torch's: a weight W is (out, in) and a Linear computes y = W x + b. With
H_x = I - tau_x x xᵀ and D the rectangular diagonal of d, one site adds or multiplies by

    H_u D H_v + lora_B lora_A        (the paper's Eq. 5 to 7, transposed: it writes row vectors)

Everything downstream knows only the canonical form of that matrix, a diagonal plus a thin
product, `SiteDelta`, beside multipliers of the weight's rows and columns and an addition to the
bias, `SiteChange`. Only this module and the adapter reader know u, v, d and tau.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hhdeploy.files.tensors import ByContent

Array = NDArray[np.float64]
Addends = tuple[Array, NDArray[np.floating]]
Reflection = Literal["unnormalized", "orthogonal"]
REFLECTIONS: tuple[Reflection, ...] = ("unnormalized", "orthogonal")

# Rows of a weight that are folded at once: 256 x 768 float64. Fewer take longer.
_BLOCK_BYTES = 3 << 19
# Where types differ NumPy casts so many numbers at a time. Of the 8,192 that it takes by itself
# most have left a processor's nearest cache when they are used: a fold takes 1.4 times as long.
_NUMBERS_AT_A_TIME = 512


@dataclass(frozen=True, eq=False)
class SiteDelta(ByContent):
    """D + left @ right, with D the rectangular diagonal of ``diag``; float64.

    Attributes:
        diag: (min(out, in),)
        left: (out, k)
        right: (k, in)
    """

    diag: Array
    left: Array
    right: Array

    def __post_init__(self) -> None:
        out, k = self.left.shape
        k_right, into = self.right.shape
        if k != k_right or self.diag.shape != (min(out, into),):
            raise ValueError(
                f"inconsistent delta: diag {self.diag.shape}, left {self.left.shape}, "
                f"right {self.right.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """k, the inner size of the thin product."""
        return int(self.left.shape[1])

    @property
    def transposed(self) -> SiteDelta:
        """The delta of the transposed weight."""
        return SiteDelta(self.diag, self.right.T, self.left.T)

    def minus_identity(self) -> SiteDelta:
        """M - I for a square M: what a sequential site adds to the Linear's output."""
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"a sequential delta must be square, found {self.shape}")
        return SiteDelta(self.diag - 1.0, self.left, self.right)

    def times(self, strength: float, *, around_identity: bool) -> SiteDelta:
        """The delta times ``strength``; of a sequential M, I + strength (M - I)."""
        if strength == 1.0:
            return self
        diag = strength * self.diag + ((1.0 - strength) if around_identity else 0.0)
        return SiteDelta(diag, strength * self.left, self.right)

    def dense(self) -> Array:
        """The (out, in) matrix itself: for inspection and tests, never for folding."""
        matrix = self.left @ self.right
        _add_diagonal(matrix, self.diag, 0)
        return matrix


@dataclass(frozen=True, eq=False)
class Scales(ByContent):
    """W as diag(s_out) W diag(s_in), float64; None: ones.

    Attributes:
        s_in: (in,), s_out: (out,).
    """

    s_in: Array | None = None
    s_out: Array | None = None

    @property
    def are_ones(self) -> bool:
        """Whether nothing is scaled."""
        return self.s_in is None and self.s_out is None

    @property
    def transposed(self) -> Scales:
        """The scales of the transposed weight."""
        return Scales(self.s_out, self.s_in)

    def of(
        self,
        weight: NDArray[np.floating],
        rows: slice = slice(None),
        wide: Array | None = None,
    ) -> Array:
        """Some rows of a weight, scaled, in float64: in ``wide``, or in new memory."""
        if wide is None:
            wide = weight[rows].astype(np.float64)
        else:
            wide[:] = weight[rows]
        if self.s_in is not None:
            wide *= self.s_in
        if self.s_out is not None:
            wide *= self.s_out[rows, None]
        return wide


UNSCALED = Scales()


@dataclass(frozen=True, eq=False)
class SiteChange(ByContent):
    """All that an adapter does at one site: y = diag(s_out) W diag(s_in) x + ΔW x + b + db.

    The sequential form then multiplies that by M.

    Attributes:
        delta: ΔW, or M; None: zero, or the identity.
        scales: s_in and s_out.
        db: (out,), float64; None: zeros.
    """

    delta: SiteDelta | None
    scales: Scales = field(default_factory=Scales)
    db: Array | None = None

    def largest(self, *, around_identity: bool) -> float:
        """No value of what is added is larger: of ΔW, or M - I, of s_in - 1, s_out - 1 and db."""
        factors = [s - 1.0 for s in (self.scales.s_in, self.scales.s_out) if s is not None]
        parts = [*factors, *([] if self.db is None else [self.db])]
        product = 0.0
        if self.delta is not None:
            delta = self.delta.minus_identity() if around_identity else self.delta
            parts.append(delta.diag)
            ends = (float(np.max(np.abs(x), initial=0.0)) for x in (delta.left, delta.right))
            product = delta.rank * math.prod(ends)
        return max(product, *(float(np.max(np.abs(part), initial=0.0)) for part in parts), 0.0)


def tau(x: Array, reflection: Reflection) -> float:
    """Coefficient of H = I - tau x xᵀ.

    ``unnormalized``: 1, as the paper's Eq. 3 prints it. ``orthogonal``: 2 / ‖x‖², a true
    reflection; 0 for x = 0 (LAPACK's convention), which makes H the identity.
    """
    if reflection == "unnormalized":
        return 1.0
    if reflection != "orthogonal":
        raise ValueError(f"reflection must be one of {REFLECTIONS}, found {reflection!r}")
    # Scaled by the largest entry: the squared norm of a tiny vector would underflow.
    largest = float(np.max(np.abs(x), initial=0.0))
    if largest == 0.0:
        return 0.0
    scaled = x / largest
    return 2.0 / float(scaled @ scaled) / largest / largest


def householder_delta(
    u: Array, v: Array, d: Array, lora_a: Array, lora_b: Array, reflection: Reflection
) -> SiteDelta:
    """H_u D H_v + lora_B lora_A in canonical form, exactly.

    Args:
        u: (out,) vector of the output-side reflection (the paper's v_right).
        v: (in,) vector of the input-side reflection (the paper's v_left).
        d: (min(out, in),) diagonal.
        lora_a: (r, in); r may be 0.
        lora_b: (out, r).
        reflection: how tau follows from a vector, see `tau`.

    Returns:
        A `SiteDelta` of rank 2 + r: with s = uᵀ D v,
        left = [u, D v, lora_B] and
        right = [-tau_u (Dᵀu)ᵀ + tau_u tau_v s vᵀ ; -tau_v vᵀ ; lora_A].
    """
    out, into, n = u.size, v.size, d.size
    tau_u, tau_v = tau(u, reflection), tau(v, reflection)
    d_v, dt_u = np.zeros(out), np.zeros(into)
    d_v[:n] = d * v[:n]
    dt_u[:n] = d * u[:n]
    s = float(u @ d_v)
    left = np.concatenate([u[:, None], d_v[:, None], lora_b], axis=1)
    right = np.concatenate(
        [(-tau_u * dt_u + tau_u * tau_v * s * v)[None, :], (-tau_v * v)[None, :], lora_a], axis=0
    )
    return SiteDelta(np.asarray(d, np.float64), left, right)


def low_rank_delta(lora_a: Array, lora_b: Array) -> SiteDelta:
    """lora_B lora_A alone: the delta of LoRA, and of a site without u, v and d."""
    return SiteDelta(np.zeros(min(lora_b.shape[0], lora_a.shape[1])), lora_b, lora_a)


def constant_delta(diagonal: float, out: int, into: int) -> SiteDelta:
    """``diagonal`` times the rectangular identity, of rank 0: 0 changes nothing, 1 is M = I."""
    return SiteDelta(
        np.full(min(out, into), float(diagonal)), np.zeros((out, 0)), np.zeros((0, into))
    )


def fold_additive(
    weight: NDArray[np.float32],
    delta: SiteDelta,
    out: NDArray[np.float32] | None = None,
    scales: Scales = UNSCALED,
) -> NDArray[np.float32]:
    """W + delta, computed in float64 and cast once to float32 (paper Eq. 6).

    Cost O(out·in·k): one thin product, never a dense H.

    Args:
        weight: (out, in), of any strides: a transposed view (the layout of an ONNX MatMul) or a
            slice of a fused qkv is folded along its memory order.
        delta: what to add.
        out: where to put the result, same shape; None allocates.
        scales: of W, before delta is added.
    """
    if weight.shape != delta.shape:
        raise ValueError(f"weight {weight.shape} and delta {delta.shape} differ in shape")
    if out is None:
        out = np.empty_like(weight)
    if weight.strides[0] < weight.strides[1]:
        fold_additive(weight.T, delta.transposed, out.T, scales.transposed)
        return out
    left, right, diag = delta.left, np.ascontiguousarray(delta.right), delta.diag

    def addends(rows: slice, wide: Array, spare: Array) -> Addends:
        np.matmul(left[rows], right, out=wide)
        _add_diagonal(wide, diag[rows], rows.start)
        return wide, weight[rows] if scales.are_ones else scales.of(weight, rows, spare)

    _by_blocks(addends, out)
    return out


def fold_sequential(
    weight: NDArray[np.float32],
    transform: SiteDelta,
    out: NDArray[np.float32] | None = None,
    scales: Scales = UNSCALED,
) -> NDArray[np.float32]:
    """M W, computed in float64 and cast once (paper Eq. 7); the bias goes through M as well, see
    `folded_bias`.

    Arguments as those of `fold_additive`; ``transform`` is M itself, not M - I, and ``scales`` are
    those of W before it.
    """
    if out is None:
        out = np.empty_like(weight)
    diag, left, right = transform.diag, transform.left, transform.right
    if weight.strides[0] < weight.strides[1]:
        turned, turned_scales = weight.T, scales.transposed
        left_t, right_t = np.ascontiguousarray(left.T), np.ascontiguousarray(right.T)

        def addends_by_columns(rows: slice, wide: Array, spare: Array) -> Addends:
            scaled = turned_scales.of(turned, rows, spare)
            np.matmul(scaled @ right_t, left_t, out=wide)
            scaled *= diag
            return wide, scaled

        _by_blocks(addends_by_columns, out.T)
        return out
    low = np.zeros((transform.rank, weight.shape[1]))
    for rows, _, spare in _blocks(*weight.shape):
        low += right[:, rows] @ scales.of(weight, rows, spare)

    def addends(rows: slice, wide: Array, spare: Array) -> Addends:
        np.matmul(left[rows], low, out=wide)
        scaled = scales.of(weight, rows, spare)
        scaled *= diag[rows, None]
        return wide, scaled

    _by_blocks(addends, out)
    return out


def _by_blocks(addends: Callable[[slice, Array, Array], Addends], out: NDArray[np.float32]) -> None:
    """Fill ``out`` with the sums of ``addends(rows, wide, spare)``, in float64 and cast once; the
    latter two are matrices to work in."""
    with _casting_in_small_pieces():
        for rows, wide, spare in _blocks(*out.shape):
            first, second = addends(rows, wide, spare)
            np.add(first, second, out=out[rows], dtype=np.float64, casting="same_kind")


@contextmanager
def _casting_in_small_pieces() -> Iterator[None]:
    """`_NUMBERS_AT_A_TIME`, in this thread."""
    usual = np.setbufsize(_NUMBERS_AT_A_TIME)
    try:
        yield
    finally:
        np.setbufsize(usual)


def _blocks(count: int, width: int) -> Iterator[tuple[slice, Array, Array]]:
    """The rows of a matrix in slices of about `_BLOCK_BYTES` in float64, so that these stay in a
    processor's cache; with two matrices of a block's shape to work in, the same ones every time,
    since new memory takes longer to get than to fill."""
    step = min(count, max(1, _BLOCK_BYTES // (8 * max(1, width))))
    wide, spare = np.empty((2, step, width))
    for first in range(0, count, step):
        size = min(step, count - first)
        yield slice(first, first + size), wide[:size], spare[:size]


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


def effective_rank(delta: SiteDelta) -> float:
    """exp of the entropy of the normalised singular values of D + left @ right.

    Between 1 (one direction) and min(out, in) (all directions alike); 0 for a zero delta.
    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    return entropy_rank(singular_values(delta))


def singular_values(delta: SiteDelta) -> Array:
    """Of D + left @ right, the largest first."""
    return np.asarray(np.linalg.svd(delta.dense(), compute_uv=False), np.float64)


def entropy_rank(singular: Array) -> float:
    """exp of the entropy of normalised singular values, 0 where all are zero."""
    total = float(singular.sum())
    if total == 0.0:
        return 0.0
    share = singular[singular > 0.0] / total
    return float(np.exp(-np.sum(share * np.log(share))))


def logit_change(after: NDArray[np.floating], before: NDArray[np.floating]) -> Array:
    """after - before; 0 where both are -inf, as the logit of a class that a model rules out is."""
    same = np.isneginf(after) & np.isneginf(before)
    change: Array = np.zeros(same.shape)
    np.subtract(after, before, out=change, where=~same, dtype=np.float64)
    return change


def logit_range(logits: NDArray[np.floating]) -> float:
    """The largest less the least of those that are not -inf; 0 where there are none."""
    kept = logits[~np.isneginf(logits)]
    return float(np.ptp(kept)) if kept.size else 0.0


def _add_diagonal(matrix: Array, diag: Array, first: int) -> None:
    """matrix[i, first + i] += diag[i], in place, for a C-contiguous matrix; cut to what fits."""
    columns = matrix.shape[1]
    n = max(0, min(matrix.shape[0], columns - first, diag.size))
    matrix.reshape(-1)[first : first + n * (columns + 1) : columns + 1][:n] += diag[:n]
