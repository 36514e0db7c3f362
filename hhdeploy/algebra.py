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
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hhdeploy.files.tensors import ByContent

Array = NDArray[np.float64]
Reflection = Literal["unnormalized", "orthogonal"]
REFLECTIONS: tuple[Reflection, ...] = ("unnormalized", "orthogonal")


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
        along = np.arange(self.diag.size)
        matrix[along, along] += self.diag
        return matrix


@dataclass(frozen=True, eq=False)
class Scales(ByContent):
    """W as diag(s_out) W diag(s_in), float64; None: ones.

    Attributes:
        s_in: (in,), s_out: (out,).
    """

    s_in: Array | None = None
    s_out: Array | None = None

    def of(self, weight: NDArray[np.floating]) -> Array:
        """A weight (out, in), scaled, in float64 and new memory."""
        wide = weight.astype(np.float64)
        if self.s_in is not None:
            wide *= self.s_in
        if self.s_out is not None:
            wide *= self.s_out[:, None]
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
