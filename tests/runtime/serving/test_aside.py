"""What is large is made on a thread, and written in pieces."""

from __future__ import annotations

import asyncio
import json
import threading

import numpy as np
import pytest

from hhdeploy.runtime.serving import outputs
from hhdeploy.runtime.serving.http import codec
from hhdeploy.runtime.serving.messages import InferRequest, InferResponse, Tensor, bytes_array
from hhdeploy.runtime.serving.processes.aside import SMALL, Aside


def test_what_is_large_is_made_on_a_thread_and_what_is_small_at_once():
    async def scene():
        aside = Aside("aside")
        try:
            assert await aside.run(SMALL, threading.current_thread) is threading.current_thread()
            large = await aside.run(SMALL + 1, threading.current_thread)
            assert large.name.startswith("aside")
            with pytest.raises(ZeroDivisionError):
                await aside.run(SMALL + 1, lambda: 1 // 0)
        finally:
            aside.close()

    asyncio.run(scene())


def test_no_single_call_writes_a_large_answer(monkeypatch):
    """One would keep everybody waiting, on a thread too: it holds the interpreter's lock."""
    longest = []

    def spied(content):
        longest.append(len(content) if isinstance(content, list) else 0)
        return json.dumps(content, separators=(",", ":")).encode()

    monkeypatch.setattr(codec, "compact_json", spied)
    numbers = np.random.default_rng(0).standard_normal((4, 50_000)).astype(np.float32)
    texts = [f"answer {i} " * 100 for i in range(1000)]
    response = InferResponse(
        "m",
        "id",
        (
            Tensor("logits", "FP32", numbers),
            Tensor("answers", "BYTES", bytes_array([t.encode() for t in texts])),
        ),
    )
    body, length = codec.write_response(response, InferRequest("m", "", "id", {}))
    found = json.loads(body)
    assert length is None and found["id"] == "id"
    logits, answers = found["outputs"]
    assert np.array_equal(np.asarray(logits["data"], np.float32), numbers.reshape(-1))
    assert answers["data"] == texts
    assert 0 < max(longest) <= 4096


def test_thousands_of_classes_are_told_in_pieces(monkeypatch):
    dumps, longest = json.dumps, []

    def spied(content):
        longest.append(len(content))
        return dumps(content)

    monkeypatch.setattr(outputs.json, "dumps", spied)
    logits = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    told = json.loads(outputs._answers(None, logits, 3000, 0))
    assert told["problem_type"] == "single_label_classification"
    assert [a["index"] for a in told["answers"]] == np.argsort(-logits, kind="stable").tolist()
    assert max(longest) <= 256
