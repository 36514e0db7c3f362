"""LitServe with a merged model of ONNX Runtime a task: ``served_by_litserve MODEL ADAPTERS``.

Requests are JSON, an image as base64, batched by LitServe; a batch is one run a task that is in it.
"""

from __future__ import annotations

import base64
import socket
import sys
from typing import Any

import litserve
import numpy as np

from benchmarks.peers.runtimes import OrtPerTask
from benchmarks.peers.tasks import BATCH, Array, Case, task


class Merged(litserve.LitAPI):  # type: ignore[misc]
    """All tasks of a case."""

    def __init__(self, case: Case, bank: int) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=0.002)
        self._case, self._bank = case, bank

    def setup(self, device: str) -> None:
        """Merge and open every model."""
        self._models = OrtPerTask(self._case)
        for index in range(self._bank):
            self._models.add(task(index))

    def decode_request(self, request: dict[str, str]) -> tuple[str, Array]:
        """The task, and its image [3, H, W]."""
        values = np.frombuffer(base64.b64decode(request["image"]), "<f4")
        size = int((values.size / 3) ** 0.5)
        return request["task"], values.reshape(3, size, size)

    def batch(self, inputs: list[tuple[str, Array]]) -> tuple[list[str], Array]:
        """Names, and images [n, 3, H, W]."""
        names, images = zip(*inputs, strict=True)
        return list(names), np.stack(images)

    def predict(self, x: tuple[list[str], Array]) -> Array:
        """Logits [n, classes]."""
        names, images = x
        return self._models.run(images, names)

    def unbatch(self, output: Array) -> list[Array]:
        """Of each image."""
        return list(output)

    def encode_response(self, output: Array) -> list[float]:
        """As JSON has them."""
        return [float(value) for value in output]


def main(title: str, bank: int) -> None:
    """Serve until the process is told to stop."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server: Any = litserve.LitServer(
        Merged(Case(title), bank), accelerator="cpu", workers_per_device=1, timeout=120
    )
    print(f"http://127.0.0.1:{port}", flush=True)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
