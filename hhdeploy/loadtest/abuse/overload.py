"""More than a server can answer: it refuses, and must do so at nobody else's cost."""

from __future__ import annotations

import json
import math

from hhdeploy.loadtest.abuse.wire import Attack, Fields, Victim, binary_request, posting

# Images of a full batch, by default.
_BATCH = 32
_NOTE_BYTES = 6 << 20


def refused_bodies(victim: Victim) -> Attack:
    """Full batches as fast as they are answered or refused, some of megabytes of JSON."""
    images = b"\0" * (4 * _BATCH * math.prod(victim.size))
    batch = binary_request("FP32", [_BATCH, *victim.size], images)
    note = json.dumps({"inputs": [], "parameters": {"note": "x" * _NOTE_BYTES}}).encode()
    bodies: list[tuple[bytes, Fields]] = [batch] * 7
    return posting(victim, [*bodies, (note, {})])
