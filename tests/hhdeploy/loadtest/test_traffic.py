"""Zipf popularity and Poisson arrivals: seeded, and of the law they are named after."""

from __future__ import annotations

import numpy as np
import pytest

from hhdeploy.errors import PlanError
from hhdeploy.loadtest.traffic import Load, plan_requests, poisson_times, zipf_shares


def test_shares_follow_zipf_s_law():
    shares = zipf_shares(64, 1.1, seed=3)
    ranked = np.sort(shares)[::-1]
    assert shares.sum() == pytest.approx(1)
    assert ranked[0] / ranked[9] == pytest.approx(10**1.1)
    assert ranked[4] / ranked[39] == pytest.approx(8**1.1)


def test_without_skew_all_are_equally_popular():
    assert set(zipf_shares(7, 0.0, seed=0)) == {1 / 7}


def test_shares_are_seeded_and_the_most_popular_one_is_drawn():
    assert np.array_equal(zipf_shares(31, 1.1, seed=4), zipf_shares(31, 1.1, seed=4))
    assert len({int(np.argmax(zipf_shares(31, 1.1, seed=s))) for s in range(10)}) > 1


def test_gaps_of_poisson_arrivals_are_exponential():
    times = poisson_times(20_000, 50.0, seed=1)
    gaps = np.diff(times)
    assert np.all(gaps > 0)
    # Mean, standard deviation and median of an exponential law; the seed is fixed.
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)
    assert np.median(gaps) == pytest.approx(np.log(2) / 50, rel=0.03)
    assert np.array_equal(times, poisson_times(20_000, 50.0, seed=1))
    assert not np.array_equal(times, poisson_times(20_000, 50.0, seed=2))


def test_requests_ask_as_popular_as_the_shares_say():
    shares = zipf_shares(5, 1.1, seed=0)
    requests = plan_requests(Load(20_000, images=3), shares, pool=7)
    asked = np.bincount([r.task for r in requests], minlength=5) / 20_000
    assert np.abs(asked - shares).max() < 0.02
    assert {len(r.images) for r in requests} == {3}
    assert {i for r in requests for i in r.images} == set(range(7))
    assert {r.at for r in requests} == {None}


def test_a_rate_is_of_images():
    requests = plan_requests(Load(4000, rate=60.0, images=3), zipf_shares(2, 1, 0), pool=2)
    assert requests[-1].at == pytest.approx(4000 * 3 / 60, rel=0.1)


def test_requests_are_seeded():
    def plan(seed):
        return plan_requests(Load(50, seed=seed), zipf_shares(5, 1.1, 0), pool=7)

    assert plan(1) == plan(1)
    assert plan(1) != plan(2)


@pytest.mark.parametrize(
    "wrong",
    [{"requests": 0}, {"clients": 0}, {"images": 0}, {"skew": -1}, {"churn": -1}, {"rate": 0.0}],
)
def test_a_load_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(PlanError, match="expected"):
        Load(**{"requests": 1, **wrong})
