"""Calibrations are found again only if everything they depend on is the same."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hhdeploy.calibration import quantised as module
from hhdeploy.calibration import scales as stored
from hhdeploy.calibration.quantised import find_scales
from hhdeploy.calibration.scales import (
    SiteScale,
    cache_key,
    read_cached,
    write_cached,
)
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.files.caches import CacheWarning, clear, stored_in
from tests.workshop import flip_byte

SETTINGS = CalibrationSettings()
KEY = "c0ffee" + 26 * "0"
SCALES = {
    "b": SiteScale(1.5, np.asarray([1, 2], np.float32), np.asarray([3], np.float32)),
    "a": SiteScale(0.1),
}


def entry(cache: Path) -> Path:
    (found,) = (cache / "calibration").iterdir()
    return found


def test_scales_come_back_in_order_and_to_the_bit(tmp_path):
    assert read_cached(tmp_path, KEY) is None
    write_cached(tmp_path, KEY, SCALES)
    found = read_cached(tmp_path, KEY)
    assert found is not None
    assert list(found) == ["b", "a"]
    assert (found["b"].absmax, found["a"].absmax) == (1.5, 0.1)
    np.testing.assert_array_equal(found["b"].smooth, SCALES["b"].smooth)
    np.testing.assert_array_equal(found["b"].bias, SCALES["b"].bias)
    assert found["a"].smooth is None


@pytest.mark.parametrize("name", ["scales.safetensors", "scales.json"])
@pytest.mark.parametrize("damage", ["flipped", "gone", "cut"])
def test_damage_is_told_and_not_used(tmp_path, name, damage):
    write_cached(tmp_path, KEY, SCALES)
    path = entry(tmp_path) / name
    if damage == "flipped":
        flip_byte(path, len(path.read_bytes()) // 2)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(CacheWarning, match="is damaged .* calibrating again"):
        assert read_cached(tmp_path, KEY) is None


def test_an_entry_under_another_key_is_not_used(tmp_path):
    write_cached(tmp_path, KEY, SCALES)
    other = KEY[::-1]
    entry(tmp_path).rename(tmp_path / "calibration" / other)
    with pytest.warns(CacheWarning, match="not the ones that were stored"):
        assert read_cached(tmp_path, other) is None


def test_one_that_vanishes_while_it_is_read_is_none_and_no_damage(tmp_path, monkeypatch):
    write_cached(tmp_path, KEY, SCALES)
    monkeypatch.setattr(stored, "sha256_of", lambda path: clear(tmp_path) and "gone")
    assert read_cached(tmp_path, KEY) is None


def test_a_full_disk_takes_no_calibration_back(side, tmp_path, monkeypatch):
    """Hours of it may be behind; only the next time is slower."""

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(module, "calibrate_int8", lambda *arguments: SCALES)
    with pytest.warns(CacheWarning, match=r"is used, and not kept.*disk is full.*HHDEPLOY_CACHE"):
        found = find_scales(side.graph, side.data, SETTINGS, cache=tmp_path)
    assert found.sites is SCALES
    assert list((tmp_path / "calibration").iterdir()) == []


def test_calibrations_used_longest_ago_make_room(tmp_path, monkeypatch):
    keys = [character + KEY[1:] for character in "abc"]
    write_cached(tmp_path, keys[0], SCALES)
    (first,) = stored_in(tmp_path)
    monkeypatch.setenv("HHDEPLOY_CACHE_LIMIT", str(2 * first.size))
    write_cached(tmp_path, keys[1], SCALES)
    for age, key in enumerate(keys[:2]):
        os.utime(tmp_path / "calibration" / key, (age, age))
    assert read_cached(tmp_path, keys[0]) is not None  # used now
    write_cached(tmp_path, keys[2], SCALES)
    assert {e.path.name for e in stored_in(tmp_path)} == {keys[0], keys[2]}


def test_the_key_sees_what_matters_and_nothing_else():
    def key(graph="g", data="d", version="1", **changes):
        return cache_key(graph, data, replace(SETTINGS, **changes), {"nncf": version})

    same = {key(), key(precision="fp8"), key(exclude=("a",)), key(preset="robust")}
    assert len(same) == 1
    other = [
        key(graph="h"),
        key(data="e"),
        key(version="2"),
        key(smooth_quant=None),
        key(bias_correction=False),
    ]
    assert len({*same, *other}) == 6


def test_a_second_calibration_runs_no_image(side, tmp_path, monkeypatch):
    runs = []

    def counted(*arguments):
        runs.append(arguments)
        return dict(side.calibration.sites)

    monkeypatch.setattr(module, "calibrate_int8", counted)
    first = find_scales(side.graph, side.data, SETTINGS, cache=tmp_path)
    second = find_scales(side.graph, side.data, replace(SETTINGS, precision="fp8"), cache=tmp_path)
    assert len(runs) == 1
    assert list(second.sites) == list(first.sites) == list(side.calibration.sites)
    assert second.ranges == first.ranges
    assert second.settings.precision == "fp8"
    flip_byte(entry(tmp_path) / "scales.safetensors")
    with pytest.warns(CacheWarning):
        find_scales(side.graph, side.data, SETTINGS, cache=tmp_path)
    assert len(runs) == 2
    find_scales(side.graph, side.data, SETTINGS)
    assert len(runs) == 3


def test_a_site_without_a_range_is_told_and_stays_float(side, monkeypatch):
    scales = dict(side.calibration.sites)
    del scales["blocks.0.mlp.fc1"]
    monkeypatch.setattr(module, "calibrate_int8", lambda *arguments: scales)
    found = find_scales(side.graph, side.data, SETTINGS)
    assert any("blocks.0.mlp.fc1: NNCF found no range" in warning for warning in found.warnings)
    result = module.quantise(side.graph, found, SETTINGS)
    kept = [name for name, info in result.sites.items() if not info.quantised]
    assert kept == ["blocks.0.mlp.fc1"]
    assert result.warnings == found.warnings
