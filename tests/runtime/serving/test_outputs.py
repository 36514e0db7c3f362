"""Logits that are no numbers are no answer, whoever made them so."""

from __future__ import annotations

import numpy as np
import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.runtime.serving.errors import NoNumbersError, RequestError
from hhdeploy.runtime.serving.messages import Wanted
from hhdeploy.runtime.serving.outputs import check_finite, output_of
from tests.wrong_logits import LOGITS, bundle_of_logits

NUMBERS, OWN = np.zeros((2, 3, 4, 4), np.float32), [2, 3]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *((value, "image 1 holds NaN or infinities") for value in (np.nan, np.inf)),
        # Finite, and no model computes with them.
        *((value, "image 1: expected numbers of a picture") for value in (3e38, -3e38, 1e7)),
    ],
)
def test_of_a_picture_that_holds_none_or_vast_ones_it_is_the_picture(value, said):
    pixels, logits = NUMBERS.copy(), np.zeros((2, 3), np.float32)
    pixels[1, 0, 0, 0], logits[1] = value, np.nan
    with pytest.raises(RequestError, match=said) as caught:
        check_finite(pixels, logits, OWN, [None, None])
    assert caught.value.status == 400


@pytest.mark.parametrize("row", [[np.nan] * 3, [0, np.nan, 0], [np.inf, 0, 0], [-np.inf] * 3])
def test_of_any_other_picture_it_is_the_adapter(row):
    """Its training diverged; its numbers are finite, and what they make is not."""
    logits = np.zeros((2, 3), np.float32)
    logits[1] = row
    said = "image 1, adapter 'backbone': the logits are no numbers"
    with pytest.raises(NoNumbersError, match=said) as caught:
        check_finite(NUMBERS, logits, OWN, [None, None])
    # The server's answer, and no reason to replace the session.
    assert (caught.value.status, caught.value.reason) == (500, "OTHER")


def test_an_answer_is_what_a_session_takes_for_one(small, tmp_path):
    manifest = Bundle.open(bundle_of_logits(small, tmp_path / "bundle")).manifest
    for name, (_, own, said) in LOGITS.items():
        logits, entry = np.array([own], np.float32), manifest.adapter(name)
        if said is None:
            with pytest.raises(
                NoNumbersError, match=f"adapter '{name}': the logits are no numbers"
            ):
                check_finite(NUMBERS, logits, [3], [entry])
        else:
            check_finite(NUMBERS, logits, [3], [entry])


def test_classes_of_others_and_ones_that_are_ruled_out_are_no_fault():
    logits = np.array([[0, 1, -np.inf], [-np.inf, 1, 0]], np.float32)
    check_finite(NUMBERS, logits, OWN, [None, None])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_json_holds_no_infinities(value):
    found = {"features": np.asarray([[1, value]], np.float32)}
    asked = (found, [None], [2])
    with pytest.raises(RequestError, match="has values that JSON cannot hold"):
        output_of(Wanted("features"), *asked, as_json=True)
    output_of(Wanted("features", binary=True), *asked, as_json=True)
    output_of(Wanted("features"), *asked)  # gRPC
