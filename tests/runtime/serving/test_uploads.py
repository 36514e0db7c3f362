"""What a request to load an adapter carries: an upload, nothing, or a mistake that is told."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest

from hhdeploy.adapters.config import TENSOR_FILE
from hhdeploy.runtime.serving.endpoint import Upload, read_upload
from hhdeploy.runtime.serving.errors import RequestError, TooLargeError

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
    {"config": {}, FILE: "MTIz"},
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
