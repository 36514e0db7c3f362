"""What the benchmark of unseen adapters makes of its results: drops, and what would have told."""

from __future__ import annotations

import pytest

from benchmarks.unseen_adapters import (
    Result,
    judge_statistic,
    mcnemar,
    precision_and_recall,
    summary,
)


def result(name, drop, p, **changes):
    return Result(
        **{
            "name": name, "calibrated": False, "classes": 3, "test_images": 200,
            "float32": 80.0, "int8": 80.0 - drop, "p": p, "flagged": True, "clipped": 0.01,
            "clipped_mean": 0.001, "ratio": 2.0, "lost": 0.1, "changed": 0.0, "sqnr_db": 30.0,
            "test_changed": drop / 100, **changes,
        }
    )  # fmt: skip


RESULTS = [
    result("seen", 9.0, 0.001, calibrated=True),
    result("fell", 5.0, 0.01, clipped=0.3, sqnr_db=12.0),
    result("chance", 2.0, 0.2, clipped=0.02, sqnr_db=23.0),
    result("little", 0.5, 0.01, flagged=False, clipped=0.0),
]


def test_a_drop_is_more_than_a_point_and_more_than_chance():
    assert [r.name for r in RESULTS if r.dropped] == ["seen", "fell"]
    assert mcnemar(5, 0) == pytest.approx(1 / 32)
    assert mcnemar(3, 2) == pytest.approx(0.5)
    assert mcnemar(0, 0) == mcnemar(0, 7) == 1.0


def test_precision_and_recall_are_of_those_that_dropped():
    unseen = RESULTS[1:]
    assert precision_and_recall(unseen, [True, True, False]) == {
        "flagged": 2, "precision": 0.5, "recall": 1.0,
    }  # fmt: skip
    assert precision_and_recall(unseen, [False, False, True])["recall"] == 0.0
    nobody = precision_and_recall(unseen[1:], [False, False])
    assert nobody == {"flagged": 0, "precision": None, "recall": None}


@pytest.mark.parametrize(("name", "bound"), [("clipped", "0.03"), ("sqnr_db", "15")])
def test_a_statistic_warns_on_its_own_side(name, bound):
    judged = judge_statistic(RESULTS[1:], name)
    assert judged["at"][bound] == {"flagged": 1, "precision": 1.0, "recall": 1.0}
    assert judged["rank correlation with the drop"] == 1.0


def test_the_summary_is_of_unseen_adapters_alone():
    told = summary(RESULTS)
    assert told["unseen"] == 3
    assert told["mean drop"] == 2.5
    assert told["dropped"] == ["fell"]
    assert told["check"] == {"flagged": 2, "precision": 0.5, "recall": 1.0}
    assert told["flagged of the calibrated"] == 1
    assert [a["name"] for a in told["adapters"]] == ["seen", "fell", "chance", "little"]
