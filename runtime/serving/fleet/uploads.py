"""What a request to change the repository carries: an adapter that came over the network."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from hhdeploy.adapters.config import TENSOR_FILE
from hhdeploy.runtime.serving.errors import RequestError, TooLargeError, shown

# The one file of an upload beside its configuration, as Triton's load API names files.
_UPLOAD: Final = re.compile(rf"file:(?:[^/]*/)?{re.escape(TENSOR_FILE)}")
# What Triton's clients may send with any change of the repository; no adapter has dependents.
_OF_NO_MEANING: Final = "unload_dependents"


@dataclass(frozen=True)
class Upload:
    """An adapter that came over the network: the bytes of its two files."""

    config: bytes
    tensors: bytes


def read_upload(parameters: Mapping[str, Any], most_bytes: int) -> Upload | None:
    """What a request to load an adapter carries; None: it is on the server's disk already.

    An upload has two parameters: ``config``, the text of adapter_config.json, and
    ``file:adapter_model.safetensors``, the file's bytes (base64 if they are text).

    Raises:
        RequestError: other parameters, of which none is passed over: who sends them believes that
            they were taken. TooLargeError: more than ``most_bytes``.
    """
    given = _meant(parameters)
    if not given:
        return None
    config = given.pop("config", None)
    files = [key for key in given if _UPLOAD.fullmatch(key)]
    if not isinstance(config, str) or not files or len(given) != 1:
        raise RequestError(
            "an upload has two parameters: config, the text of adapter_config.json, and "
            f"file:{TENSOR_FILE}, its bytes; to load what the server has on its disk there are "
            f"none. Found: {', '.join(sorted(_described(*each) for each in parameters.items()))}."
        )
    content = given[files[0]]
    if isinstance(content, str):
        try:
            content = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"file:{TENSOR_FILE}: expected base64: {error}") from error
    if not isinstance(content, bytes):
        raise RequestError(f"file:{TENSOR_FILE}: expected base64.")
    if len(content) + len(config) > most_bytes:
        raise TooLargeError(f"the adapter is beyond {most_bytes} bytes.")
    return Upload(config.encode("utf-8", "replace"), content)


def check_unload(parameters: Mapping[str, Any]) -> None:
    """Raises `RequestError` for what a request to unload an adapter may not carry: see `_meant`."""
    if given := _meant(parameters):
        raise RequestError(
            f"a request to unload an adapter has no parameters but {_OF_NO_MEANING}. Found: "
            f"{', '.join(sorted(str(key)[:80] for key in given))}."
        )


def _described(key: str, value: Any) -> str:
    """A parameter by its name, and config by its value where that is no text."""
    odd = key == "config" and not isinstance(value, str)
    return f"config {shown(value)}, no text" if odd else key[:80]


def _meant(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a request carries beside the word of Triton's clients that says nothing here."""
    given = dict(parameters)
    word = given.pop(_OF_NO_MEANING, False)
    if not isinstance(word, bool):
        raise RequestError(
            f"{_OF_NO_MEANING}: expected true or false, found {shown(word)}. No adapter has "
            "dependents."
        )
    return given
