"""What clients are told of errors, in the same words on both wires."""

from __future__ import annotations

import json

import pytest

from hhdeploy.runtime.serving.errors import RequestError, internal_error
from hhdeploy.runtime.serving.grpc.servicer import _details
from hhdeploy.runtime.serving.http.app import error_response


def over_http(error: RequestError) -> str:
    return json.loads(error_response(error).body)["error"]


@pytest.mark.parametrize("told", [over_http, _details])
def test_a_long_text_is_cut_and_says_so(told):
    """gRPC's ended in the middle of a word."""
    assert told(RequestError("x" * 4000)) == "x" * 4000
    assert told(RequestError("x" * 4001)) == "x" * 3997 + "..."


def test_grpc_s_text_is_ascii_and_fits_a_header():
    assert _details(RequestError("é")) == "\\xe9"
    assert len(_details(RequestError("é" * 4000))) == 4000


def test_a_bug_names_the_log_that_has_more():
    assert str(internal_error()) == "internal error; the server's log has more."
    assert str(internal_error("replica")) == "internal error; the replica's log has more."
