"""Activations outside the calibrated ranges, and what one site costs."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from hhdeploy.calibration.judging.range_check import RangeCheck
from hhdeploy.calibration.probe import (
    CpuSession,
    Probe,
    RangeExcess,
    logits_sqnr,
    range_excess,
    site_sqnr,
)
from hhdeploy.calibration.qdq import FORMATS
from hhdeploy.errors import BundleError, DeviceError

SITE = "blocks.1.mlp.fc1"
INT8, FP8 = FORMATS["int8"], FORMATS["fp8"]


def test_calibration_images_stay_inside(side):
    given = (side.path, side.sites(), side.calibration.sites, side.feeds, INT8)
    assert range_excess(*given, tolerance=1.0 + 1e-5) == []


def test_what_leaves_the_range_is_told_worst_first(side):
    scales = dict(side.calibration.sites)
    scales[SITE] = replace(scales[SITE], absmax=scales[SITE].absmax / 4)
    other = "blocks.0.attn.proj"
    scales[other] = replace(scales[other], absmax=scales[other].absmax / 2)
    found = range_excess(side.path, side.sites(), scales, side.feeds, INT8, tolerance=1.1)
    assert [excess.site for excess in found] == [SITE, other]
    assert [excess.ratio for excess in found] == pytest.approx([4.0, 2.0])
    smooth = scales[SITE].smooth
    x = np.concatenate([i[SITE] for i in Probe(side.path, side.sites()).inputs(side.feeds)])
    share = np.mean(np.abs(x * smooth) > scales[SITE].absmax * INT8.reach)
    assert found[0].clipped == pytest.approx(share)
    assert 0.1 < share < 0.9
    assert found[0].to_json()["found"] == pytest.approx(side.calibration.ranges[SITE])


@pytest.mark.parametrize(
    ("share", "advice"), [(0.9, "should serve it as it is"), (1.1, "are clipped")]
)
def test_what_is_negligible_is_not_advised_against(share, advice):
    """On the starter models new images of calibrated adapters clip up to 0.006 % of the values."""
    excess = RangeExcess(SITE, 1.0, 1.1, 1.1, share * 1e-4, 0.0)
    check = RangeCheck("a", "int8", 1, 8, (excess,))
    assert len(check.clipped) == (share > 1)
    assert advice in check.advice()
    assert check.to_json()["inside"] is False, "a little outside is told by the advice"


def test_brighter_images_leave_the_range(side):
    """The first site reads normalised tokens; fc2's inputs grow."""
    feeds = [{**feed, "images": feed["images"] * 30} for feed in side.feeds[:6]]
    found = range_excess(side.path, side.sites(), side.calibration.sites, feeds, INT8)
    assert found
    assert all(excess.ratio > INT8.reach for excess in found)


def test_every_format_clips_from_half_a_step_of_its_own_on(side):
    """1 % past the range INT8 clips; FP8, whose last step is a fourteenth of it, rounds."""
    assert FP8.reach > 1.01 > INT8.reach
    scales = dict(side.calibration.sites)
    scales[SITE] = replace(scales[SITE], absmax=scales[SITE].absmax / 1.01)
    given = (side.path, side.sites(), scales, side.feeds)
    (found,) = range_excess(*given, INT8)
    assert (found.site, found.clipped > 0) == (SITE, True)
    assert range_excess(*given, FP8) == []
    (found,) = range_excess(*given, FP8, tolerance=1.005)
    assert (found.site, found.clipped) == (SITE, 0.0)


@pytest.mark.parametrize("precision", FORMATS)
def test_the_reach_of_a_format_is_what_its_type_rounds_down(precision):
    form = FORMATS[precision]
    within, beyond = form.largest * form.reach * np.array([0.9999, 1.0001], np.float32)
    if form.dtype is ir.DataType.INT8:
        assert (np.rint(within), np.rint(beyond)) == (form.largest, form.largest + 1)
    else:
        dtype = form.dtype.numpy()
        assert within.astype(dtype) == form.largest
        assert np.isnan(beyond.astype(dtype))  # E4M3 has no infinity


def test_what_onnx_runtime_refuses_is_an_error_of_ours(side, tmp_path):
    with pytest.raises(DeviceError, match=r"ONNX Runtime failed in .*model\.onnx: .*images"):
        next(Probe(side.path, side.sites()).inputs([{}]))
    model = ir.load(side.path)
    model.graph.opset_imports[""] = 999
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot load .*model\.onnx: .*999"):
        CpuSession(ir.to_proto(model), side.path)


def test_q_k_and_v_read_one_value(side):
    inputs = next(Probe(side.path, side.sites()).inputs(side.feeds))
    assert list(inputs) == list(side.calibration.sites)
    q, k = (inputs[f"blocks.0.attn.qkv.{part}"] for part in "qk")
    assert q.shape == (17, 48)
    np.testing.assert_array_equal(q, k)
    assert inputs["blocks.0.mlp.fc2"].shape == (17, 192)


def test_site_sqnr_falls_with_the_bits_that_are_left(side):
    scales, feeds = dict(side.calibration.sites), side.feeds[:4]
    fine = site_sqnr(side.path, side.sites(), scales, FORMATS["int8"], feeds)
    weights = site_sqnr(side.path, side.sites(), scales, FORMATS["int8-weights"], feeds)
    assert list(fine) == list(scales)
    assert all(30 < db < 60 for db in fine.values())
    assert weights[SITE] > fine[SITE]
    # Two bits fewer for the input of one site.
    scales[SITE] = replace(scales[SITE], absmax=scales[SITE].absmax * 16)
    coarse = site_sqnr(side.path, side.sites(), scales, FORMATS["int8"], feeds)
    assert coarse[SITE] < fine[SITE] - 6
    del fine[SITE], coarse[SITE]
    assert coarse == fine


def test_weights_that_a_link_of_another_name_leads_to(side, tmp_path):
    """As in a snapshot in the hub's cache, whose links lead to files that are named by hashes."""
    for file in (side.path, side.path.with_name("model.onnx.data")):
        shutil.copy(file, blob := tmp_path / f"blob{file.suffix}")
        (tmp_path / file.name).symlink_to(blob)
    given = (dict(side.calibration.sites), FORMATS["int8"], side.feeds[:2])
    paths = (side.path, tmp_path / "model.onnx")
    one, other = (site_sqnr(path, side.sites(), *given) for path in paths)
    assert one == other
    scales, form, feeds = given
    one, other = (
        logits_sqnr(path, side.classifier, scales, form, feeds, (SITE,)) for path in paths
    )
    assert one == other


def test_logits_sqnr_finds_the_site_that_was_spoilt(side):
    scales, feeds = dict(side.calibration.sites), side.feeds[:6]
    scales[SITE] = replace(scales[SITE], absmax=scales[SITE].absmax / 20)
    asked = (SITE, "blocks.0.mlp.fc1", "blocks.1.attn.qkv.v")
    found = logits_sqnr(side.path, side.classifier, scales, FORMATS["int8"], feeds, asked)
    assert list(found) == list(asked)
    assert min(found, key=lambda name: found[name]) == SITE
    assert all(np.isfinite(db) for db in found.values())
