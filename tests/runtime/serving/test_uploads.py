"""What a load or unload of an adapter carries: an upload, nothing, or a mistake that is told."""

from __future__ import annotations

import asyncio
import base64
import re
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from hhdeploy.adapters.config import TENSOR_FILE
from hhdeploy.runtime.serving.access.tokens import Access
from hhdeploy.runtime.serving.errors import RequestError, TooLargeError
from hhdeploy.runtime.serving.fleet.uploads import Upload, check_unload, read_upload
from hhdeploy.runtime.serving.grpc.servicer import Servicer
from hhdeploy.runtime.serving.http.app import http_app
from tests.runtime.serving.leftovers import post
from tests.runtime.serving.servers import AUTHORISED, TOKEN
from tests.runtime.serving.test_grpc_server import Endpoint
from tests.runtime.serving.test_leftovers import Context

FILE = f"file:{TENSOR_FILE}"


@pytest.mark.parametrize("given", [{}, {"unload_dependents": False}])
def test_a_load_that_carries_nothing(given):
    assert read_upload(given, 10) is None


@pytest.mark.parametrize("content", [b"123", base64.b64encode(b"123").decode()])
@pytest.mark.parametrize("more", [{}, {"unload_dependents": True}])
@pytest.mark.parametrize("file", [FILE, f"file:1/{TENSOR_FILE}"])
def test_an_upload(content, more, file):
    given = {"config": "{}", file: content, **more}
    assert read_upload(given, 5) == Upload(b"{}", b"123")
    with pytest.raises(TooLargeError):
        read_upload(given, 4)


MISTAKES: list[dict[str, Any]] = [
    {"adapter_config.json": "{}", TENSOR_FILE: "MTIz"},
    {"files": "MTIz"},
    {"file": "MTIz"},
    {"Config": "{}"},
    {"config": "{}"},
    {FILE: "MTIz"},
    {"config": "{}", "file:other": "MTIz"},
    {"config": "{}", FILE: "MTIz", f"file:1/{TENSOR_FILE}": "MTIz"},
    {"config": "{}", FILE: "MTIz", "note": "of mine"},
    {"": ""},
]


@pytest.mark.parametrize("given", MISTAKES)
def test_what_is_not_understood_is_refused_by_name_and_never_nothing(given):
    found = re.escape(f"Found: {', '.join(sorted(given))}.")
    with pytest.raises(RequestError, match=f"an upload has two parameters.*none. {found}"):
        read_upload(given, 100)


@pytest.mark.parametrize("config", [True, 3, {}])
def test_a_configuration_that_is_no_text_is_called_so(config):
    with pytest.raises(RequestError, match=rf"Found: config {config!r}, no text, {FILE}\."):
        read_upload({"config": config, FILE: "MTIz"}, 100)


@pytest.mark.parametrize("given", [{}, {"unload_dependents": True}, {"unload_dependents": False}])
def test_an_unload_that_carries_nothing(given):
    check_unload(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"unload_dependents": "no"}, "unload_dependents: expected true or false, found 'no'"),
        ({"unload_dependents": True, "version": 1}, "no parameters but .*Found: version"),
        ({"config": "{}"}, "Found: config"),
    ],
)
def test_what_an_unload_may_not_carry(given, said):
    with pytest.raises(RequestError, match=said):
        check_unload(given)
    with pytest.raises(RequestError):
        read_upload(given, 100)


class Repository(Endpoint):
    """Notes what is unloaded."""

    async def unload_adapter(self, name: str) -> None:
        self.loaded.append(f"not {name}")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", ""),
        (b"{}", ""),
        (b'{"parameters": {"unload_dependents": false}}', ""),  # tritonclient's
        (b"{", "the body is not JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"adapter": "beta"}', "found adapter. What the server is to take belongs into"),
        (b'{"parameters": {"adapter": "beta"}}', "Found: adapter"),
    ],
)
@pytest.mark.parametrize("change", ["load", "unload"])
def test_the_body_of_a_change_is_read(change, body, said):
    endpoint = Repository()
    path = f"/v2/repository/models/alpha/{change}"
    status = asyncio.run(post(http_app(endpoint, Access(TOKEN)), path, body, **AUTHORISED))
    assert status == (400 if said else 200)
    assert [said in str(error) for error in endpoint.refusals] == [True] * bool(said)
    assert endpoint.loaded == ([] if said else ["alpha" if change == "load" else "not alpha"])


def test_parameters_of_an_unload_over_grpc_are_read():
    endpoint, context = Repository(), Context(None)
    context.invocation_metadata = lambda: tuple(AUTHORISED.items())
    servicer = Servicer(endpoint, Access(TOKEN))
    request = pb.RepositoryModelUnloadRequest(model_name="alpha")
    asyncio.run(servicer.RepositoryModelUnload(request, context))
    request.parameters["adapter"].string_param = "beta"
    asyncio.run(servicer.RepositoryModelUnload(request, context))
    assert endpoint.loaded == ["not alpha"]
    assert context.code == "INVALID_ARGUMENT" and "Found: adapter" in context.details
