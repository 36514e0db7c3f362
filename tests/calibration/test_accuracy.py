"""Top-1 before and after, task by task, as paired data."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hhdeploy.adapters.config import LABELS, VALUES
from hhdeploy.calibration.judging.accuracy import (
    TWO_SIDED_95,
    Accuracy,
    TaskAccuracy,
    answers,
    compare_answers,
)
from hhdeploy.calibration.judging.exam import Question
from hhdeploy.parity import compare


def question(adapter, truth, value=0.0):
    image = np.full((3, 2, 5), value, np.float32)
    return Question(adapter, truth, f"{value}", lambda: image)


def one_hot(columns, classes=4, padded_from=4):
    logits = np.eye(classes, dtype=np.float32)[columns]
    logits[:, padded_from:] = -np.inf
    return logits


def test_counts_of_one_task():
    truths = [0, 1, 2, 3, 0, 1, 2]
    before = [0, 1, 2, 3, 1, 2, 2]  # five right
    after = [0, 1, 0, 0, 0, 2, 2]  # two lost, one gained, one wrong both times
    questions = [question("digits", truth) for truth in truths]
    accuracy = compare_answers(questions, one_hot(before), one_hot(after), held_out=True)
    (task,) = accuracy.tasks
    assert (task.task, task.images) == ("digits", 7)
    assert (task.float_right, task.quantised_right, task.lost, task.gained) == (5, 4, 2, 1)
    assert task.agreement == pytest.approx(4 / 7)
    assert task.drop == pytest.approx(100 / 7)
    assert task.float_top1 == pytest.approx(500 / 7)
    assert task.quantised_top1 == pytest.approx(400 / 7)


def test_the_standard_error_is_that_of_the_paired_differences():
    differences = np.array([1] * 5 + [-1] * 2 + [0] * 30)
    task = TaskAccuracy("t", 37, 0.8, 30.0, 20, 17, lost=5, gained=2)
    assert task.standard_error == pytest.approx(100 * differences.std() / math.sqrt(37))
    unpaired = 100 * math.sqrt(20 / 37 * 17 / 37 / 37 + 17 / 37 * 20 / 37 / 37)
    assert task.standard_error < 0.7 * unpaired


def test_no_change_does_not_prove_no_loss():
    task = TaskAccuracy("t", 60, 1.0, 40.0, 50, 50, lost=0, gained=0)
    assert task.standard_error == 0.0
    assert task.at_most == pytest.approx(5.0)  # rule of three
    changed = TaskAccuracy("t", 60, 0.9, 40.0, 50, 48, lost=3, gained=1)
    assert changed.drop < changed.at_most < changed.drop + 2 * changed.standard_error
    evenly = TaskAccuracy("t", 60, 0.9, 40.0, 50, 50, lost=5, gained=5)
    assert evenly.at_most == pytest.approx(TWO_SIDED_95 * evenly.standard_error)
    assert TaskAccuracy("t", 60, 0.0, -9.0, 60, 0, lost=60, gained=0).at_most == 100.0


def test_tasks_are_kept_apart_and_their_mean_is_over_tasks():
    """Three images of one task and one of another: the mean is not over images."""
    questions = [question("a", 0), question("b", 1), question("a", 2), question("a", 3)]
    before = one_hot([0, 1, 2, 3])
    after = one_hot([1, 1, 2, 3])
    accuracy = compare_answers(questions, before, after, held_out=False)
    assert [task.task for task in accuracy.tasks] == ["a", "b"]
    assert accuracy.drop == pytest.approx((100 / 3 + 0) / 2)
    assert accuracy.worst.task == "a"
    assert accuracy.images == 4
    assert accuracy.agreement == pytest.approx(3 / 4)
    swapped = compare_answers([question("b", 0), *questions[1:]], before, after, held_out=False)
    assert swapped.drop != accuracy.drop


def test_the_standard_error_of_the_mean():
    tasks = (
        TaskAccuracy("a", 50, 0.9, 30.0, 40, 38, lost=3, gained=1),
        TaskAccuracy("b", 20, 0.9, 30.0, 10, 10, lost=1, gained=1),
    )
    errors = [task.standard_error for task in tasks]
    assert Accuracy(tasks, True).standard_error == pytest.approx(math.hypot(*errors) / 2)


def test_unlabelled_tasks_have_agreement_and_noise_only():
    questions = [question("a", None), question("b", 1)]
    accuracy = compare_answers(questions, one_hot([0, 1]), one_hot([2, 1]), held_out=True)
    unlabelled = accuracy.tasks[0]
    assert unlabelled.drop is None
    assert unlabelled.at_most is None
    assert unlabelled.agreement == 0.0
    assert accuracy.drop == 0.0, "the mean is of the labelled task"
    assert compare_answers(questions[:1], one_hot([0]), one_hot([0]), held_out=True).drop is None
    partly = [question("a", 0), question("a", None)]
    assert compare_answers(partly, one_hot([0, 1]), one_hot([0, 1]), held_out=True).drop is None


def test_padding_is_no_answer_and_no_noise():
    questions = [question("a", 0), question("a", 1)]
    before = one_hot([0, 1], padded_from=2)
    after = before + np.float32(0.01)
    (task,) = compare_answers(questions, before, after, held_out=True).tasks
    assert task.drop == 0.0
    assert task.sqnr_db == compare(before, after).sqnr_db != compare(after, before).sqnr_db


def test_answers_come_in_order_whatever_the_batches():
    questions = [question(f"t{i % 3}", None, float(i)) for i in range(37)]
    batches = []

    def run(images, adapters):
        batches.append(list(adapters))
        return images[:, 0, 0, :2]

    assert answers(run, questions)[:, 0].tolist() == [float(i) for i in range(37)]
    assert [a for batch in batches for a in batch] == [q.adapter for q in questions]
    assert len(set(batches[0])) == 3, "a batch mixes tasks"


def test_json_holds_no_infinity():
    questions = [question(None, 0)]
    content = compare_answers(questions, one_hot([0]), one_hot([0]), held_out=True).to_json()
    assert content["tasks"][0]["sqnr_db"] == "inf"
    assert content["tasks"][0]["task"] == "", "of a folded bundle"


def judged(kind, truths, before, after):
    """One task of labels or values; two columns of padding that belong to others."""
    questions = [
        Question("a", None, "x", lambda: None, kind, None if t is None else tuple(t))
        for t in truths
    ]
    padded = [
        np.hstack([np.asarray(x, np.float32), np.full((len(truths), 2), -np.inf, np.float32)])
        for x in (before, after)
    ]
    (task,) = compare_answers(questions, *padded, held_out=True).tasks
    return task


def test_labels_are_judged_by_mean_average_precision():
    truths = [[1, 0], [0, 1], [1, 1]]
    before = [[2, -1], [-1, 3], [1, 0.5]]  # all right
    after = [[2, -1], [2.5, 3], [1, -0.5]]  # the first label: 0 and 2 behind 1; 2 loses the second
    task = judged(LABELS, truths, before, after)
    assert task.agreement == pytest.approx(1 / 3)
    assert (task.score, task.float_score) == ("mAP", 1.0)
    assert task.quantised_score == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1) / 2)
    assert task.scores == ("mAP 100.00 %", "mAP 79.17 %")
    assert (task.drop, task.float_top1) == (None, None)
    pair = (np.asarray(x, np.float32) for x in (before, after))
    assert task.sqnr_db == compare(*pair, LABELS).sqnr_db
    near = judged(LABELS, [[1, 0]] * 2, [[0.0, -1]] * 2, [[0.1, -1]] * 2)
    assert near.agreement == 1.0, "a label is said from a probability of a half on"


def test_values_are_judged_by_mean_absolute_error():
    before, truths = [[40.0], [10.0], [20.0]], [[41.0], [10.0], [18.0]]
    task = judged(VALUES, truths, before, [[40.2], [10.0], [21.0]])
    assert (task.score, task.float_score) == ("MAE", 1.0)
    assert task.quantised_score == pytest.approx((0.8 + 0 + 3) / 3)
    assert task.scores == ("MAE 1", "MAE 1.267")
    assert task.agreement == pytest.approx(2 / 3), "a hundredth of the range of 30 is 0.3"
    near = judged(VALUES, [None] * 2, [[100.0], [101.0]], [[100.5], [101.0]])
    assert near.agreement == 0.5, "of the range, which is 1, and not of the values' size"
    assert judged(VALUES, [None] * 3, before, before).scores is None
    assert judged(VALUES, [*truths[:2], None], before, before).scores is None, "one is unknown"
    two = judged(VALUES, [None] * 2, [[0.0, 0.0], [100.0, 1.0]], [[0.0, 0.5], [100.0, 1.0]])
    assert two.agreement == 1.0, "of the range of all values"
    assert task.to_json()["float_score"] == 1.0


def test_labels_and_values_are_no_part_of_the_mean_top1():
    questions = [question("a", 0), Question("b", None, "x", lambda: None, VALUES, (1.0, 0, 0, 0))]
    accuracy = compare_answers(questions, one_hot([0, 1]), one_hot([1, 1]), held_out=True)
    assert accuracy.drop == 100.0
    assert [t.task for t in accuracy.labelled] == ["a"]
