"""Calibrations kept on disk, found again only if everything they depend on is the same."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.calibration.data import CalibrationData
from hhdeploy.calibration.scales import Calibration, SiteScale
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.errors import BundleError
from hhdeploy.files import atomic_directory, sha256_of, write_json
from hhdeploy.tensorfile import read_tensors, write_tensors

# Counts changes of this package that make older entries unusable.
_VERSION = 1
_SCALES, _TENSORS = "calibration.json", "calibration.safetensors"


class CalibrationCacheWarning(UserWarning):
    """An entry of the cache was damaged; it is computed again."""


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


def write(cache: Path, key: str, calibration: Calibration) -> None:
    """Store a calibration. Raises `WriteError`."""
    tensors: dict[str, NDArray[Any]] = {}
    for name, scale in calibration.sites.items():
        tensors[f"{name}/absmax"] = np.asarray([scale.absmax], np.float64)
        if scale.smooth is not None:
            tensors[f"{name}/smooth"] = scale.smooth
        if scale.bias is not None:
            tensors[f"{name}/bias"] = scale.bias
    with atomic_directory(cache / "calibration" / key, overwrite=True) as scratch:
        write_tensors(scratch / _TENSORS, tensors)
        content = {
            "key": key,
            "sites": list(calibration.sites),
            "graph_sha256": calibration.graph_sha256,
            "versions": dict(calibration.versions),
            "tensors_sha256": sha256_of(scratch / _TENSORS),
        }
        write_json(scratch / _SCALES, content)


def read(
    cache: Path, key: str, settings: CalibrationSettings, data: CalibrationData
) -> Calibration | None:
    """A stored calibration; None if there is none.

    One that is not, byte for byte, what was stored is not used: `CalibrationCacheWarning`, None.
    """
    entry = cache / "calibration" / key
    if not entry.exists():
        return None
    try:
        content = json.loads((entry / _SCALES).read_text(encoding="utf-8"))
        if content["key"] != key or content["tensors_sha256"] != sha256_of(entry / _TENSORS):
            raise ValueError("its files are not the ones that were stored")
        tensors, _ = read_tensors(entry / _TENSORS, BundleError)
        sites = {
            name: SiteScale(
                float(tensors[f"{name}/absmax"][0]),
                tensors.get(f"{name}/smooth"),
                tensors.get(f"{name}/bias"),
            )
            for name in content["sites"]
        }
        return Calibration(
            sites,
            content["graph_sha256"],
            settings,
            data.description,
            data.warnings,
            content["versions"],
        )
    except (OSError, ValueError, KeyError, TypeError, BundleError) as error:
        warnings.warn(
            f"the calibration cached in {entry} is damaged ({error}); calibrating again",
            CalibrationCacheWarning,
            stacklevel=2,
        )
        return None
