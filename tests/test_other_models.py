"""The script that tries models of other libraries."""

from __future__ import annotations

import pytest

from benchmarks import other_models
from benchmarks.other_models import BOUND, Other, measure, verdict


def test_a_model_is_verified() -> None:
    found = measure("torchvision ViT")
    assert found["result"] == "verified"
    errors = {found[key] for key in ("backbone", "folded", "branches")}
    assert 0 < max(errors) <= BOUND, "no error at all: it was compared with itself"


def test_an_error_beyond_the_bound_is_wrong() -> None:
    assert verdict({"folded": BOUND, "branches": 0.0}) == "verified"
    assert verdict({"folded": 0.0, "branches": 1.5 * BOUND}).startswith("wrong: ")


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(other_models.MODELS, "x", Other("no-such-package", "no:Model"))
    assert measure("x")["result"] == "no-such-package is not installed"
