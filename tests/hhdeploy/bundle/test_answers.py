"""Logits to answers: own classes only, every class keeps its name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hhdeploy.adapters.config import CLASSES, LABELS, VALUES
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.answers import Answer, answers_of, best, probabilities, softmax

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


def test_labels_have_a_probability_each_and_are_said_from_one_half(entry):
    tags = replace(entry, problem_type=LABELS)
    found = answers_of(np.array([0.0, -np.inf, 800.0, -800.0, -np.inf], np.float32), tags, 4)
    assert [(a.label, a.score, a.positive) for a in found] == [
        ("cat", 1.0, True), ("ant", 0.5, True), ("dog", 0.0, False), ("bee", 0.0, False),
    ]  # fmt: skip
    assert {a.problem_type for a in found} == {LABELS}
    (sure, doubtful) = answers_of(np.array([np.log(3), -1e-3]), replace(tags, classes=2), 2)
    assert sure.score == pytest.approx(0.75)
    assert not doubtful.positive


def test_values_are_what_they_are_in_their_order(entry):
    sizes = replace(entry, problem_type=VALUES)
    found = answers_of(LOGITS[[0, 2, 3, 0]] * 1000, sizes, 4)
    assert [(a.label, a.score) for a in found] == [
        ("ant", 500.0), ("bee", 2000.0), ("cat", 1000.0), ("dog", 500.0),
    ]  # fmt: skip
    assert not any(a.positive for a in found)


def test_what_is_shown(entry):
    """The best classes, every label that is said, all values."""
    logits = np.array([1.0, 2.0, -1.0, 3.0])
    shown = {}
    for kind in (CLASSES, LABELS, VALUES):
        found = answers_of(logits, replace(entry, problem_type=kind), 4)
        shown[kind] = [str(a) for a in best(found, 1)]
    assert shown == {
        CLASSES: ["dog 65.7%"],
        LABELS: ["dog 95.3%", "bee 88.1%", "ant 73.1%"],
        VALUES: ["ant 1", "bee 2", "cat -1", "dog 3"],
    }
    found = answers_of(logits, replace(entry, problem_type=LABELS), 4)
    assert len(best(found, 4)) == 4


def test_values_have_no_probabilities():
    with pytest.raises(ValueError, match="no probabilities"):
        probabilities(LOGITS, VALUES)
    assert np.isnan(probabilities(np.array([np.nan, 0.0]), LABELS)).tolist() == [True, False]
