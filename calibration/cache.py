"""Calibrations kept on disk, found again only if everything they depend on is the same."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from hhdeploy.caches import Entry, entry_at
from hhdeploy.calibration.scales import SiteScale
from hhdeploy.calibration.scales_file import read_scales, write_scales
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.errors import BundleError
from hhdeploy.files import os_errors, sha256_of, write_json

# Counts changes of this package that make older entries unusable.
_VERSION = 3
_INDEX, _TENSORS = "scales.json", "scales.safetensors"


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


def write(cache: Path, key: str, scales: Mapping[str, SiteScale]) -> None:
    """Store the scales of a graph's sites. Raises `WriteError`."""
    entry = _entry(cache, key)
    with entry.store() as folder:
        with os_errors(entry.path):
            folder.mkdir()
        write_scales(folder / _TENSORS, scales)
        digest = sha256_of(folder / _TENSORS)
        write_json(folder / _INDEX, {"key": key, "sites": list(scales), "sha256": digest})


def read(cache: Path, key: str) -> dict[str, SiteScale] | None:
    """Stored scales; None if there are none.

    Scales that are not, byte for byte, what was stored are not used: `CalibrationCacheWarning`,
    None.
    """
    entry = _entry(cache, key)
    try:
        return entry.read(lambda folder: _checked(folder, key))
    except (OSError, ValueError, KeyError, TypeError, BundleError) as error:
        warnings.warn(
            f"the calibration cached in {entry.path} is damaged ({error}); calibrating again",
            CalibrationCacheWarning,
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
