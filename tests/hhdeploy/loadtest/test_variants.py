"""The fleet of a test, and what a bare session expects of it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hhdeploy.adapters.config import CONFIG_FILE
from hhdeploy.bundle import Bundle
from hhdeploy.errors import PlanError
from hhdeploy.loadtest.expected import expect, image_pool, parity_bound
from hhdeploy.loadtest.variants import VERSIONS, make_tasks, vary
from hhdeploy.runtime import open_session
from tests.support import assert_parity
from tests.workshop import contents

OWN = ["alpha", "rival", "beta", "gamma", "headless"]


@pytest.fixture
def make(branches, tmp_path):
    """Make a fleet of the bundle `branches`; gives its tasks."""

    def run(count: int, seed: int = 0, place: str = "test"):
        (tmp_path / place / "fleet").mkdir(parents=True)
        root = tmp_path / place
        return make_tasks(Bundle.open(branches), count, seed, root / "fleet", root / "versions")

    return run


def test_the_bundle_s_own_come_first_then_variants(make, branches, tmp_path):
    before = contents(branches)
    tasks = make(13)
    assert [t.name for t in tasks[:5]] == OWN
    assert [t.name for t in tasks[5:7]] == ["alpha-variant-1", "rival-variant-1"]
    assert tasks[0].versions[0] == branches / "adapters" / "alpha"
    assert {len(t.versions) for t in tasks} == {VERSIONS}
    assert contents(branches) == before, "the bundle was changed"
    unknown = [t.name for t in tasks if not t.at_start]
    assert unknown == ["beta-variant-1"]
    there = {path.name for path in (tmp_path / "test" / "fleet").iterdir()}
    assert there == {t.name for t in tasks[5:]} - set(unknown)
    for name in there:
        (task,) = [t for t in tasks if t.name == name]
        assert contents(tmp_path / "test" / "fleet" / name) == contents(task.versions[0])


def test_fewer_than_the_bundle_has(make):
    assert [t.name for t in make(2)] == OWN[:2]


def test_variants_are_seeded_and_say_what_they_are(make):
    first, again, other = (
        make(6, seed, place)[5].versions[0] for seed, place in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert contents(first) == contents(again)
    assert contents(first) != contents(other)
    assert "load test" in json.loads((first / CONFIG_FILE).read_text())["note"]


def test_a_variant_has_the_same_shapes_and_other_values(workshop):
    for adapter in workshop.adapters.values():
        variant = vary(adapter, np.random.default_rng(0))
        assert variant.sites.keys() == adapter.sites.keys()
        for name, site in adapter.sites.items():
            for key, tensor in vars(site).items():
                found = getattr(variant.sites[name], key)
                if tensor is None:
                    assert found is None
                else:
                    assert found.shape == tensor.shape and found.dtype == tensor.dtype
                    assert not np.any(found == tensor)
        assert (variant.head is None) == (adapter.head is None)


def test_expectations_are_what_the_training_time_model_says(make, branches, workshop):
    tasks = make(6)
    done = []
    with open_session(branches, device="cpu", threads=1) as session:
        pool = image_pool(3, session.bundle.manifest.input_size, seed=0)
        expected = expect(
            session, tasks, pool, parity_bound("cpu", "float32"), lambda *x: done.append(x)
        )
    for task, name in enumerate(OWN):
        truth = workshop.truth(name, pool)
        assert_parity(truth, expected.logits[task][0], "branches", "float32")
    assert expected.told_apart() == 1.0, "two versions say the same"
    assert done[-1] == (6, 6)


@pytest.mark.parametrize("kind", ["folded", "constant"])
def test_a_bundle_whose_adapters_are_fixed_is_refused(kind, request, tmp_path):
    bundle = Bundle.open(request.getfixturevalue(kind))
    with pytest.raises(PlanError, match="expected a bundle whose adapters can be added"):
        make_tasks(bundle, 3, 0, tmp_path, tmp_path)
