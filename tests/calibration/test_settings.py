"""What a calibration can be asked for, and which sites it then leaves alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hhdeploy.calibration.settings import CalibrationSettings, excluded_sites
from hhdeploy.errors import PlanError

SITES = tuple(f"blocks.{n}.{site}" for n in range(3) for site in ("attn.qkv", "mlp.fc2"))


def test_settings_survive_json():
    settings = CalibrationSettings("fp8", ("a.*", "b"), "robust", 7, 3, None, False)
    assert CalibrationSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_numpy_s_numbers_survive_json_too():
    """They were written once everything had been calibrated and judged."""
    for alpha in (0.0, 0.5, 1.0):
        settings = CalibrationSettings(smooth_quant=np.float32(alpha), images=np.int64(7))
        told = json.loads(json.dumps(settings.to_json()))
        assert CalibrationSettings.from_json(told) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "int4"}, "`precision='int4'`: expected one of int8, fp8, int8-weights"),
        ({"preset": "safe"}, "`preset='safe'`: expected one of none, robust"),
        ({"images": 0}, "`images`: expected 1 or more"),
        ({"smooth_quant": 1.5}, "`smooth_quant`: expected a number from 0 to 1"),
        ({"smooth_quant": "0.5"}, "`smooth_quant`: expected a number from 0 to 1"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(PlanError, match=message):
        CalibrationSettings(**values)


def test_nothing_is_excluded_by_default():
    assert excluded_sites(CalibrationSettings(), SITES) == frozenset()


def test_names_and_patterns():
    settings = CalibrationSettings(exclude=("blocks.1.attn.qkv", "*.fc2"))
    assert excluded_sites(settings, SITES) == {SITES[2], SITES[1], SITES[3], SITES[5]}


def test_robust_keeps_the_first_and_the_last_block():
    robust = CalibrationSettings(preset="robust")
    assert excluded_sites(robust, SITES) == {*SITES[:2], *SITES[4:]}
    stages = ("layers.0.blocks.0.a", "layers.0.blocks.1.a", "layers.1.blocks.0.a", "layers.1.up@1")
    assert excluded_sites(robust, stages) == {stages[0], stages[3]}


def test_a_preset_and_patterns_add_up():
    settings = CalibrationSettings(preset="robust", exclude=("*.1.mlp.*",))
    assert set(SITES) - excluded_sites(settings, SITES) == {SITES[2]}


def test_a_pattern_that_fits_nothing_is_refused():
    with pytest.raises(
        PlanError, match=r"`exclude=\['blocks.1.fc2'\]` fits no site.*blocks.0.attn.qkv"
    ):
        excluded_sites(CalibrationSettings(exclude=("*.fc2", "blocks.1.fc2")), SITES)


def test_excluding_everything_is_refused():
    with pytest.raises(PlanError, match=r"all 6 sites are kept .* or `exclude` fewer"):
        excluded_sites(CalibrationSettings(exclude=("*",)), SITES)
    with pytest.raises(PlanError, match=r"all 4 sites are kept .* or take `preset='none'`"):
        excluded_sites(CalibrationSettings(preset="robust"), (*SITES[:2], *SITES[4:]))
