"""Requests and changes on the wire: the Open Inference Protocol over HTTP, binary tensors."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE
from hhdeploy.errors import SessionError, require
from hhdeploy.loadtest.judge import Reply

_LENGTH = "Inference-Header-Content-Length"
# Less than the server's own, after which it closes an idle connection under a request.
_KEEP_ALIVE_SECONDS = 3.0


class Requests:
    """Bodies of inference requests, from parts that are made once."""

    def __init__(self, names: Sequence[str], pool: NDArray[np.float32], images: int) -> None:
        """``images``: of one request; ``pool`` float32 [pool, 3, H, W]."""
        self._heads = [_head(name, (images, *pool.shape[1:])) for name in names]
        self._images = [np.ascontiguousarray(image, "<f4").tobytes() for image in pool]

    def body(self, task: int, images: Sequence[int]) -> tuple[bytes, int]:
        """The body that asks one adapter for the logits of some images, and its JSON's length."""
        head = self._heads[task]
        return b"".join([head, *(self._images[i] for i in images)]), len(head)


def _head(name: str, shape: tuple[int, ...]) -> bytes:
    content = {
        "parameters": {"adapter": name, "binary_data_output": True},
        "outputs": [{"name": "logits"}],
        "inputs": [
            {
                "name": "images",
                "datatype": "FP32",
                "shape": list(shape),
                "parameters": {"binary_data_size": 4 * int(np.prod(shape))},
            }
        ],
    }
    return json.dumps(content, separators=(",", ":")).encode()


def upload_body(directory: Path) -> bytes:
    """The body that uploads an adapter directory."""
    tensors = base64.b64encode((directory / TENSOR_FILE).read_bytes()).decode()
    config = (directory / CONFIG_FILE).read_text(encoding="utf-8")
    content = {"parameters": {"config": config, f"file:{TENSOR_FILE}": tensors}}
    return json.dumps(content).encode()


class Client:
    """Connections to one server, kept open. An asynchronous context manager."""

    def __init__(self, url: str, model: str, token: str, *, connections: int, seconds: float):
        """``model``: the bundle's name there; ``seconds``: until an answer is given up."""
        aiohttp = require("aiohttp", "serve", "the load test")
        self._infer = f"{url}/v2/models/{model}/infer"
        self._url, self._token = url, token
        self._broken = (aiohttp.ClientError, OSError)
        self._session: Any = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=connections, keepalive_timeout=_KEEP_ALIVE_SECONDS
            ),
            timeout=aiohttp.ClientTimeout(total=seconds),
            auto_decompress=False,
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *reason: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every connection."""
        await self._session.close()

    async def infer(self, body: bytes, json_length: int) -> Reply:
        """Ask; see `Requests.body`."""
        return await self._post(self._infer, body, {_LENGTH: str(json_length)})

    async def upload(self, name: str, body: bytes) -> Reply:
        """Add or replace an adapter; see `upload_body`."""
        return await self._change(name, "load", body)

    async def load(self, name: str) -> Reply:
        """Load an adapter that is on the server's disk."""
        return await self._change(name, "load", b"{}")

    async def unload(self, name: str) -> Reply:
        """Take an adapter out."""
        return await self._change(name, "unload", b"{}")

    async def metrics(self) -> str:
        """What Prometheus scrapes.

        Raises:
            SessionError: the server does not answer.
        """
        try:
            async with self._session.get(f"{self._url}/metrics") as response:
                text: str = await response.text()
                return text
        except (*self._broken, asyncio.TimeoutError) as error:
            raise SessionError(f"{self._url}/metrics does not answer: {error!r}") from error

    async def _change(self, name: str, verb: str, body: bytes) -> Reply:
        url = f"{self._url}/v2/repository/models/{name}/{verb}"
        return await self._post(url, body, {"Authorization": f"Bearer {self._token}"})

    async def _post(self, url: str, body: bytes, headers: dict[str, str]) -> Reply:
        try:
            # In chunks: large bodies would block the event loop in one piece.
            async with self._session.post(url, data=io.BytesIO(body), headers=headers) as response:
                content = await response.read()
                length = response.headers.get(_LENGTH)
                return Reply(response.status, content, int(length) if length else None)
        except asyncio.TimeoutError:
            return Reply(None)
        except self._broken as error:
            return Reply(0, repr(error).encode())
