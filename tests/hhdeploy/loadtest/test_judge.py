"""Every kind of fault is caught, and nothing right is called one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hhdeploy.loadtest.expected import Expectations, parity_bound
from hhdeploy.loadtest.judge import Exchange, Reply, Verdict, judge
from hhdeploy.loadtest.traffic import Request
from hhdeploy.parity import bound

POOL, CLASSES = 5, 7


@pytest.fixture
def expected() -> Expectations:
    """Two adapters of as many classes, one of another number; three versions each."""
    rng = np.random.default_rng(0)
    logits = [
        [rng.standard_normal((POOL, classes), np.float32) for _ in range(3)]
        for classes in (CLASSES, CLASSES, 3)
    ]
    return Expectations(["alpha", "rival", "gamma"], logits, bound("branches", "float32"))


def answered(logits, **changed) -> Reply:
    """An answer of the protocol with one binary output."""
    output = {"name": "logits", "datatype": "FP32", "shape": list(logits.shape), **changed}
    head = json.dumps({"outputs": [output]}).encode()
    return Reply(200, head + logits.astype("<f4").tobytes(), len(head))


def verdict(expected, answer, possible, images=(1,), task=0):
    exchange = Exchange(Request(task, images, None), 1.0, 1.0, 2.0, answer)
    return judge(exchange, frozenset(possible), expected)


def test_the_expected_version_is_right(expected):
    for version in range(3):
        answer = answered(expected.logits[0][version][[1]])
        assert verdict(expected, answer, {version}).verdict is Verdict.RIGHT


def test_rounding_is_no_fault(expected):
    logits = expected.logits[0][0]
    near = logits[[1]] + np.float32(1e-6) * np.ptp(logits)
    assert verdict(expected, answered(near), {0}).verdict is Verdict.RIGHT


def test_an_answer_outside_the_parity_table_is_wrong(expected):
    logits = expected.logits[0][0]
    off = logits[[1]].copy()
    off[0, 3] += 2 * expected.bound.range_error * np.ptp(logits)
    assert verdict(expected, answered(off), {0}).verdict is Verdict.WRONG


def test_a_stale_version_is_wrong_and_named(expected):
    found = verdict(expected, answered(expected.logits[0][0][[1]]), {1})
    assert found.verdict is Verdict.WRONG
    assert found.detail == "alpha: what alpha version 0 says; expected version 1"


def test_another_adapter_s_answer_is_wrong_and_named(expected):
    found = verdict(expected, answered(expected.logits[1][2][[1]]), {0, None})
    assert found.verdict is Verdict.WRONG
    assert found.detail == "alpha: what rival version 2 says; expected 404, version 0"


def test_an_answer_for_another_image_is_wrong(expected):
    answer = answered(expected.logits[0][0][[2]])
    assert verdict(expected, answer, {0, 1, 2}).verdict is Verdict.WRONG


def test_either_version_will_do_while_it_changes_but_no_mixture(expected):
    old, new = expected.logits[0][0], expected.logits[0][1]
    for one in (old, new):
        assert verdict(expected, answered(one[[1]]), {0, 1}).verdict is Verdict.RIGHT
    mixture = np.concatenate([old[[1], :3], new[[1], 3:]], axis=1)
    found = verdict(expected, answered(mixture), {0, 1})
    assert found.verdict is Verdict.WRONG
    assert "no version of any adapter" in found.detail


def test_all_images_of_a_request_are_of_one_version(expected):
    old, new = expected.logits[0][0], expected.logits[0][1]
    whole = answered(new[[1, 4]])
    assert verdict(expected, whole, {0, 1}, images=(1, 4)).verdict is Verdict.RIGHT
    torn = answered(np.stack([old[1], new[4]]))
    assert verdict(expected, torn, {0, 1}, images=(1, 4)).verdict is Verdict.WRONG


def test_nan_and_another_number_of_classes_are_wrong(expected):
    assert verdict(expected, answered(np.full((1, CLASSES), np.nan)), {0}).verdict is Verdict.WRONG
    padded = np.full((1, CLASSES + 1), -np.inf, np.float32)
    padded[:, :CLASSES] = expected.logits[0][0][[1]]
    assert verdict(expected, answered(padded), {0}).verdict is Verdict.WRONG
    assert verdict(expected, answered(expected.logits[2][0][[1]]), {0}).verdict is Verdict.WRONG


@pytest.mark.parametrize(
    "answer",
    [
        Reply(200, b"hello"),
        Reply(200, b"{}", 2),
        Reply(200, b"not json", 8),
        answered(np.zeros((1, CLASSES)), name="probabilities"),
        answered(np.zeros((1, CLASSES)), datatype="INT32"),
        answered(np.zeros((1, CLASSES)), shape=[3, 3]),
    ],
)
def test_what_is_no_answer_of_the_protocol_is_wrong(expected, answer):
    found = verdict(expected, answer, {0})
    assert found.verdict is Verdict.WRONG
    assert "not an answer of the protocol" in found.detail


def test_404_is_expected_only_while_the_adapter_may_be_away(expected):
    missing = Reply(404, b'{"error": "unloaded"}')
    assert verdict(expected, missing, {None}).verdict is Verdict.REFUSED
    assert verdict(expected, missing, {1, None}).verdict is Verdict.REFUSED
    found = verdict(expected, missing, {1})
    assert found.verdict is Verdict.UNEXPECTED
    assert "404" in found.detail and "unloaded" in found.detail


def test_an_answer_of_an_adapter_that_was_unloaded_is_wrong(expected):
    found = verdict(expected, answered(expected.logits[0][0][[1]]), {None})
    assert found.verdict is Verdict.WRONG
    assert found.detail.endswith("expected 404")


@pytest.mark.parametrize("status", [400, 429, 500, 503, 504])
def test_other_refusals_are_never_expected(expected, status):
    assert verdict(expected, Reply(status, b"x"), {0, None}).verdict is Verdict.UNEXPECTED


def test_lost_and_unanswered(expected):
    assert verdict(expected, Reply(0, b"reset"), {0, None}).verdict is Verdict.LOST
    assert verdict(expected, Reply(None), {0, None}).verdict is Verdict.UNANSWERED


def test_told_apart_counts_what_would_be_noticed(expected):
    assert expected.told_apart() == 1.0
    one = expected.logits[0][0]
    twins = Expectations(["a", "b"], [[one], [one.copy()]], expected.bound)
    assert twins.told_apart() == 0.0
    half = one.copy()
    half[:2] += 1
    assert Expectations(["a"], [[one, half]], expected.bound).told_apart() == 2 / POOL


def test_a_class_that_is_ruled_out_hides_no_fault():
    """The range of logits with -inf was without end, and so was what an answer might differ."""
    one = np.arange(POOL * CLASSES, dtype=np.float32).reshape(POOL, CLASSES)
    one[:, 3] = -np.inf
    other = one + np.float32(0.1)
    found = Expectations(["a"], [[one, other]], bound("branches", "float32"))
    assert found.says(0, 0, [1], one[1:2])
    assert not found.says(0, 0, [1], other[1:2])
    assert found.told_apart() == 1.0


def test_the_bound_is_that_of_the_device_and_the_precision():
    assert parity_bound("cpu", "float32") == bound("branches", "float32")
    assert parity_bound("cpu", "float16") == bound("twin", "float16")
    assert parity_bound("openvino", "bfloat16") == bound("openvino", "bfloat16")
    assert parity_bound("openvino", "int8") == bound("quantised", "int8")
    assert parity_bound("cuda", "float32") == bound("engine", "float32")
