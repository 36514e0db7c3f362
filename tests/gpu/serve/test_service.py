"""The server without its wire: requests of all adapters in one batch, in this process.

What serves needs no package beyond the session's, so this runs where ``hhdeploy serve`` cannot.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from hhdeploy.runtime.serving.messages import FP32, IMAGES, InferRequest, Tensor, Wanted
from hhdeploy.runtime.serving.outputs import LOGITS
from hhdeploy.runtime.serving.service import Service
from hhdeploy.runtime.serving.settings import ServeSettings
from tests.gpu.opening import open_on
from tests.gpu.scale import DRY, SCALE
from tests.support import assert_parity

CLIENTS = 4 if DRY else 64
BATCH = 8 if DRY else 32
NAME = "bundle"


@pytest.mark.parametrize("served", ["float32"] if DRY else ["float32", "float16"])
def test_requests_of_all_adapters(ort_cuda, workbench, served, record):
    made = workbench.model(SCALE.model)
    truth = made.truth()
    seconds = SCALE.seconds / 4
    session = open_on(made.path, ort_cuda, precision=served)
    record(model=SCALE.model, precision=served, device=session.device, clients=CLIENTS)
    whole = made.truth(BATCH)
    session.run(whole.images, whole.names)
    start, runs = time.perf_counter(), 0
    while not runs or time.perf_counter() - start < seconds / 4:
        session.run(whole.images, whole.names)
        runs += 1
    bare = runs * BATCH / (time.perf_counter() - start)

    async def scene() -> tuple[list[float], float, float, list[tuple[int, np.ndarray]]]:
        service = Service(session, ServeSettings(Path(NAME), max_batch=BATCH))
        await service.start()
        times: list[float] = []
        answers: list[tuple[int, np.ndarray]] = []
        try:
            before, begin = service.now().runs, time.perf_counter()
            end = begin + seconds
            await asyncio.gather(*(client(service, k, end, times, answers) for k in range(CLIENTS)))
            elapsed = time.perf_counter() - begin
            batch = len(times) / (service.now().runs - before)
        finally:
            await service.stop()
        return times, elapsed, batch, answers

    async def client(service, first, end, times, answers) -> None:
        index = first
        while True:
            index = (index + 1) % len(truth.names)
            name = truth.names[index]
            request = InferRequest(
                name or NAME,
                "",
                "",
                {IMAGES: Tensor(IMAGES, FP32, truth.images[index : index + 1])},
                (Wanted(LOGITS),),
            )
            start = time.perf_counter()
            answer = await service.infer(request)
            times.append(1e3 * (time.perf_counter() - start))
            answers.append((index, answer.outputs[0].array))
            if time.perf_counter() > end:
                return

    times, elapsed, batch, answers = asyncio.run(scene())
    record(
        seconds=elapsed,
        requests=len(times),
        images_per_second=len(times) / elapsed,
        bare_images_per_second=bare,
        mean_batch=batch,
        p50_ms=float(np.quantile(times, 0.5)),
        p99_ms=float(np.quantile(times, 0.99)),
    )
    for index in {index for index, _ in answers}:
        own = [found for k, found in answers if k == index]
        found = np.concatenate(own)
        right = np.repeat(truth.logits[index : index + 1, : found.shape[1]], len(found), axis=0)
        assert_parity(right, found, "engine", served)
