"""Ray Serve that multiplexes merged models of ONNX Runtime: ``served_by_ray MODEL ADAPTERS``.

One replica holds them all; a request says its model by Ray Serve's own header, its body is the
image.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.serve.config import HTTPOptions
from starlette.requests import Request

from benchmarks.peers.runtimes import merged_graph, ort_session
from benchmarks.peers.tasks import BATCH, Case
from hhdeploy.runtime.serving.ray.run import free_port


def application(title: str, bank: int) -> Any:
    """The application: every task's model is loaded when it is first asked for, and stays."""

    @serve.deployment(max_ongoing_requests=2 * BATCH)
    class Merged:
        @serve.multiplexed(max_num_models_per_replica=bank)
        async def load(self, name: str) -> Any:
            return ort_session(merged_graph(Case(title), name))

        async def __call__(self, request: Request) -> list[float]:
            session = await self.load(serve.get_multiplexed_model_id())
            values = np.frombuffer(await request.body(), "<f4")
            size = int((values.size / 3) ** 0.5)
            images = values.reshape(1, 3, size, size)
            (found,) = await asyncio.to_thread(session.run, None, {"images": images})
            return [float(value) for value in found[0]]

    return Merged.bind()  # type: ignore[attr-defined]


def main(title: str, bank: int) -> None:
    """Serve until the process is told to stop."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    ray.init("local", include_dashboard=False, num_cpus=2, **quiet)
    port = free_port("127.0.0.1", 0)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    serve.run(application(title, bank))
    print(f"http://127.0.0.1:{port}", flush=True)
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
