"""Whether a row of the bank is still its adapter once a graph's type has rounded it.

Of the graphs only float16's cast of a row can lose something: its smallest step is 6e-8, and
bfloat16 reaches as far down as float32. Quantised graphs leave rows as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from hhdeploy.algebra import Array, SiteDelta
from hhdeploy.bundle.layout import Branch, RowLayout
from hhdeploy.choices import Precision
from hhdeploy.errors import CapacityError, abbreviate

# Less than this share of a change that is left is none.
LEAST_LEFT = 0.5


def share_left(change: Array, left: Array) -> float:
    """How much of ``change`` is in ``left``: 1 all of it, 0 none; 1 too where nothing changes.

    It is the projection, so rounding errors that point anywhere count neither for nor against.
    """
    size = float(np.vdot(change, change))
    return float(np.vdot(left, change)) / size if size else 1.0


def lost_in_float16(layout: RowLayout, row: NDArray[np.float32]) -> tuple[list[str], int]:
    """What of a row float16 rounds away: its sites and parts, and how many there are in all."""
    with np.errstate(over="ignore", invalid="ignore"):  # the head's -inf; range is checked apart
        rounded = row.astype(np.float16).astype(np.float32)
    before, after = layout.views(row), layout.views(rounded)
    lost, count = [], 0
    for branch in layout.branches:
        for name, change, left in _changes(branch, before, after):
            size = _inner(change, change)
            count += size > 0.0
            if size > 0.0 and _inner(change, left) < LEAST_LEFT * size:
                lost.append(name)
    return lost, count


def check_row_survives(
    name: str, layout: RowLayout, row: NDArray[np.float32], precisions: Collection[Precision]
) -> str | None:
    """A line about the sites that float16 rounds away, None if there are none.

    Raises:
        CapacityError: it rounds away all that the adapter does to the backbone.
    """
    lost, count = lost_in_float16(layout, row) if "float16" in precisions else ([], 0)
    if not lost:
        return None
    shown = abbreviate(lost)
    if len(lost) == count:
        raise CapacityError(
            f"adapter {name!r}: float16 rounds all of it away (its smallest step is 6e-8): "
            f"{shown}. Use bfloat16, or a bundle without a float16 graph."
        )
    return f"adapter {name!r}: float16 rounds away its change of {shown}"


def _changes(
    branch: Branch, before: dict[str, NDArray[np.float32]], after: dict[str, NDArray[np.float32]]
) -> Iterator[tuple[str, SiteDelta, SiteDelta]]:
    """Site or part, its change, and what is left of it."""
    for index, site in enumerate(branch.sites):
        yield site, _delta(branch, index, before), _delta(branch, index, after)
        for part in branch.extras:
            row = 0 if part == "s_in" else index
            values = [_vector(views[f"{branch.name}/{part}"][row]) for views in (before, after)]
            yield f"{site}.{part}", values[0], values[1]


def _delta(branch: Branch, index: int, views: dict[str, NDArray[np.float32]]) -> SiteDelta:
    diag, right, left_t = (
        views[f"{branch.name}/{part}"][index].astype(np.float64)
        for part in ("diag", "right", "left_t")
    )
    return SiteDelta(diag, left_t.T, right)


def _vector(values: NDArray[np.float32]) -> SiteDelta:
    """A vector as the diagonal of a change."""
    size = values.size
    return SiteDelta(values.astype(np.float64), np.zeros((size, 0)), np.zeros((0, size)))


def _inner(one: SiteDelta, other: SiteDelta) -> float:
    """<one, other>, entry by entry, without the dense matrices."""
    n = one.diag.size
    thin = np.sum((one.left.T @ other.left) * (one.right @ other.right.T))
    mixed = np.einsum("ik,ki,i", one.left[:n], one.right[:, :n], other.diag)
    mixed += np.einsum("ik,ki,i", other.left[:n], other.right[:, :n], one.diag)
    return float(one.diag @ other.diag + thin + mixed)
