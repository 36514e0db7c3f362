"""The script that tries models of other libraries."""

from __future__ import annotations

import pytest

from benchmarks import other_models
from benchmarks.other_models import Other, measure


def test_a_model_is_verified() -> None:
    found = measure("torchvision ViT")
    assert found["result"] == "verified"
    assert {"backbone", "folded", "branches"} < found.keys()


def test_an_error_beyond_the_bound_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_models, "BOUND", 0.0)
    assert measure("torchvision ViT")["result"].startswith("wrong: ")


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(other_models.MODELS, "x", Other("no-such-package", "no:Model"))
    assert measure("x")["result"] == "no-such-package is not installed"
