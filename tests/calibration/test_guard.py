"""The guard finds the fewest sites, with few graphs, and says when there is no way."""

from __future__ import annotations

import math

import pytest

from hhdeploy.adapters.config import VALUES
from hhdeploy.calibration.judging.exam import Exam, Question
from hhdeploy.calibration.judging.guard import check_bound, guard, most_sensitive_first
from hhdeploy.errors import ParityError, PlanError

SITES = tuple(f"blocks.{i}.mlp.fc1" for i in range(37))


def loses(enough):
    """Two points are lost unless the first ``enough`` sites are kept."""
    return lambda kept: 0.4 if set(SITES[:enough]) <= set(kept) else 2.0


@pytest.mark.parametrize("enough", range(len(SITES)))
def test_the_shortest_prefix_is_found(enough):
    found = guard(lambda: SITES, loses(enough), 0.5)
    assert found.kept == SITES[:enough]
    assert len(found.trials) <= 2 * math.ceil(math.log2(len(SITES))) + 2
    assert any(t.kept == enough and t.passed for t in found.trials)
    assert enough == 0 or any(t.kept == enough - 1 and not t.passed for t in found.trials)
    assert len({t.kept for t in found.trials}) == len(found.trials), "no graph is tried twice"


def test_nothing_is_measured_if_nothing_has_to_be_kept():
    def rank():
        raise AssertionError("sensitivity costs minutes")

    found = guard(rank, lambda kept: 0.5, 0.5)
    assert (found.kept, len(found.trials)) == ((), 1)


@pytest.mark.parametrize("sites", [SITES, SITES[:2], SITES[:1]])
def test_a_bound_that_cannot_be_kept(sites):
    with pytest.raises(ParityError, match=r"still drops by 3\.00 points"):
        guard(lambda: sites, lambda kept: 3.0, 0.5)


@pytest.mark.parametrize("sites", [SITES, SITES[:2], SITES[:1]])
def test_a_graph_with_nothing_quantised_keeps_no_bound(sites):
    with pytest.raises(ParityError, match=r"all but one of .*still drops by 3\.00 points"):
        guard(lambda: sites, lambda kept: 0.0 if len(kept) == len(sites) else 3.0, 0.5)


def test_nan_is_not_within_any_bound():
    with pytest.raises(ParityError):
        guard(lambda: SITES, lambda kept: math.nan, 100.0)


def test_the_noisiest_come_first():
    assert most_sensitive_first({"a": 40.0, "b": 12.5, "c": math.inf, "d": 12.5}) == (
        "b", "d", "a", "c",
    )  # fmt: skip


def test_adapters_without_classes_have_no_top_1_to_bound():
    """No folder of classes could help them."""
    value = Question("a", None, "1.png", lambda: None, VALUES, (0.5,))
    with pytest.raises(PlanError, match=r"answer with labels or values.*`exclude`"):
        check_bound(1.0, Exam((value,), True, "judge", ()))


def test_a_bound_is_judged_on_images_that_calibration_does_not_use():
    known = Question("a", 0, "1.png", lambda: None)
    for bound in (0.0, 1.0):
        check_bound(bound, Exam((known,), True, "judge", ()))
    with pytest.raises(PlanError, match=r"calibration does not use; of judge none is left"):
        check_bound(1.0, Exam((known,), False, "judge", ()))


def test_all_whose_classes_are_not_known_are_named():
    known = Question("a", 0, "1.png", lambda: None)
    for names, said in ((("b", None, "c"), " of b, c, which"), ((None,), "true classes, which")):
        for told in ({"unjudged": names}, {"undecided": names}):
            with pytest.raises(PlanError, match=said):
                check_bound(1.0, Exam((known,), True, "judge", (), **told))
