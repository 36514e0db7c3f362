"""Logits to answers: own classes only, every class keeps its name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.answers import Answer, answers_of, softmax

LOGITS = np.array([0.5, -np.inf, 2.0, 1.0, -np.inf, -np.inf], np.float32)


@pytest.fixture
def entry(small):
    """An adapter of four classes."""
    alpha = Bundle.open(small).manifest.adapter("alpha")
    return replace(alpha, classes=4, class_names=("ant", "bee", "cat", "dog"))


def test_the_most_probable_class_comes_first_and_is_the_positive_one(entry):
    found = answers_of(LOGITS, entry, 4)
    shares = np.exp([2.0, 1.0, 0.5]) / np.exp([2.0, 1.0, 0.5]).sum()
    assert [a.label for a in found] == ["cat", "dog", "ant", "bee"]
    assert [a.index for a in found] == [2, 3, 0, 1]
    assert [a.score for a in found] == pytest.approx([*shares, 0.0])
    assert [a.positive for a in found] == [True, False, False, False]


def test_a_class_that_is_ruled_out_shifts_no_name(entry):
    """-inf among the own classes: it used to be cut off with the padding."""
    best, *_ = answers_of(LOGITS, entry, 4)
    assert (best.index, best.label) == (2, "cat")
    assert answers_of(LOGITS, entry, 4)[-1] == Answer("bee", 0.0, False, 1)


def test_the_backbone_s_classes_have_numbers():
    assert [a.label for a in answers_of(LOGITS, None, 4)] == ["2", "3", "0", "1"]


def test_softmax_row_by_row():
    rows = np.array([[1.0, 2.0], [-np.inf, 5.0], [1e4, 1e4]], np.float32)
    found = softmax(rows)
    assert found.dtype == np.float64
    np.testing.assert_array_max_ulp(found[0], np.array([1 / (1 + np.e), np.e / (1 + np.e)]), 4)
    np.testing.assert_array_equal(found[1:], [[0, 1], [0.5, 0.5]])
    bad = np.array([[np.nan, 1], [np.inf, 1], [-np.inf, -np.inf], [0, 0]], np.float32)
    np.testing.assert_array_equal(np.isnan(softmax(bad)).all(axis=1), [True, True, True, False])
