"""A calibration's scales as a file: of its bundle, so that later adapters can be checked, and of
the cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.calibration.scales import SiteScale
from hhdeploy.errors import BundleError
from hhdeploy.files.tensors import read_tensors, write_tensors


def write_scales(path: Path, scales: Mapping[str, SiteScale]) -> None:
    """Write ``<site>/absmax``, ``<site>/smooth`` and ``<site>/bias``. Raises `WriteError`."""
    tensors: dict[str, NDArray[Any]] = {}
    for name, scale in scales.items():
        tensors[f"{name}/absmax"] = np.asarray([scale.absmax], np.float64)
        if scale.smooth is not None:
            tensors[f"{name}/smooth"] = scale.smooth
        if scale.bias is not None:
            tensors[f"{name}/bias"] = scale.bias
    write_tensors(path, tensors)


def read_scales(path: Path) -> dict[str, SiteScale]:
    """The scales of every site, by name. Raises `BundleError`."""
    tensors, _ = read_tensors(path, BundleError)
    sites = [key.rpartition("/")[0] for key in tensors if key.endswith("/absmax")]
    return {
        name: SiteScale(
            float(tensors[f"{name}/absmax"][0]),
            tensors.get(f"{name}/smooth"),
            tensors.get(f"{name}/bias"),
        )
        for name in sites
    }
