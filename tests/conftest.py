"""What every test gets: one thread, and seeded tiny backbones that are built once."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before torch and numpy are imported: the tests share their cores with other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor do they fill the user's cache of traced graphs and compiled models.
if "HHDEPLOY_CACHE" not in os.environ:
    os.environ["HHDEPLOY_CACHE"] = tempfile.mkdtemp(prefix="hhdeploy-tests-")
    atexit.register(shutil.rmtree, os.environ["HHDEPLOY_CACHE"], ignore_errors=True)

from typing import TYPE_CHECKING

import pytest

from tests.alone import pytest_pyfunc_call, shared
from tests.skips import pytest_terminal_summary
from tests.slow import pytest_addoption, pytest_collection_modifyitems

if TYPE_CHECKING:
    from pathlib import Path

    from hhdeploy.backbones.spec import Backbone
    from tests.workshop import Workshop

__all__ = [
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_pyfunc_call",
    "pytest_terminal_summary",
]


@pytest.fixture(scope="session")
def tiny_facts():
    """`BackboneFacts` of the perturbed tiny ViT."""
    from tests.support import tiny_backbone

    return tiny_backbone().facts


@pytest.fixture
def tiny() -> Backbone:
    """A perturbed tiny ViT of the test's own, free to be changed."""
    from tests.support import tiny_backbone

    return tiny_backbone()


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    """Checkpoint, adapters and cache that the shared bundles are exported from."""
    from tests.workshop import make_workshop

    return make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def branches(request) -> Path:
    """Five adapters of all kinds, one without a head, beside a backbone with its classifier.

    Read only: `tests.workshop.copy_bundle` gives a copy to change.
    """
    if (made := shared("branches")) is not None:
        return made
    workshop = request.getfixturevalue("workshop")
    names = ("alpha", "rival", "beta", "gamma", "headless")
    return workshop.export(workshop.root / "branches", names).path


@pytest.fixture(scope="session")
def small(workshop) -> Path:
    """Alpha and gamma, without the backbone's classifier. Read only."""
    return workshop.export(workshop.root / "small", ("alpha", "gamma")).path


@pytest.fixture(scope="session")
def heads(workshop) -> Path:
    """Alpha's classes, independent labels, one value, and a head alone. Read only."""
    from tests.workshop import AGE, PROBE, TAGS

    return workshop.export(workshop.root / "heads", ("alpha", TAGS, AGE, PROBE)).path


@pytest.fixture(scope="session")
def folded(workshop) -> Path:
    """Alpha in the weights. Read only."""
    return workshop.export(workshop.root / "folded", ("alpha",), fold=True).path


@pytest.fixture(scope="session")
def constant(workshop) -> Path:
    """Alpha and gamma, the bank baked into the graph. Read only."""
    out = workshop.root / "constant"
    return workshop.export(out, ("alpha", "gamma"), bank_as_constant=True).path


@pytest.fixture(scope="session")
def scaled_workshop(workshop, tmp_path_factory) -> Workshop:
    """Adapters with s_in, s_out, db and values of parameters."""
    from tests.workshop import make_scaled_workshop

    return make_scaled_workshop(tmp_path_factory.mktemp("scaled"), workshop)


@pytest.fixture(scope="session")
def scaled(scaled_workshop) -> Path:
    """All of them that can stand beside one backbone. Read only."""
    names = ("scaled", "ia3", "after", "plain")
    return scaled_workshop.export(scaled_workshop.root / "live", names).path
