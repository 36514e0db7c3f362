"""What a calibration found, as a value, as a file and in the cache.

Scales belong to the float32 graph and the data alone: every precision and every set of excluded
sites is written from the same ones, without running the images again. A bundle keeps them, so
that later adapters can be checked; the cache finds them again only if everything that they
depend on is the same.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.errors import BundleError
from hhdeploy.files.caches import CacheWarning, Entry, entry_at
from hhdeploy.files.tensors import ByContent, read_tensors, write_tensors
from hhdeploy.files.writing import sha256_of, write_json

# Counts changes of this package that make older entries unusable.
_VERSION = 3
_INDEX, _TENSORS = "scales.json", "scales.safetensors"


@dataclass(frozen=True, eq=False)
class SiteScale(ByContent):
    """What is known about one site.

    The quantised product is ``Q(x ∘ smooth) (W / smooth)`` with x [..., in] and W [in, out].

    Attributes:
        absmax: the calibrated range of ``x ∘ smooth`` is [-absmax, absmax].
        smooth: SmoothQuant's factors, [in]; None: all ones.
        bias: the corrected bias, [out]; None: the graph's own stays.
    """

    absmax: float
    smooth: NDArray[np.float32] | None = None
    bias: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Calibration:
    """The scales of all sites of one float32 graph, and what they were found with.

    Attributes:
        sites: site name -> scales, in execution order.
        graph_sha256: of the graph's files.
        settings: as given; ``precision``, ``exclude`` and ``preset`` have no part in the scales.
        data: description of the images.
        warnings: what may make the scales wrong, in words.
        versions: of what found them.
    """

    sites: Mapping[str, SiteScale]
    graph_sha256: str
    settings: CalibrationSettings
    data: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranges(self) -> dict[str, float]:
        """Site name -> largest magnitude, after smoothing, that the activations may have."""
        return {name: scale.absmax for name, scale in self.sites.items()}


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


def cache_key(
    graph_sha256: str, data_sha256: str, settings: CalibrationSettings, versions: Mapping[str, str]
) -> str:
    """Digest of everything that the scales depend on.

    ``precision``, ``exclude`` and ``preset`` are no part of it, nor are ``images`` and ``seed``:
    the data's own digest says which images came, in which order.
    """
    described = [
        _VERSION,
        graph_sha256,
        data_sha256,
        settings.smooth_quant,
        settings.bias_correction,
        dict(versions),
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def write_cached(cache: Path, key: str, scales: Mapping[str, SiteScale]) -> None:
    """Store the scales of a graph's sites, as `Entry.keep`."""

    def make(folder: Path) -> None:
        folder.mkdir()
        write_scales(folder / _TENSORS, scales)
        digest = sha256_of(folder / _TENSORS)
        write_json(folder / _INDEX, {"key": key, "sites": list(scales), "sha256": digest})

    _entry(cache, key).keep(make)


def read_cached(cache: Path, key: str) -> dict[str, SiteScale] | None:
    """Stored scales; None if there are none.

    Scales that are not, byte for byte, what was stored are not used: `CacheWarning`,
    None.
    """
    entry = _entry(cache, key)
    try:
        return entry.read(lambda folder: _checked(folder, key))
    except (OSError, ValueError, KeyError, TypeError, BundleError) as error:
        warnings.warn(
            f"the calibration cached in {entry.path} is damaged ({error}); calibrating again",
            CacheWarning,
            stacklevel=2,
        )
        return None


def _checked(folder: Path, key: str) -> dict[str, SiteScale]:
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    if index["key"] != key or index["sha256"] != sha256_of(folder / _TENSORS):
        raise ValueError("its files are not the ones that were stored")
    found = read_scales(folder / _TENSORS)
    return {name: found[name] for name in index["sites"]}


def _entry(cache: Path, key: str) -> Entry:
    return entry_at(cache, "calibration", key)
