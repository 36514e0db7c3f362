"""What could only be folded as side branches: dense changes by their closest products.

The one place where an import is not exact, so the adapter says so itself: what it lost of the
logits' range against the original, and where most.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.applying import logits_with, parameters_with, path_of_parameters
from hhdeploy.adapters.config import Compression
from hhdeploy.adapters.format import Adapter, SiteTensors
from hhdeploy.choices import whole
from hhdeploy.errors import AdapterError, abbreviate
from hhdeploy.parity import COMPRESSION_BOUND, compare

if TYPE_CHECKING:
    from hhdeploy.algebra import Array
    from hhdeploy.backbones.spec import Backbone

_IMAGES = 4


def compressed(
    adapter: Adapter, backbone: Backbone, rank: int, accept_error: float | None = None
) -> Adapter:
    """The adapter with every dense change of a Linear as a product of at most ``rank``.

    Args:
        adapter: as imported; one without whole parameters is returned as it is.
        backbone: what it belongs to.
        rank: of every product, at least 1.
        accept_error: share of the logits' range that may be lost; None: `COMPRESSION_BOUND`.

    Raises:
        AdapterError: parameters that no side branch can hold (norms, convolutions), or more lost
            than is accepted.
    """
    rank = whole(rank, "compress_rank", 1)
    if not adapter.values:
        return adapter
    sites, values = dict(adapter.sites), dict(adapter.values)
    lost: dict[str, float] = {}
    for linear in backbone.facts.linears:
        name, _ = path_of_parameters(backbone, linear)
        if name not in values:
            continue
        before: Array = backbone.model.get_parameter(name).detach().double().cpu().numpy()
        parts = np.split(values.pop(name).astype(np.float64) - before, len(linear.sites))
        for site, delta in zip(linear.sites, parts, strict=True):
            a, b = truncated(delta, rank)
            size = float(np.linalg.norm(delta))
            lost[site.name] = float(np.linalg.norm(delta - b @ a)) / size if size else 0.0
            own = sites.get(site.name, SiteTensors())
            sites[site.name] = replace(
                own, lora_A=a.astype(np.float32), lora_B=b.astype(np.float32)
            )
    if values:
        raise AdapterError(
            f"{adapter.source}: {abbreviate(values, 4)} "
            "cannot be side branches at any rank: only changes of Linears can. Leave "
            "`compress_rank` out and fold the adapter."
        )
    return _judged(adapter, sites, backbone, rank, lost, accept_error)


def truncated(matrix: Array, rank: int) -> tuple[Array, Array]:
    """A (rank, in) and B (out, rank): the closest product of that rank."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[:rank])
    return root[:, None] * vt[:rank], u[:, :rank] * root


def _judged(
    adapter: Adapter,
    sites: dict[str, SiteTensors],
    backbone: Backbone,
    rank: int,
    lost: dict[str, float],
    accept_error: float | None,
) -> Adapter:
    config = adapter.config
    known = dict.fromkeys((*config.target_modules, *lost))
    found = replace(
        adapter,
        sites=sites,
        values={},
        config=replace(config, fold_only=False, target_modules=tuple(known)),
    )
    images = _reference_images(backbone)
    exact, close = (
        logits_with(backbone, parameters_with(backbone, a), images) for a in (adapter, found)
    )
    error, worst = compare(exact, close).range_error, max(lost, key=lambda site: lost[site])
    bound = COMPRESSION_BOUND if accept_error is None else accept_error
    if not error <= bound:
        raise AdapterError(
            f"{adapter.source}: at rank {rank} the logits differ from the original's by "
            f"{error:.1e} of their range (at most {bound:g}), most at {worst}, which loses "
            f"{lost[worst]:.0%} of its change. Raise `compress_rank`, accept it with "
            "`accept_error`, or leave both out and fold the adapter."
        )
    stated = Compression(rank, float(error), worst)
    return replace(found, config=replace(found.config, compressed=stated))


def _reference_images(backbone: Backbone) -> NDArray[np.float32]:
    size = backbone.facts.preprocess.input_size
    return np.random.default_rng(0).standard_normal((_IMAGES, *size)).astype(np.float32)
