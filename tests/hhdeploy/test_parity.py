"""The comparison and its table: figures against values computed by hand, and what must fail."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from hhdeploy.adapters.config import LABELS, VALUES
from hhdeploy.parity import PARITY, Bound, ParityReport, StageResult, bound, compare

INF = np.inf
TIGHT = Bound(1e-3, 0.999, 1.0, "", "")


def logits(images=5, classes=7, seed=0):
    return np.random.default_rng(seed).standard_normal((images, classes))


def test_figures_by_hand():
    reference = np.array([[1.0, -2.0, 2.0], [0.0, 3.0, -1.0]])
    found = np.array([[1.0, -2.0, 2.5], [0.0, 3.0, -1.0]])
    c = compare(reference, found)
    assert (c.images, c.worst_image, c.top1) == (2, 0, 1.0)
    assert c.max_abs == 0.5
    assert c.range_error == 0.5 / 5.0
    assert c.max_rel == 0.5 / 2.0
    assert math.isclose(c.cosine, 10.0 / (3.0 * math.sqrt(11.25)))
    assert math.isclose(c.sqnr_db, 10 * math.log10(19.0 / 0.25))


def test_equal_logits_have_no_error_at_all():
    c = compare(logits(), logits())
    assert (c.max_abs, c.range_error, c.max_rel, c.cosine, c.top1) == (0.0, 0.0, 0.0, 1.0, 1.0)
    assert c.sqnr_db == INF
    assert not c.failures(Bound(0.0, 1.0, 1.0, "", ""))


def test_the_worst_image_and_top1():
    found = logits()
    found[3] = found[3][::-1]
    c = compare(logits(), found)
    assert (c.worst_image, c.top1) == (3, 0.8)
    assert len(c.failures(TIGHT)) == 3


# Four images of a range of 10; the reference answers class 0, class 1 is `margin` behind.
def duel(margin):
    reference = np.tile([5.0, 5.0 - margin, -5.0], (4, 1))
    reference[1:, 1] = 0.0
    return reference


HALF = Bound(2e-2, 0.999, 0.995, "", "")


@pytest.mark.parametrize("margin", [1e-3, 0.1, 0.199])
def test_a_near_tie_is_no_lost_answer(margin):
    """One image of four that one allowed error turns: a quarter of top-1, and a good export."""
    reference = duel(margin)
    found = reference.copy()
    found[0, 1] = 5.0 + 1e-6
    c = compare(reference, found)
    assert c.top1 == 0.75
    assert c.lost_margins == pytest.approx([margin / 10])
    assert c.near_ties(HALF) == 1
    assert not c.failures(HALF)


def test_a_clear_answer_that_is_lost_counts():
    """Two errors that the bound allows, one up and one down, turn a margin of 1.5 bounds."""
    reference = duel(0.3)
    found = reference.copy()
    found[0, :2] = 4.84, 4.86
    c = compare(reference, found)
    assert c.range_error < HALF.range_error
    assert (c.top1, c.near_ties(HALF)) == (0.75, 0)
    (failure,) = c.failures(HALF)
    assert failure.startswith("top-1 agreement 75.00% (at least 99.50%")


def test_labels_have_no_top1_and_values_no_direction_either():
    reference, found = logits(classes=3), logits(classes=3)
    found[2] = np.roll(found[2], 1)  # another arg max, and another direction
    assert compare(reference, found).top1 == 0.8
    labels, values = (compare(reference, found, kind) for kind in (LABELS, VALUES))
    assert labels.top1 is None and values.top1 is None
    assert labels.cosine == compare(reference, found).cosine < 0.9
    assert values.cosine is None
    assert (len(labels.failures(TIGHT)), len(values.failures(TIGHT))) == (2, 1)
    assert values.range_error == labels.range_error > 0.01
    content = json.loads(json.dumps(values.to_json()))
    assert (content["top1"], content["cosine"]) == (None, None)
    broken = compare(reference, np.full_like(found, np.nan), VALUES)
    assert (broken.range_error, broken.top1, broken.cosine) == (INF, None, None)
    assert broken.failures(TIGHT)


def test_one_value_is_judged_by_the_range_of_all_images():
    """Its cosine is its sign: -1 for an error of 2e-4 that goes through zero."""
    reference = np.array([[10.0], [1e-4], [-30.0]])
    found = reference + np.array([[0.0], [-2e-4], [0.0]])
    padded = (np.hstack([x, np.full((3, 2), -INF)]) for x in (reference, found))
    for c in (compare(reference, found), compare(*padded)):
        assert (c.top1, c.cosine, c.lost_margins) == (None, None, ())
        assert c.range_error == pytest.approx(2e-4 / 40)
        assert not c.failures(bound("folded", "float32"))
    assert compare(reference, reference + 1.0).failures(bound("folded", "float32"))


def test_values_that_hardly_differ_are_not_judged_by_their_rounding():
    reference = np.array([[40.0], [40.001]])
    assert compare(reference, reference + 1e-5, VALUES).range_error == pytest.approx(1e-5 / 0.40001)
    assert compare(reference[:1], reference[:1] + 0.1, VALUES).range_error == pytest.approx(
        0.1 / 40
    )
    assert compare(logits(2, 1) * 0, logits(2, 1), VALUES).range_error == INF


def test_near_ties_and_lost_answers_are_told_apart():
    reference = np.tile([5.0, 4.9, 2.0, -5.0], (5, 1))
    found = reference.copy()
    found[0, 1] = found[1, 2] = 6.0
    c = compare(reference, found)
    assert sorted(c.lost_margins) == pytest.approx([0.01, 0.3])
    assert c.near_ties(HALF) == 1
    assert c.near_ties(replace(HALF, range_error=1e-3)) == 0
    (line,) = [f for f in c.failures(HALF) if f.startswith("top-1")]
    assert "80.00%" in line


def test_float32_s_near_ties_are_as_small_as_its_errors():
    reference = duel(0.1)
    found = reference.copy()
    found[0, 1] = 5.1
    assert compare(reference, found).near_ties(bound("branches", "float32")) == 0


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_range_error_does_not_depend_on_the_scale(scale):
    noise = 1e-4 * logits(seed=1)
    expected = compare(logits(), logits() + noise).range_error
    c = compare(scale * logits(), scale * (logits() + noise))
    assert math.isclose(c.range_error, expected, rel_tol=1e-6)


def test_float32_is_compared_in_float64():
    reference = np.full((1, 2), 1.0)
    reference[0, 1] = 2.0 + 1e-9
    c = compare(reference, reference.astype(np.float32))
    assert math.isclose(c.max_abs, 1e-9, rel_tol=1e-6)


def test_padding_is_left_out():
    reference, found = logits(), logits() + 1e-6 * logits(seed=2)
    padded = [np.pad(x, ((0, 0), (0, 4)), constant_values=-INF) for x in (reference, found)]
    assert compare(*padded) == compare(reference, found)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((1, 6), np.nan),
        ((1, 6), INF),
        ((1, 6), 0.0),
        ((4, 2), np.nan),
        ((4, 2), INF),
        ((4, 2), -INF),
    ],
)
def test_padding_that_differs_is_an_infinite_error(place, value):
    reference = logits()
    reference[1, 5:] = reference[4, 5:] = -INF
    found = reference.copy()
    found[place] = value
    c = compare(reference, found)
    assert c.range_error == INF
    assert c.worst_image == place[0]
    assert c.failures(Bound(1e9, -1.0, 0.0, "", ""))


def test_a_row_that_is_all_padding_and_a_constant_one():
    reference = np.full((2, 3), -INF)
    assert compare(reference, reference).max_abs == 0.0
    same = np.full((2, 3), 2.0)
    assert compare(same, same).range_error == 0.0
    assert compare(same, same + 1e-9).range_error == INF  # a range of zero allows nothing


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"reference \(5, 7\), found \(5, 3\)"):
        compare(logits(), logits(5, 3))


@pytest.mark.parametrize(
    ("figure", "value", "said"),
    [
        ("range_error", 2e-3, "max abs error"),
        ("range_error", math.nan, "max abs error"),
        ("cosine", 0.99, "cosine"),
        ("cosine", math.nan, "cosine"),
        ("top1", 0.9, "top-1 agreement 90.00%"),
    ],
)
def test_each_figure_has_its_own_bound(figure, value, said):
    good = compare(logits(), logits())
    assert not good.failures(TIGHT)
    (failure,) = replace(good, **{figure: value}).failures(TIGHT)
    assert said in failure


def test_the_same_top1_does_not_make_a_wrong_reflection_right():
    """The arg max agrees everywhere, the logits do not."""
    c = compare(logits(), 1.05 * logits())
    assert c.top1 == 1.0
    assert c.failures(bound("branches", "float32"))


def test_a_report_as_json_has_neither_nan_nor_infinity():
    bad = compare(logits(), np.full((5, 7), np.nan))
    stages = [
        StageResult.of("branches", "float32", "a runtime", "alpha", compare(logits(), logits())),
        StageResult.of("branches", "float32", "a runtime", "beta", bad),
    ]
    report = ParityReport({"kind": "noise", "seed": 3}, stages)
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["passed"] is False
    assert [s["passed"] for s in content["stages"]] == [True, False]
    assert content["stages"][0]["sqnr_db"] == "inf"
    assert content["stages"][1]["range_error"] == "inf"
    assert content["stages"][0]["bound"]["range_error"] == 1e-4
    explained = report.explain_failures()
    assert "adapter beta" in explained
    assert "adapter alpha" not in explained
    assert ParityReport({}, stages[:1]).passed


def test_a_report_of_nothing_has_not_passed():
    assert not ParityReport({}, []).passed


def test_the_table():
    with pytest.raises(KeyError):
        bound("branches", "float99")
    for (stage, precision), limits in PARITY.items():
        # Graphs from calibration are judged by accuracy; the table only sees broken ones.
        calibrated = precision in ("int8", "fp8", "int8-weights")
        assert 0 < limits.range_error < 0.2, (stage, precision)
        assert (0.9 if calibrated else 0.99) < limits.cosine < 1
        assert (0.4 if calibrated else 0.9) < limits.top1 <= 1
        assert limits.measured, f"{stage} {precision} does not say what was measured"
        assert limits.reason
        assert limits == bound(stage, precision)
