"""What every test gets: one thread, and seeded tiny backbones that are built once."""

from __future__ import annotations

import os

# Before torch and numpy are imported: the tests share their cores with other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hhdeploy.backbone import Backbone


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
