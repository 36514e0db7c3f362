"""Heads of requests that another server could read in another way."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request

from hhdeploy.errors import HhdeployError
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.errors import ForbiddenError, RequestError
from hhdeploy.runtime.serving.http.app import http_app
from hhdeploy.runtime.serving.http.heads import check_head
from tests.runtime.serving.servers import AUTHORISED, TOKEN
from tests.runtime.serving.test_grpc_server import Endpoint

HOST = (b"host", b"localhost")
CODING = b"transfer-encoding"
TOKENS = [(name.encode(), value.encode()) for name, value in AUTHORISED.items()]


def scope_of(*headers: tuple[bytes, bytes], version: str = "1.1") -> dict[str, Any]:
    return {
        "type": "http", "method": "GET", "path": "/v2", "query_string": b"",
        "http_version": version, "headers": list(headers),
    }  # fmt: skip


@pytest.mark.parametrize(
    "scope",
    [
        scope_of(HOST),
        scope_of((b"host", b"LOCALHOST:8000"), (CODING, b" Chunked ")),
        scope_of(HOST, (b"accept", b"a"), (b"accept", b"b")),
        scope_of(HOST, (b"content-encoding", b"gzip"), (CODING, b"chunked"), version="1.0"),
    ],
)
def test_what_is_taken(scope):
    check_head(Request(scope), frozenset({"localhost"}))
    check_head(Request(scope), None)


def test_http_1_0_names_no_server():
    check_head(Request(scope_of(version="1.0")), None)
    with pytest.raises(ForbiddenError, match="expected one of localhost, found ''"):
        check_head(Request(scope_of(version="1.0")), frozenset({"localhost"}))


REFUSED = {
    "two hosts": ([HOST, (b"host", b"evil.example")], "header host: .* at most once, found 2"),
    "the same twice": ([HOST, HOST], "header host: .* found 2"),
    "no host": ([], "Host: expected the server's name"),
    "gzip and chunks": ([HOST, (CODING, b"gzip, chunked")], "alone, found 'gzip, chunked'"),
    "in two lines": ([HOST, (CODING, b"gzip"), (CODING, b"chunked")], "found 'gzip, chunked'"),
    "chunks twice": ([HOST, (CODING, b"chunked, chunked")], "found 'chunked, chunked'"),
}


@pytest.mark.parametrize(("headers", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("hosts", [None, frozenset({"localhost", "evil.example"})])
def test_what_is_refused(headers, said, hosts):
    with pytest.raises(RequestError, match=said):
        check_head(Request(scope_of(*headers)), hosts)


@pytest.mark.parametrize(
    ("headers", "status", "said"),
    [
        (TOKENS, 200, ""),
        ([], 401, "needs the header Authorization"),
        ([*TOKENS, *TOKENS], 400, "header authorization: expected at most once"),
        ([*TOKENS, (CODING, b"gzip, chunked")], 400, "Transfer-Encoding"),
        ([*TOKENS, (b"x-request-id", b"a"), (b"x-request-id", b"b")], 200, ""),
    ],
)
def test_every_route_checks_it(headers, status, said):
    endpoint, sent = Endpoint(), []

    async def send(event: Any) -> None:
        sent.append(event)

    app = http_app(endpoint, Access(inference=[TOKEN]))
    asyncio.run(app(scope_of(HOST, *headers), asyncio.Event().wait, send))
    assert sent[0]["status"] == status
    assert said in json.loads(sent[1]["body"]).get("error", "")
    refusals: list[HhdeployError] = endpoint.refusals
    assert len(refusals) == (status != 200)
