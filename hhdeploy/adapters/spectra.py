"""What an adapter does at each site, in figures: spectra, ranks, diagonal against low rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hhdeploy.adapters.differing import difference
from hhdeploy.adapters.format import Adapter
from hhdeploy.algebra import Array, entropy_rank, singular_values
from hhdeploy.files.tensors import ByContent


@dataclass(frozen=True, eq=False)
class SiteSpectrum(ByContent):
    """One site's change of its weight; of the sequential form, M - I.

    Attributes:
        site: its name.
        diagonal: magnitudes of d, the largest first; of the sequential form, of d - 1.
        singular: singular values of the whole change, the largest first.
        effective_rank: of them, see `hhdeploy.algebra.effective_rank`.
        diagonal_share: of the squared norms of both parts, the diagonal's; the rest is that of the
            low-rank part, reflections included. None where nothing is changed.
        parameters: trained values.
    """

    site: str
    diagonal: Array
    singular: Array
    effective_rank: float
    diagonal_share: float | None
    parameters: int


def spectra(adapter: Adapter) -> list[SiteSpectrum]:
    """Every site that has a matrix, in the adapter's order. An SVD a site."""
    found = []
    for name, tensors in adapter.sites.items():
        delta = adapter.delta(name)
        if delta is None:
            continue
        if adapter.form == "sequential":
            delta = delta.minus_identity()
        singular = singular_values(delta)
        straight = float(delta.diag @ delta.diag)
        thin = float(np.sum((delta.left.T @ delta.left) * (delta.right @ delta.right.T)))
        both = straight + thin
        found.append(
            SiteSpectrum(
                name,
                np.sort(np.abs(delta.diag))[::-1],
                singular,
                entropy_rank(singular),
                straight / both if both else None,
                tensors.parameters,
            )
        )
    return found


def distance(one: Adapter, other: Adapter) -> float:
    """How far two adapters' changes of the backbone's sites are from each other.

    The norm of the difference over the larger norm, all sites together: 0 for the same, 1.4 for
    changes of one size that have nothing in common. Classifiers and whole parameters do not count.

    Raises:
        AdapterError: the adapters belong to different backbones.
    """
    sites = [
        site
        for site in difference(one, other).sites
        if site.site in one.sites or site.site in other.sites
    ]
    apart = sum((s.distance * max(s.norm_a, s.norm_b)) ** 2 for s in sites) ** 0.5
    larger = max(sum(s.norm_a**2 for s in sites), sum(s.norm_b**2 for s in sites)) ** 0.5
    return apart / larger if larger else 0.0
